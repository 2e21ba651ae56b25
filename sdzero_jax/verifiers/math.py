"""Verdicts on mathematical answers: the last box of a response against one or several reference answers.

The policy: the answer is the last \\boxed or \\fbox after the last </think>; without one the response
is unparseable. Grading is exact where it can be and symbolic (math-verify) where it must be; nothing
is ever evaluated as code. A time limit holds for each call, as far as Python can interrupt itself:
training uses `sdzero_jax.verifiers.pool`, which kills. Leaves out judging of proofs and multiple-choice texts.
"""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Annotated

from sdzero_jax.examples import Verdict
from sdzero_jax.verifiers import extraction, symbolic
from sdzero_jax.verifiers.equality import Comparison, Rules, compare

RING_AGAIN = 0.25  # seconds


@dataclasses.dataclass(frozen=True)
class MathSettings:
    """How answers are compared."""

    strict_units: Annotated[bool, "two different units are a wrong answer; a missing unit never is"] = True
    float_digits: Annotated[int, "decimals from which a rounded number may stand for an exact one"] = 6
    max_chars: Annotated[int, "longer answers are compared as text only"] = 1000
    deadline: Annotated[float, "seconds for one verdict, after which the grader gives none"] = 5.0


class DeadlinePassed(BaseException):
    """The time limit; no Exception, so that sympy's own handlers let it through."""


def verify_math(response: str, gold: str | Sequence[str], settings: MathSettings = MathSettings()) -> Verdict:
    """Grades the last box of a response.

    Args:
      response: the model's text, thinking included.
      gold: a reference answer, or several of which one suffices; a box around it is taken off.
      settings: units, tolerance, limits.
    Returns a Verdict; bad text never raises. Runs in this process and must be called from the main thread
    (its time limit is a signal); `VerifierPool` has no such limits. Source: ALGORITHM.md, reward r.
    """
    return _grade(response, gold, settings, boxed_only=True)


def answers_equal(pred: str, gold: str | Sequence[str], settings: MathSettings = MathSettings()) -> Verdict:
    """As `verify_math` for an answer given as such: without a box the whole text is the answer.

    Boxes with only separators between them form a list here; a sentence counts by the answer that it states
    ("the answer is 4"), else by its last formula.
    """
    return _grade(pred, gold, settings, boxed_only=False)


def grade_item(item: tuple[str, str | Sequence[str], MathSettings]) -> Verdict:
    """`verify_math` for a pool: one picklable argument (response, gold, settings)."""
    response, gold, settings = item
    return verify_math(response, gold, settings)


def _grade(text: str, gold: str | Sequence[str], settings: MathSettings, boxed_only: bool) -> Verdict:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the maths grader's time limit needs the main thread; use VerifierPool elsewhere")
    symbolic.load()
    try:
        with _deadline(settings.deadline):
            return _judge(text, gold, settings, boxed_only)
    except DeadlinePassed:
        return Verdict.of("timeout", f"no verdict in {settings.deadline:g} s")
    except (Exception, RecursionError) as error:
        return Verdict.of("error", f"{type(error).__name__}: {' '.join(str(error).split())[:80]}")


def _judge(text: str, gold: str | Sequence[str], settings: MathSettings, boxed_only: bool) -> Verdict:
    rules = Rules(settings.strict_units, settings.float_digits, settings.max_chars)
    golds = [_gold_answer(text) for text in ([gold] if isinstance(gold, str) else gold or [])]
    if not any(answer.strip() for answer in golds):
        return Verdict.of("gold_unparseable", "no reference answer")
    tail = extraction.after_thinking(text)
    answer = extraction.last_box(tail) if boxed_only else extraction.listed_boxes(tail)
    if answer is None:
        if boxed_only:
            return Verdict.of("unparseable", "no box")
        answer = extraction.stated_answer(tail) or extraction.last_formula(tail)
    comparisons = []
    for candidate in golds:
        comparisons.append(compare(answer, candidate, rules))
        if comparisons[-1].status == "equal":
            break
    return _verdict(comparisons, answer)


def _gold_answer(gold: str) -> str:
    boxed = extraction.listed_boxes(extraction.after_thinking(gold))
    return extraction.last_formula(gold) if boxed is None else boxed


# A right answer under one gold is right; failures of the grader outrank "wrong", for they might hide a right one.
_OUTCOMES = (
    ("equal", "correct"),
    ("too_large", "timeout"),
    ("error", "error"),
    ("different", "wrong"),
    ("unreadable", "unparseable"),
    ("gold_unreadable", "gold_unparseable"),
)


def _verdict(comparisons: Sequence[Comparison], answer: str) -> Verdict:
    shown = " ".join(answer.split())[:60]
    for status, outcome in _OUTCOMES:
        for comparison in comparisons:
            if comparison.status == status:
                return Verdict.of(outcome, f"{shown}: {comparison.reason}")
    return Verdict.of("gold_unparseable", "no reference answer")


@contextlib.contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raises DeadlinePassed in the block after `seconds`; an outer alarm is put back, less the time spent."""
    if not hasattr(signal, "SIGALRM") or seconds <= 0:
        yield
        return

    def stop(signum, frame):
        raise DeadlinePassed

    previous = signal.signal(signal.SIGALRM, stop)
    begun = time.monotonic()
    # It rings again: a bare `except` in a library may swallow the first one.
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds, RING_AGAIN)
    try:
        yield
    finally:
        rung = _disarm()
        signal.signal(signal.SIGALRM, previous)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - begun), 1e-3))
        if rung:
            raise DeadlinePassed


def _disarm() -> bool:
    """Stops the timer; True when it rang meanwhile."""
    rung = False
    while True:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0)
            return rung
        except DeadlinePassed:
            rung = True
