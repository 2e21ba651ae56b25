"""The tests of a programming question, in one form, read from the forms that data sets use.

Read: lists of {input, output} (open-r1 codeforces, LiveCodeBench, SandboxFusion's {stdin}/{stdout}),
{inputs, outputs} with or without fn_name (CodeContests, TACO, LiveCodeBench), MBPP's test_list,
lists of assert statements, HumanEval and HumanEval-X rows, any of these as JSON text or in
LiveCodeBench's compressed form. Malformed or empty tests raise BadTests: nothing passes with zero tests run.
"""

import ast
import base64
import builtins
import dataclasses
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.verifiers.checkers import MODES
from sdzero_jax.verifiers.fences import Program, language_of


class BadTests(ValueError):
    """The tests of a question cannot be used."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of a program: what it reads and what it should print."""

    input: str
    output: str
    name: str = ""


@dataclasses.dataclass(frozen=True)
class CodeTests:
    """The tests of one question; exactly one of cases, asserts, calls and cpp_test is given.

    cases: standard input and output, compared by `comparison` or by the program `checker`.
    asserts: Python sources run against the program's functions after `setup`; `entry` is the function
    under test and `reference` source that comes before the program (HumanEval's prompt).
    calls: (arguments, expected value) of the function or Solution method `entry`.
    cpp_test: C++ source with a main, compiled after `reference` and the program (HumanEval-X).
    time_limit in seconds, memory_limit in MiB, None: the judge's defaults.
    """

    cases: tuple[Case, ...] = ()
    comparison: str = "tokens"
    checker: Program | None = None
    asserts: tuple[str, ...] = ()
    setup: str = ""
    calls: tuple[tuple[tuple, Any], ...] = ()
    cpp_test: str = ""
    entry: str = ""
    reference: str = ""
    language: str | None = None
    time_limit: float | None = None
    memory_limit: float | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if sum(map(bool, (self.cases, self.asserts, self.calls, self.cpp_test))) != 1:
            raise BadTests("at least one test is required, all of one style")
        if self.comparison not in MODES:
            choices = f"{', '.join(MODES)}{nearest(self.comparison, MODES)}"
            raise UserError(f"comparison is {self.comparison!r}, not one of {choices}")


def parse_tests(raw: Any) -> CodeTests:
    """Returns the tests in the judge's form. Raises BadTests."""
    if isinstance(raw, CodeTests):
        return raw
    try:
        return CodeTests(**_fields(raw))
    except UserError:
        raise
    except Exception as error:  # data of unknown shape: any failure means that it cannot be read
        raise BadTests(f"{type(error).__name__}: {error}"[:300]) from error


def _fields(raw: Any) -> dict[str, Any]:
    if isinstance(raw, str):
        return _fields(_load(raw))
    if isinstance(raw, (list, tuple)):
        return _from_list(raw, {})
    if not isinstance(raw, Mapping):
        raise BadTests(f"tests are a {type(raw).__name__}, not a list, a mapping or JSON text")
    options = _options(raw)
    if "test_list" in raw:
        return _from_asserts(raw["test_list"], raw.get("test_setup_code") or "") | options
    if "entry_point" in raw or "declaration" in raw:
        return _from_humaneval(raw) | options
    if "inputs" in raw:
        inputs, outputs = raw["inputs"], raw["outputs"]
        if len(inputs) != len(outputs):
            raise BadTests(f"{len(inputs)} inputs but {len(outputs)} outputs")
        rows = [{"input": i, "output": o} for i, o in zip(inputs, outputs)]
        return _from_list(rows, raw) | options
    for name in ("official_tests", "tests", "test_cases", "cases", "input_output", "test"):
        if raw.get(name):
            inner = raw[name]
            if isinstance(inner, (list, tuple)):
                return _from_list(inner, raw) | options
            return _fields(inner) | options
    raise BadTests(f"no tests among the fields {', '.join(map(str, raw))[:200]}")


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    data = zlib.decompress(base64.b64decode(text))
    loaded = _PlainUnpickler(io.BytesIO(data)).load()
    return json.loads(loaded) if isinstance(loaded, str) else loaded


