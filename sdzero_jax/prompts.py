"""Control phrases by family: strings only, no tokenizer (ALGORITHM: control phrases).

The reviser reads x | y | d P_r d | ..., where P_r depends on the reward of y.
A checkpoint records the phrases it was trained with; distillation refuses others.
"""

import dataclasses

from sdzero_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class ControlPhrases:
    """P_1 (`correct`), P_0 (`wrong`) and the delimiter d written on both sides of them."""

    correct: str
    wrong: str
    delimiter: str = "\n\n"

    def text(self, reward: float) -> str:
        """d + P_r + d, as one piece."""
        phrase = self.correct if reward == 1.0 else self.wrong
        return f"{self.delimiter}{phrase}{self.delimiter}"


PHRASES: dict[str, ControlPhrases] = {
    "paper": ControlPhrases(
        "Let me rephrase the above solution.",
        "Wait, this response is not correct, let me start over.",
    ),
    "qwen3": ControlPhrases(
        "Let me rephrase the above solution.",
        "Wait, this response is wrong. Let me correct it.",
    ),
    "olmo3": ControlPhrases("Let me rephrase the above solution.", "Wrong. I need to redo all."),
    # One token each in the embedded tasks, without delimiters.
    "embedded": ControlPhrases("<ok>", "<wrong>", delimiter=""),
}


def control_phrases(name: str) -> ControlPhrases:
    """Looks a preset up; an unknown name is refused with the nearest one."""
    if name not in PHRASES:
        raise UserError(f"unknown control phrases {name!r}{nearest(name, PHRASES)}")
    return PHRASES[name]
