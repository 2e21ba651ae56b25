"""Training questions that an evaluation set also holds, by normalised text.

Finds the same problem in another spelling of white space, LaTeX layout, case or instruction; leaves out
paraphrases and changed numbers, which are other problems here.
"""

import dataclasses
import hashlib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.prompts import LANGUAGES, MATH_INSTRUCTION, code_instruction

_log = logging.getLogger(__name__)
_INSTRUCTIONS = (
    MATH_INSTRUCTION,
    *(code_instruction(language, style) for language in LANGUAGES for style in ("stdio", "function")),
)
# Layout that does not change what is asked. Signs of arithmetic stay: x+1 and x-1 are two problems.
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|text|textbf|mathrm)(?![a-z])|\\[,;:! ]|[$~\s\"'`“”‘’]")
_SENTENCE_MARKS = re.compile(r"(?<!\d)[.,;:?]|[.,;:?](?!\d)")


@dataclasses.dataclass(frozen=True)
class Overlap:
    """One pair of the same problem."""

    train_id: str
    evaluation_set: str
    evaluation_id: str


def normalised(prompt: str) -> str:
    """The text by which problems are compared: without instruction, layout, case and sentence marks."""
    for instruction in _INSTRUCTIONS:
        prompt = prompt.replace(instruction, "")
    text = unicodedata.normalize("NFKC", prompt).lower()
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = re.sub(r"\{(\w)\}", r"\1", _LAYOUT.sub("", text))  # x^{2} is x^2; longer braces group
    return _SENTENCE_MARKS.sub("", text)


def find_overlap(train: Iterable[Question], evaluation: Mapping[str, Iterable[Question]]) -> list[Overlap]:
    """Every pair (training question, evaluation question) with the same normalised text.

    Args:
      train: training questions.
      evaluation: set name -> its questions.
    """
    by_text: dict[bytes, list[tuple[str, str]]] = {}
    for name, questions in evaluation.items():
        for question in questions:
            by_text.setdefault(_key(question), []).append((name, question.id))
    return [Overlap(question.id, *found) for question in train for found in by_text.get(_key(question), ())]


def _key(question: Question) -> bytes:
    # A hash: a set of a hundred thousand long problems would otherwise stand in memory.
    return hashlib.sha256(normalised(question.prompt).encode()).digest()


def check_overlap(
    train: Iterable[Question], evaluation: Mapping[str, Iterable[Question]], *, allow: bool = False
) -> list[Overlap]:
    """Refuses training questions that an evaluation set holds; with `allow` they are logged and returned.

    Raises: UserError with the number of pairs per set and one example.
    """
    pairs = find_overlap(train, evaluation)
    if not pairs:
        return pairs
    counts = {name: sum(pair.evaluation_set == name for pair in pairs) for name in evaluation}
    told = ", ".join(f"{count} with {name}" for name, count in counts.items() if count)
    message = (
        f"training questions overlap with evaluation: {told} (first: {pairs[0].train_id} is {pairs[0].evaluation_id})"
    )
    if not allow:
        raise UserError(f"{message}; take other questions, or set problems.overlap=drop (or allow)")
    _log.warning("%s; allowed", message)
    return pairs


def without_overlap(train: Iterable[Question], pairs: Iterable[Overlap]) -> list[Question]:
    """The training questions that are in none of the pairs, in order."""
    shared = {pair.train_id for pair in pairs}
    return [question for question in train if question.id not in shared]
