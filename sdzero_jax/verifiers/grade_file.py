"""Grades a file of responses: JSON lines in, verdicts out, a summary by outcome.

Each line holds a response and, under one of the usual names, its reference answer, or the tests that its
program must pass. Leaves out the command line.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import REWARDS, Verdict
from sdzero_jax.files import check_writable, parse_jsonl, write_bytes_atomic
from sdzero_jax.verifiers.code import Limits, judge_many
from sdzero_jax.verifiers.math import MathSettings
from sdzero_jax.verifiers.pool import PoolSettings, VerifierPool

RESPONSE_FIELDS = ("response", "completion", "output", "generation", "prediction", "pred")
TESTS_FIELD = "tests"
GOLD_FIELDS = ("gold", "answer", "target", "reference", "solution", "label")


@dataclasses.dataclass(frozen=True)
class FileSummary:
    """Counts of one graded file. `rows` is the number of lines graded."""

    rows: int
    outcomes: Mapping[str, int]

    @property
    def accuracy(self) -> float:
        """Correct among the lines that got a reward; nan without any."""
        graded = sum(count for outcome, count in self.outcomes.items() if REWARDS[outcome] is not None)
        return self.outcomes.get("correct", 0) / graded if graded else float("nan")

    @property
    def failed(self) -> int:
        """Lines for which the grader itself gave no verdict (timeout, error); bad references are not counted."""
        return self.outcomes.get("timeout", 0) + self.outcomes.get("error", 0)

    def lines(self) -> list[str]:
        """A table by outcome."""
        body = [
            f"  {outcome:<17}{count:>8}{100 * count / max(self.rows, 1):>7.1f} %"
            for outcome, count in sorted(self.outcomes.items(), key=lambda pair: -pair[1])
        ]
        return [
            f"{self.rows} responses graded",
            *body,
            f"  accuracy {100 * self.accuracy:.1f} % of those with a reward",
        ]


def grade_file(
    path: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    response_field: str | None = None,
    gold_field: str | None = None,
    pool: PoolSettings = PoolSettings(),
    math: MathSettings = MathSettings(),
    limits: Limits = Limits(),
    progress: bool = True,
) -> FileSummary:
    """Grades the responses of a JSONL file: programs where a line has "tests", else mathematics.

    Args:
      path: the file; each line an object with a response, and a gold (text, number or list of them) or tests
        in any form that `code_tests` reads.
      output: where to write {"line", "id" when there is one, "outcome", "reward", "detail"}, one line per
        response in the file's order; must not exist.
      response_field, gold_field: names of the fields; None takes the first usual name that the first line has.
    Raises UserError for a missing or broken file, a missing field (with its line), an existing output, and
      programs without a sandbox.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if output is not None and Path(output).exists():
        raise UserError(f"{output} exists; remove it or name another output file")
    if output is not None:
        check_writable(output, "name another output file")
    records, numbers = _records(path)
    response_field = _field(records[0], response_field, RESPONSE_FIELDS, path, "response")
    if any(TESTS_FIELD not in record for record in records):
        first = next(record for record in records if TESTS_FIELD not in record)
        gold_field = _field(first, gold_field, GOLD_FIELDS, path, "gold")
    responses, golds = [], []
    for number, record in zip(numbers, records):
        response = record.get(response_field)
        if not isinstance(response, str):
            raise UserError(f"{path}, line {number}: {response_field!r} is {_kind(response)}, wanted text")
        responses.append(response)
        is_code = TESTS_FIELD in record
        golds.append(None if is_code else _golds(record.get(gold_field), f"{path}, line {number}: {gold_field!r}"))
    tests = [record.get(TESTS_FIELD) for record in records]
    verdicts = _verdicts(responses, golds, tests, pool, math, limits)
    return _write(records, numbers, verdicts, output, progress)


def _verdicts(responses, golds, tests, pool, math, limits) -> Iterator[tuple[int, Verdict]]:
    """(index, Verdict) as they come, from workers on all cores."""
    maths = [index for index, gold in enumerate(golds) if gold is not None]
    if maths:
        with VerifierPool(pool, math) as workers:
            for place, verdict in workers.stream([golds[i] for i in maths], [responses[i] for i in maths]):
                yield maths[place], verdict
    programs = [index for index, gold in enumerate(golds) if gold is None]
    if programs:
        reports = judge_many(((responses[i], tests[i]) for i in programs), limits=limits)
        yield from ((index, report.verdict) for index, report in zip(programs, reports, strict=True))


def _write(records, numbers, verdicts, output, progress) -> FileSummary:
    """Counts the verdicts; the output appears whole, in the file's order, or not at all."""
    from sdzero_jax.progress import Progress

    outcomes: collections.Counter[str] = collections.Counter()
    rows: list[dict[str, Any]] = [{}] * len(records)
    bar = Progress("verify", len(records), unit="response") if progress else None
    try:
        for index, verdict in verdicts:
            outcomes[verdict.outcome] += 1
            rows[index] = _row(numbers[index], records[index], verdict)
            if bar:
                bar.update(1, {"correct": outcomes["correct"] / outcomes.total()})
    finally:
        if bar:
            bar.close()
    if output is not None:
        text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
        write_bytes_atomic(output, text.encode("ascii"))
    return FileSummary(len(records), dict(outcomes))


def _records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    data = path.read_bytes()
    records, whole = parse_jsonl(data, str(path))
    if data[whole:].strip():
        raise UserError(f"{path}, last line: not a JSON object; repair or remove this line")
    if not records:
        raise UserError(f"{path}: no JSON lines; wanted objects with a response and a gold")
    numbers = [number for number, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    return records, numbers


def _field(record: Mapping[str, Any], wanted: str | None, usual: Sequence[str], path: Path, what: str) -> str:
    if wanted is not None:
        if wanted not in record:
            raise UserError(f"{path}: no field {wanted!r} in the first line{nearest(wanted, record)}")
        return wanted
    for name in usual:
        if name in record:
            return name
    raise UserError(f"{path}: no {what} field ({', '.join(usual)}) in the first line{nearest(what, record)}")


def _golds(value: Any, where: str) -> list[str]:
    """The accepted answers as texts; no reference at all is a verdict (gold_unparseable), not an error."""
    values = value if isinstance(value, list) else [value]
    golds = []
    for gold in values:
        if isinstance(gold, bool) or not isinstance(gold, str | int | float | None):
            raise UserError(f"{where} is {_kind(gold)}, wanted text, a number or a list of them")
        if gold is not None:
            golds.append(str(gold))
    return golds


def _kind(value: Any) -> str:
    return {"NoneType": "missing", "dict": "an object", "bool": "true or false"}.get(
        type(value).__name__, type(value).__name__
    )


def _row(number: int, record: Mapping[str, Any], verdict: Any) -> dict[str, Any]:
    row = {"line": number, "outcome": verdict.outcome, "reward": verdict.reward, "detail": verdict.detail}
    return {"id": record["id"], **row} if "id" in record else row
