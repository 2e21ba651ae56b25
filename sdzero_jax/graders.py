"""Verdicts on real questions, each kind by its own verifier: math, code, countdown.

Worker processes start at the first mathematical question and end with `close`. Leaves out the embedded
tasks, which grade themselves.
"""

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from typing import Annotated

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question, Verdict
from sdzero_jax.tasks.countdown import evaluate
from sdzero_jax.verifiers import MathSettings, PoolSettings, VerifierPool
from sdzero_jax.verifiers.code import Limits, judge_many
from sdzero_jax.verifiers.extraction import after_thinking, last_box
from sdzero_jax.verifiers.sandbox import get_sandbox


@dataclasses.dataclass(frozen=True)
class GradersConfig:
    """How responses to real questions are graded."""

    pool: Annotated[PoolSettings, "processes that grade mathematics"] = PoolSettings()
    math: Annotated[MathSettings, "how answers are compared"] = MathSettings()
    code: Annotated[Limits, "what judged programs may use"] = Limits()


class Graders:
    """Grades batches of responses; close it, so that its processes end."""

    def __init__(self, config: GradersConfig):
        self._config = config

    def check(self, questions: Sequence[Question]) -> None:
        """Refuses questions that cannot be graded here: of an unknown kind, programs without sandbox or compiler."""
        kinds = {question.kind for question in questions}
        if unknown := sorted(kinds - {"math", "code", "countdown"}):
            raise UserError(f"no verifier for questions of kind {unknown[0]!r}; there are math, code, countdown")
        if "code" in kinds:
            get_sandbox(self._config.code.python, self._config.code.unsafe_without_sandbox)
            if any(q.metadata.get("language") == "cpp" for q in questions) and not shutil.which("g++"):
                raise UserError("some questions ask for C++ programs, which need a compiler here: install g++")

    def verify(self, questions: Sequence[Question], responses: Sequence[str]) -> list[Verdict]:
        """A Verdict per response, in order."""
        verdicts: list[Verdict | None] = [None] * len(questions)
        for kind, grade in (("math", self._math), ("code", self._code), ("countdown", _countdown)):
            rows = [row for row, question in enumerate(questions) if question.kind == kind]
            if rows:
                graded = grade([questions[row] for row in rows], [responses[row] for row in rows])
                for row, verdict in zip(rows, graded, strict=True):
                    verdicts[row] = verdict
        return verdicts

    def _math(self, questions, responses) -> list[Verdict]:
        return self._pool.verify(questions, responses)

    def _code(self, questions, responses) -> list[Verdict]:
        items = ((response, question.metadata["tests"]) for question, response in zip(questions, responses))
        return [report.verdict for report in judge_many(items, limits=self._config.code)]

    @functools.cached_property
    def _pool(self) -> VerifierPool:
        return VerifierPool(self._config.pool, self._config.math)

    def close(self) -> None:
        if "_pool" in self.__dict__:
            self._pool.close()
            del self._pool


def _countdown(questions: Sequence[Question], responses: Sequence[str]) -> list[Verdict]:
    """The last box must hold an expression that uses each number once and equals the target, exactly."""
    return [grade_countdown(question, response) for question, response in zip(questions, responses)]


def grade_countdown(question: Question, response: str) -> Verdict:
    box = last_box(after_thinking(response))
    if box is None:
        return Verdict.of("unparseable", "no box")
    expression = "".join(box.partition("=")[0].split())
    for latex, sign in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/")):
        expression = expression.replace(latex, sign)
    try:
        value, used = evaluate(expression)
    except (ValueError, ZeroDivisionError) as error:
        return Verdict.of("wrong", str(error)[:80])
    if sorted(used) != sorted(question.metadata["numbers"]):
        return Verdict.of("wrong", f"uses {used}")
    right = value == question.metadata["target"]
    return Verdict.of("correct" if right else "wrong", f"= {value}")
