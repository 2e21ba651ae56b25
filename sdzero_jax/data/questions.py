"""Rows of JSONL, JSON and Parquet files -> Questions, by a field mapping; the user turn of a question.

Answers are read as files spell them: plain, `#### n` (GSM8K), or the last \\boxed of a solution (MATH).
Programming problems carry their tests in `metadata["tests"]` (forms: `code_rows`). Leaves out named
sets (`sets`), grading, and CSV.
"""

import dataclasses
import decimal
import gzip
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.prompts import MATH_INSTRUCTION, code_instruction, instructed

Row = Mapping[str, Any]
PROMPT_FIELDS = ("problem", "question", "prompt", "text", "content")
ANSWER_FIELDS = ("answer", "final_answer", "gold", "solution")
ID_FIELDS = ("id", "unique_id", "question_id", "task_id", "uuid", "problem_idx")
SUFFIXES = (".jsonl", ".json", ".parquet")
_LONGEST_FIELD = 200  # characters of a field that is kept as metadata
_WHOLE_FIELDS = ("solution", "demonstration")  # kept at any length: SFT and SDFT read them


class BadRow(ValueError):
    """A row that gives no question; the message is the reason, in one line, which `prepare` counts."""


@dataclasses.dataclass(frozen=True)
class FieldMapping:
    """Which fields of a row make a question; an empty name takes the first usual one that a row has."""

    prompt: Annotated[str, "field with the problem; empty: problem, question, prompt, text or content"] = ""
    answer: Annotated[str, "field with the answer; empty: answer, final_answer, gold or solution"] = ""
    id: Annotated[str, "field with the id; empty: id, unique_id, ..., else the row's number"] = ""
    tests: Annotated[str, "field with the tests of programming problems"] = "tests"
    kind: Annotated[Literal["math", "code"], "which verifier grades the responses"] = "math"
    language: Annotated[str, "programming language asked for where the tests name none: python or cpp"] = "python"