class _PlainUnpickler(pickle.Unpickler):
    """Strings, numbers and containers only: no name is ever looked up, so nothing can be called."""

    def find_class(self, module, name):
        raise BadTests(f"tests hold an object of {module}.{name}")


def _options(raw: Mapping) -> dict[str, Any]:
    options: dict[str, Any] = {}
    checker = raw.get("generated_checker") or raw.get("checker")
    if isinstance(checker, Mapping):
        known = language_of(checker["language"])
        if known is None:
            raise BadTests(f"a checker in {checker['language']!r}")
        options["checker"] = Program(known[0], checker["code"], known[1])
    elif isinstance(checker, str) and "\n" in checker:
        options["checker"] = Program("python", checker)
    for name in ("time_limit", "memory_limit"):
        if raw.get(name):
            options[name] = float(raw[name])
            if not options[name] > 0:
                raise BadTests(f"{name} is {raw[name]}, not a positive number")
    if raw.get("language"):
        known = language_of(raw["language"])
        if known is None:
            raise BadTests(f"language {raw['language']!r} is not Python or C++")
        options["language"] = known[0]
    if raw.get("comparison"):
        options["comparison"] = raw["comparison"]
    if raw.get("headers"):
        options["headers"] = dict(raw["headers"])
    return options


def _from_list(rows: list | tuple, around: Mapping) -> dict[str, Any]:
    if rows and all(isinstance(row, str) for row in rows):
        return _from_asserts(rows, "")
    entry = around.get("fn_name") or around.get("func_name") or ""
    kinds = {row.get("testtype", "stdin") for row in rows}
    if entry or kinds == {"functional"}:
        if not entry:
            raise BadTests("functional tests without the function's name (fn_name)")
        return {"calls": tuple(_call(row) for row in rows), "entry": entry, "language": "python"}
    if kinds - {"stdin"}:
        raise BadTests(f"test types {sorted(kinds)}")
    return {"cases": tuple(_case(row, number) for number, row in enumerate(rows))}


def _case(row: Mapping, number: int) -> Case:
    given, expected = row["input"], row["output"]
    if isinstance(given, Mapping):
        given, expected = given["stdin"], expected["stdout"]
    texts = []
    for value in (given, expected):
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
        if not isinstance(value, str):
            raise BadTests(f"test {number} holds a {type(value).__name__}, not text")
        texts.append(value)
    return Case(*texts, name=str(row.get("name", number)))


def _call(row: Mapping) -> tuple[tuple, Any]:
    given, expected = row["input"], row["output"]
    if isinstance(given, str):
        given = [json.loads(line) for line in given.split("\n") if line.strip()]
    if isinstance(expected, str):
        expected = json.loads(expected)
    return tuple(given), expected


def _from_asserts(sources: list | tuple, setup: str) -> dict[str, Any]:
    called: dict[str, int] = {}
    for source in sources:
        if not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(source))):
            raise BadTests(f"a test without an assert: {source[:80]!r}")
        names = (n.func.id for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and hasattr(n.func, "id"))
        for name in dict.fromkeys(names):
            called[name] = called.get(name, 0) + 1
    # The function under test is the one that every test calls; a name of Python's only if no other is.
    entry = max(called, key=lambda n: (not hasattr(builtins, n), called[n]), default="")
    return {"asserts": tuple(sources), "setup": setup, "entry": entry, "language": "python"}


def _from_humaneval(row: Mapping) -> dict[str, Any]:
    test, prompt = row["test"], row.get("prompt", "")
    if "#include" in test:
        if "assert" not in test:
            raise BadTests("a C++ test without an assert")
        return {"cpp_test": test, "reference": prompt, "language": "cpp"}
    entry = row.get("entry_point") or _last_function(row["declaration"])
    if "def check(" not in test or "assert" not in test:
        raise BadTests("a test without a check function")
    if "entry_point" in row:
        test += f"\ncheck({entry})\n"
    return {"asserts": (test,), "entry": entry, "reference": prompt, "language": "python"}


def _last_function(declaration: str) -> str:
    return declaration.rpartition("def ")[2].partition("(")[0].strip()
