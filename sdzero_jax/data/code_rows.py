"""Tests of programming problems, from the forms that public sets and files of one's own use.

`metadata["tests"]` of a code question is one of the forms that the judge reads:
  {"style": "stdio", "cases": [{"input", "output"}, ...], "generated_checker": program}
      the program reads input and writes output; the checker is called with INPUT REFERENCE SUBMISSION
  {"style": "assert", "test_list": [code, ...], "test_setup_code": code}          MBPP
  {"style": "assert", "prompt", "test", "entry_point" or "declaration"}           HumanEval, HumanEval-X
      the tests call the program's functions, or are a C++ main compiled after it
  {"style": "call", "fn_name": name, "cases": [{"input", "output"}, ...]}         LiveCodeBench
      Solution().name (or name) on one JSON value per line of input gives output, JSON too
  {"style": any of these, "tests": what a row of one's own holds}
and may hold "time_limit" (seconds), "memory_limit" (MB) and "language": what was asked for, so that a
fenced block without a name is read in it. Nothing here runs a program,
and what is pickled in a row is read without the power to call anything.
"""

import base64
import io
import json
import math
import pickle
import re
import zlib
from collections.abc import Mapping
from typing import Any

from sdzero_jax.data.questions import BadRow, Row, plain_fields
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.verifiers.code_tests import BadTests, parse_tests

LARGEST_TESTS = 1 << 30  # bytes after decompression


def own_tests(value: Any, row: Row, language: str) -> dict[str, Any]:
    """What a row of one's own holds as tests, in any form that `verify` takes. Raises: as `readable`."""
    if isinstance(value, Mapping):
        _judging(value)
    return readable({"tests": value, **_judging(row)}, language)


def readable(tests: dict[str, Any], language: str) -> dict[str, Any]:
    """Tests with their style and language (`language` where they name none), once the judge can read them.

    Raises: BadRow where it cannot, or finds no test: such a problem would accept every program, or none.
    """
    try:
        parsed = parse_tests(tests)
    except (BadTests, UserError) as error:
        reason = " ".join(str(error).removeprefix("BadTests: ").split())
        raise BadRow(f"unusable tests ({reason})") from None
    style = "stdio" if parsed.cases else "call" if parsed.calls else "assert"
    return {"style": style, **tests, "language": parsed.language or language}