def read_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl, .json (an array, or one object) or .parquet file; the first two also as .gz.

    Raises: UserError for a missing file, another suffix, a broken file, or a broken line, with its number.
    """
    path = Path(os.path.expanduser(path))
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if kind not in SUFFIXES or (kind == ".parquet" and path.suffix == ".gz"):
        raise UserError(f"{path}: unknown suffix {''.join(path.suffixes)!r}; wanted {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            if kind == ".json":
                value = _json(handle.read(), str(path))
                rows = enumerate(value if isinstance(value, list) else [value], start=1)
            else:
                lines = (pair for pair in enumerate(handle, start=1) if pair[1].strip())
                rows = ((number, _json(line, f"{path}, line {number}")) for number, line in lines)
            for number, row in rows:
                if not isinstance(row, dict):
                    raise UserError(f"{path}, row {number}: {type(row).__name__}; wanted a JSON object")
                yield row
    except (EOFError, OSError, zlib.error) as error:  # cut or damaged, or no gzip file at all
        raise UserError(f"{path}: cannot be read ({error})") from None


def _json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):  # rows can hold megabytes of tests
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a whole Parquet file ({str(error).splitlines()[0]})") from None


def read_questions(path: str | Path, mapping: FieldMapping = FieldMapping(), name: str = "") -> list[Question]:
    """The questions of a file, in its order, problems bare of instructions.

    Args:
      path: see `read_rows`.
      mapping: which fields to read.
      name: starts the ids, "NAME-ID"; the file's name by default.
    Raises: UserError that names file and row for a missing field, an empty answer or a repeated id.
    """
    path = Path(os.path.expanduser(path))
    name = name or path.name.split(".")[0]
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_rows(path), start=1):
        try:
            question = question_of(row, mapping, name, number)
        except BadRow as error:
            raise UserError(f"{path}, row {number}: {error}; its fields are {', '.join(row)}") from None
        if question.id in questions:
            raise UserError(f"{path}, row {number}: id {question.id!r} occurs twice; set the mapping's id field")
        questions[question.id] = question
    if not questions:
        raise UserError(f"{path}: no rows")
    return list(questions.values())


def question_of(row: Row, mapping: FieldMapping, name: str, number: int) -> Question:
    """One row as a Question. Raises: BadRow."""
    prompt_field = field_of(row, mapping.prompt, PROMPT_FIELDS, "problem")
    prompt = row[prompt_field]
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadRow(f"field {prompt_field!r} holds no text")
    row_id = row.get(mapping.id) if mapping.id else next((row[f] for f in ID_FIELDS if row.get(f) is not None), None)
    if mapping.id and row_id is None:
        raise BadRow(f"no id field {mapping.id!r}")
    question_id = f"{name}-{number - 1:06d}" if row_id is None else f"{name}-{row_id}"
    metadata = plain_fields(row, leave_out={prompt_field})
    metadata |= {name: row[name] for name in _WHOLE_FIELDS if isinstance(row.get(name), str) and name != prompt_field}
    if mapping.kind == "code":
        from sdzero_jax.data.code_rows import own_tests

        if not row.get(mapping.tests):
            raise BadRow(f"no tests in field {mapping.tests!r}")
        tests = own_tests(row[mapping.tests], row, mapping.language)
        metadata |= {"language": tests["language"], "tests": tests}
        return Question(question_id, prompt.strip(), (), "code", metadata)
    answer_field = field_of(row, mapping.answer, ANSWER_FIELDS, "answer")
    gold = gold_answers(row[answer_field], must_be_boxed=answer_field == "solution")
    metadata.pop(answer_field, None)
    solution = row.get("solution") or (row[answer_field] if "####" in str(row[answer_field]) else None)
    if isinstance(solution, str):
        metadata["solution"] = solution
    return Question(question_id, prompt.strip(), gold, "math", metadata)


def field_of(row: Row, wanted: str, usual: Sequence[str], meaning: str) -> str:
    """The name of the field to read: `wanted`, or the first usual one with a value. Raises: BadRow."""
    names = (wanted,) if wanted else usual
    for name in names:
        if row.get(name) is not None:
            return name
    raise BadRow(f"no {meaning} field (wanted {' or '.join(names)})")


def plain_fields(row: Row, leave_out: set[str]) -> dict[str, Any]:
    """The short scalar fields of a row (level, subject, source ...), kept as metadata."""
    return {
        name: value
        for name, value in row.items()
        if name not in leave_out
        and (isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= _LONGEST_FIELD))
    }


def gold_answers(value: Any, must_be_boxed: bool = False) -> tuple[str, ...]:
    """Every accepted answer that a field spells.

    A list gives one answer per entry. Text gives what follows the last `####` (without thousands'
    commas: these answers are numbers), else its last \\boxed, else itself; whole floats lose ".0".
    Raises: BadRow for an empty answer, one that is no text or number, or text without a box where
      one `must_be_boxed`.
    """
    if isinstance(value, list | tuple):
        answers = tuple(dict.fromkeys(answer for entry in value for answer in gold_answers(entry, must_be_boxed)))
        if not answers:
            raise BadRow("empty answer")
        return answers
    if isinstance(value, bool) or not isinstance(value, str | int | float | decimal.Decimal):
        raise BadRow(f"answer is {type(value).__name__}; wanted text, a number or a list of them")
    if isinstance(value, float | decimal.Decimal) and not math.isfinite(value):
        raise BadRow(f"answer is {value}; wanted a finite number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if "####" in text:
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.rsplit("####", 1)[1].strip())
    else:
        boxed = last_boxed(text)
        if boxed is None and must_be_boxed:
            raise BadRow("solution without a boxed answer")
        text = text if boxed is None else boxed
    if not text:
        raise BadRow("empty answer")
    return (text,)


def last_boxed(text: str) -> str | None:
    """The contents of the last \\boxed or \\fbox of a reference solution, "\\boxed 5" included.

    For trusted solutions only: what a model wrote is the verifier's to read.
    """
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].split("box", 1)[1].removeprefix("ed")
    if not rest.lstrip().startswith("{"):
        word = re.match(r"\s*([^\s$.,]+)", rest)
        return word.group(1) if word else None
    rest, depth = rest.lstrip(), 0
    for position, character in enumerate(rest):
        escaped = position > 0 and rest[position - 1] == "\\"
        depth += (character == "{" and not escaped) - (character == "}" and not escaped)
        if depth == 0:
            return rest[1:position].strip()
    return None


def with_instruction(question: Question) -> Question:
    """The question as every stage asks it: the problem, then its kind's instruction exactly once."""
    if question.kind == "code":
        tests = question.metadata["tests"]
        style = "stdio" if tests["style"] == "stdio" else "function"
        instruction = code_instruction(question.metadata["language"], style)
        return dataclasses.replace(question, prompt=instructed(question.prompt, instruction, "\n\n"))
    return dataclasses.replace(question, prompt=instructed(question.prompt, MATH_INSTRUCTION))


def split_by_id(questions: Sequence[Question], shares: Mapping[str, float], seed: int = 0) -> dict[str, list[Question]]:
    """Deals questions into splits by a hash of their ids: stable when questions are added or reordered.

    Args:
      shares: split -> share; they must sum to 1. Sizes follow them as coin flips would.
    Raises: UserError for shares outside [0, 1] or another sum.
    """
    if any(not 0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-9:
        raise UserError(f"shares {dict(shares)} of a split; wanted numbers in [0, 1] that sum to 1")
    splits: dict[str, list[Question]] = {name: [] for name in shares}
    for question in questions:
        digest = hashlib.sha256(f"{seed}/{question.id}".encode()).digest()
        point, chosen = int.from_bytes(digest[:8]) / 2**64, None
        for name, share in shares.items():
            if share > 0:
                chosen = name  # the last split with a share takes what rounding leaves
                if point < share:
                    break
            point -= share
        splits[chosen].append(question)
    return splits
