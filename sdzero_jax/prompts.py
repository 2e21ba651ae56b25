"""Control phrases by family and answer instructions: strings only, no tokenizer.

The reviser reads x | y | d P_r d | ..., where P_r depends on the reward of y (SD-Zero, control phrases).
Every stage asks with the same user turn: the problem and its instruction, exactly once.
Saved parameters record the phrases and the tokenizer's fingerprint, template included; distillation refuses others.
Leaves out chat templates, which belong to the tokenizer.
"""

import dataclasses
import re

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
    # The same phrase whatever the reward: what does knowing it add? (an ablation)
    "embedded_blind": ControlPhrases("<wrong>", "<wrong>", delimiter=""),
}


def control_phrases(name: str) -> ControlPhrases:
    """Looks a preset up; an unknown name is refused with the nearest one."""
    if name not in PHRASES:
        raise UserError(f"unknown control phrases {name!r}{nearest(name, PHRASES)}")
    return PHRASES[name]


# Words by which a response revises itself in the open; the embedded tasks' phrase counts as one.
_REVISING = re.compile(
    r"\b(?:wait|however|actually|alternatively|mistake|incorrect|wrong|redo|start over|"
    r"let me (?:re\w+|correct|double[- ]check)|double[- ]check)\b",
    re.IGNORECASE,
)


def revision_words(text: str) -> int:
    """How often a response revises itself explicitly: "wait", "however", "let me recheck", ..."""
    return len(_REVISING.findall(text))


MATH_INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
LANGUAGES = {"python": "Python", "cpp": "C++"}  # name of the fenced block -> name in a sentence


def code_instruction(language: str, style: str = "stdio") -> str:
    """What follows a programming problem in the user turn.

    Args:
      language: "python" or "cpp", which is also the name of the fenced block.
      style: "stdio", a program that reads and writes; "function", a function that the tests call.
    Raises: UserError for another language or style.
    """
    if language not in LANGUAGES:
        raise UserError(f"unknown programming language {language!r}{nearest(language, LANGUAGES)}")
    spoken = LANGUAGES[language]
    tasks = {
        "stdio": f"Write a {spoken} program that reads standard input and writes standard output.",
        "function": f"Write the {spoken} function that the problem asks for.",
    }
    if style not in tasks:
        raise UserError(f"unknown style of code question {style!r}{nearest(style, tasks)}")
    return f"{tasks[style]} Put the final program in one ```{language} block."


def instructed(problem: str, instruction: str, separator: str = " ") -> str:
    """The user turn: `problem`, then `instruction` exactly once.

    An instruction that the problem already holds, wherever it stands, is moved to the end, not repeated.
    """
    parts = [part.strip() for part in problem.split(instruction)]
    bare = separator.join(part for part in parts if part)
    return f"{bare}{separator}{instruction}" if bare else instruction