def _judging(row: Row) -> dict[str, Any]:
    """How a row wants its tests judged: its limits, which must be positive numbers, and its checker."""
    given = {name: row[name] for name in ("time_limit", "memory_limit") if row.get(name) is not None}
    for name, value in given.items():
        try:
            good = not isinstance(value, bool) and 0 < float(value) < math.inf
        except (TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise BadRow(f"{name} is {value!r}; wanted a positive number")
    return given | ({"generated_checker": row["generated_checker"]} if row.get("generated_checker") else {})


def human_eval(row: Row, name: str) -> Question:
    """HumanEval and HumanEval-X (Python, C++): complete the function whose head is given."""
    language = "cpp" if row["task_id"].startswith("CPP/") else "python"
    fields = ("prompt", "test", "entry_point" if "entry_point" in row else "declaration")
    tests = {"style": "assert", **{field: row[field] for field in fields}}
    prompt = f"Complete this function.\n\n```{language}\n{row['prompt'].rstrip()}\n```"
    metadata = {
        "language": language,
        "tests": tests,
        "solution": row["prompt"] + row["canonical_solution"],
    }
    return Question(f"{name}-{row['task_id']}", prompt, (), "code", metadata)


def mbpp(row: Row, name: str) -> Question:
    """MBPP: the shown tests name the function; hidden (challenge) tests are judged as well."""
    shown = "\n".join(row["test_list"])
    if not shown:
        raise BadRow("no tests")
    prompt = f"{row['text'].strip()}\n\nThe program must pass these tests:\n\n```python\n{shown}\n```"
    tests = {
        "style": "assert",
        "test_list": [*row["test_list"], *(row.get("challenge_test_list") or ())],
        "test_setup_code": row.get("test_setup_code") or "",
    }
    metadata = {"language": "python", "tests": tests, "solution": row["code"].replace("\r\n", "\n")}
    return Question(f"{name}-{row['task_id']}", prompt, (), "code", metadata)


def codeforces(row: Row, name: str, language: str) -> Question:
    """open-r1/codeforces and codeforces-cots rows; the statement comes without the sets' instructions."""
    if row.get("interaction_format"):
        raise BadRow("interactive problem")
    if row.get("input_mode") not in (None, "stdio"):
        raise BadRow("reads and writes files")
    tests = readable({"cases": row.get("official_tests") or row.get("examples"), **_judging(row)}, language)
    tests["complete"] = bool(row.get("official_tests_complete"))
    sections = [f"# {row.get('title') or row['id']}", row.get("description")]
    for title, field in (("Input", "input_format"), ("Output", "output_format"), ("Note", "note")):
        sections += [f"## {title}\n\n{row[field]}"] if row.get(field) else []
    for example in row.get("examples") or ():
        sections.append(f"## Example\n\nInput:\n```\n{example['input']}\n```\nOutput:\n```\n{example['output']}\n```")
    if not row.get("description"):
        raise BadRow("no statement")
    metadata = plain_fields(row, leave_out={"description", "input_format", "output_format", "note", "prompt"})
    metadata |= {"language": language, "tests": tests}
    if row.get("generation") and row.get("finish_reason") in (None, "stop"):
        metadata["demonstration"] = row["generation"]
    prompt = "\n\n".join(section.strip() for section in sections if section)
    return Question(f"{name}-{row['id']}-{language}", prompt, (), "code", metadata)


def live_code_bench(row: Row, name: str) -> Question:
    """LiveCodeBench rows as published (question_content ...) or packed by SandboxFusion (content, test)."""
    if "content" in row:
        body, starter = _sandbox_fusion_statement(row["content"])
        packed = unpickled(row["test"])["input_output"]
        packed = json.loads(packed) if isinstance(packed, str) else packed
        function = packed.get("fn_name")
        cases = [{"input": i, "output": o} for i, o in zip(packed["inputs"], packed["outputs"], strict=True)]
        labels = json.loads(row["labels"])
        row_id, metadata = labels["task_id"], {"difficulty": labels.get("difficulty")}
    else:
        body, starter = row["question_content"], row.get("starter_code") or ""
        private = row["private_test_cases"]
        try:
            private = json.loads(private)
        except ValueError:
            private = json.loads(unpickled(private))
        cases = [*json.loads(row["public_test_cases"]), *private]
        function = json.loads(row.get("metadata") or "{}").get("func_name")
        row_id = row["question_id"]
        metadata = {key: str(row[key]) for key in ("difficulty", "platform", "contest_date") if key in row}
    tests = readable({"cases": cases} | ({"fn_name": function} if function else {}), "python")
    if function:
        body = f"{body.strip()}\n\nUse this head.\n\n```python\n{starter.rstrip()}\n```"
    return Question(f"{name}-{row_id}", body.strip(), (), "code", metadata | {"language": "python", "tests": tests})


def _sandbox_fusion_statement(content: str) -> tuple[str, str]:
    """(statement, starter code) without the wrapper's own instructions."""
    body = content.split("### Question:\n", 1)[-1].split("\n### Format:", 1)[0]
    starter = re.search(r"```python\n(.*?)```", content.split("### Format:", 1)[-1], re.S)
    return body.replace("\r\n", "\n"), starter.group(1) if starter else ""


class _NoCalls(pickle.Unpickler):
    """Reads plain values; a pickle that names a class or function is refused before anything is called."""

    def find_class(self, module: str, name: str) -> Any:
        raise BadRow("tests hold a pickle that calls code")


def unpickled(text: str) -> Any:
    """base64(zlib(pickle(plain value))), the form of LiveCodeBench's tests. Raises: BadRow."""
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(text), LARGEST_TESTS)
        if inflater.unconsumed_tail:
            raise BadRow("tests too large")
        return _NoCalls(io.BytesIO(data)).load()
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError) as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("tests cannot be unpacked") from None
