"""Extraction, comparison, forms of tests and verdicts of the code judge, on small real data."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdzero_jax.errors import UserError
from sdzero_jax.verifiers import code, sandbox
from sdzero_jax.verifiers.checkers import checker_says, outputs_equal
from sdzero_jax.verifiers.code import Limits, judge_code, judge_many, judge_report
from sdzero_jax.verifiers.code_tests import BadTests, CodeTests, parse_tests
from sdzero_jax.verifiers.fences import Program, blocks, last_program

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data/code"
needs_bwrap = pytest.mark.skipif(
    not (sys.platform == "linux" and sandbox.find_sandbox()),
    reason="bubblewrap is not installed or not allowed here",
)
needs_cpp = pytest.mark.skipif(not shutil.which("g++"), reason="g++ is not installed")
ADD_ONE = [{"input": "41\n", "output": "42\n"}, {"input": "1\n", "output": "2\n"}]
LIMITS = Limits(time_s=3.0)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def fenced(text: str, language: str = "python") -> str:
    return f"Some words.\n```{language}\n{text}\n```\nMore words.\n"


# --- fences -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "wanted"),
    [
        ("no program here: print(1)", None),
        ("`print(1)`", None),
        ("```print(1)```", None),
        ("```\nprint(1)\n```", None),
        ("```json\n{}\n```", None),
        ("```python\na\n```", ("python", "a\n", "17")),
        ("```Python3 title=x\na\n```", ("python", "a\n", "17")),
        ("```{.python}\na\n```", ("python", "a\n", "17")),
        ("~~~py\na\n```\n~~~", ("python", "a\n```\n", "17")),
        ("````python\n```\n````", ("python", "```\n", "17")),
        ("```python\na\n```\n```cpp\nb\n```", ("cpp", "b\n", "17")),
        ("```cpp\nb\n```\n```text\nout\n```", ("cpp", "b\n", "17")),
        ("```c++20\nb\n```", ("cpp", "b\n", "20")),
        ("```cc\nb", ("cpp", "b\n", "17")),
        ("```c\nb\n```", None),
        ("```python\na\n```\n```python\nb", ("python", "b\n", "17")),
        ("```python\nprint(1)```", ("python", "print(1)\n", "17")),
        ("- step\n  ```python\n  if a:\n    b\n  ```", ("python", "if a:\n  b\n", "17")),
        ("<think>```python\na\n```</think> I give up", None),
        ("<think>```python\na</think>```python\nb\n```", ("python", "b\n", "17")),
        ("```python\r\na\r\n```\r\n", ("python", "a\n", "17")),
    ],
)
def test_last_program(response, wanted):
    found = last_program(response)
    assert (found and (found.language, found.code, found.standard)) == wanted


def test_a_fence_without_a_name_counts_where_the_question_names_the_language():
    assert last_program("```\na\n```", "cpp") == Program("cpp", "a\n")
    assert last_program("```python\na\n```\n```\nb\n```", "cpp") == Program("python", "a\n")
    assert [block.closed for block in blocks("```\n```\n```\n")] == [True, False]


# --- comparison -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected", "actual", "same"),
    [
        ("lines", "1 2 \n3\n\n", "1 2\r\n3", True),
        ("lines", "1 2\n", " 1 2\n", False),
        ("lines", "1\n2\n", "1 2\n", False),
        ("lines", "1\n\n2", "1\n2", False),
        ("tokens", "1\n2\n", "1 2\r\n", True),
        ("tokens", "1 2", "1 2 3", False),
        ("tokens", "0.5", "0.50", False),
        ("tokens", "a b", "a\u00a0b", False),
        ("tokens", "\ufffd", b"\xff", False),
        ("tokens", b"\xff", b"\xff", True),
        ("floats", "0.5", "0.5000001", True),
        ("floats", "0.5", "0.500002", False),
        ("floats", "1e9", "1000000000", True),
        ("floats", "1000000.5", "1000001.0", True),
        ("floats", "1000000.5", "1000002.0", False),
        ("floats", "1000000", "1000001", False),
        ("floats", "1.0", "nan", False),
        ("floats", "1.0", "1_0", False),
        ("floats", "1e999", "2e999", False),
        ("floats", "Case #1: 0.25", "Case #1: .25", True),
    ],
)
def test_outputs_equal(mode, expected, actual, same):
    assert outputs_equal(expected, actual, mode) is same


def test_unknown_comparison_is_named():
    with pytest.raises(UserError, match=r"'token'.*did you mean 'tokens'"):
        outputs_equal("", "", "token")


@pytest.mark.parametrize(
    ("stdout", "status", "says"),
    [
        (b"1\n", 0, True),
        (b"0", 0, False),
        (b"0.5", 0, False),
        (b"1.0", 0, True),
        (b"", 0, True),
        (b"", 1, False),
        (b"", 3, None),
        (b"ok", 0, None),
        (b"1", 1, None),
    ],
)
def test_checker_says(stdout, status, says):
    assert checker_says(stdout, status) is says


# --- forms of tests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        [],
        {},
        "",
        "[]",
        "not json",
        None,
        7,
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        [{"input": "1"}],
        [{"input": 1, "output": 2}],
        {"test_list": []},
        {"test_list": ["f(1)"]},
        {"test_list": ["assert ("]},
        {"tests": [], "time_limit": 1},
        [{"input": "1", "output": "1", "testtype": "functional"}],
        {"entry_point": "f", "test": "pass"},
        {"tests": ADD_ONE, "time_limit": -1},
        {"tests": ADD_ONE, "language": "perl"},
    ],
)
def test_unusable_tests_are_never_passed(raw):
    with pytest.raises(BadTests):
        parse_tests(raw)
    assert judge_code(fenced("print(1)"), raw).outcome == "gold_unparseable"


def test_forms_of_tests():
    cases = parse_tests(ADD_ONE).cases
    assert [(case.input, case.output) for case in cases] == [("41\n", "42\n"), ("1\n", "2\n")]
    pairs = {"inputs": ["41\n", "1\n"], "outputs": ["42\n", "2\n"]}
    for raw in (
        json.dumps(ADD_ONE),
        {"official_tests": ADD_ONE},
        pairs,
        {"input_output": json.dumps(pairs)},
        [{"input": {"stdin": t["input"]}, "output": {"stdout": t["output"]}} for t in ADD_ONE],
    ):
        assert parse_tests(raw).cases == cases
    calls = parse_tests({"inputs": ["[1, 2]\n3"], "outputs": ["4"], "fn_name": "f"})
    assert (calls.calls, calls.entry) == ((((([1, 2]), 3), 4),), "f")
    with_limits = parse_tests({"tests": ADD_ONE, "time_limit": "2.5", "memory_limit": 64, "comparison": "lines"})
    assert (with_limits.time_limit, with_limits.memory_limit, with_limits.comparison) == (2.5, 64.0, "lines")
    samples = [parse_tests(row["test"]) for row in rows("livecodebench_samples.jsonl")]
    assert [bool(tests.cases) for tests in samples] == [True, False, True]
    assert samples[1].entry == "countSeniors"


def test_compressed_tests_cannot_call_anything():
    import base64
    import pickle
    import zlib

    class Call:
        def __reduce__(self):
            return (os.system, ("touch PWNED",))

    text = base64.b64encode(zlib.compress(pickle.dumps(Call()))).decode()
    with pytest.raises(BadTests):
        parse_tests(text)
    assert not Path("PWNED").exists()


# --- verdicts ---------------------------------------------------------------------------------------


def test_no_program_is_unparseable():
    assert judge_code("print(int(input()) + 1)", ADD_ONE).outcome == "unparseable"


@needs_bwrap
@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ("print(int(input()) + 1)", "correct", "2 tests"),
        ("print(int(input()) + 1, end='\\r\\n')", "correct", "2 tests"),
        ("print(42)", "wrong", "wrong_answer"),
        ("print(", "wrong", "compile_error"),
        ("1 / 0", "wrong", "runtime_error"),
        ("eval('(')", "wrong", "runtime_error"),
        ("while True: pass", "wrong", "time_limit"),
        ("x = bytearray(1 << 40)", "wrong", "memory"),
        ("while True: print('x' * 999999)", "wrong", "output_limit"),
    ],
)
def test_verdict_of_a_python_program(text, outcome, detail):
    verdict = judge_code(fenced(text), ADD_ONE, limits=Limits(time_s=1.0, output_bytes=10**6))
    assert (verdict.outcome, verdict.detail) == (outcome, detail)


@needs_bwrap
@needs_cpp
@pytest.mark.parametrize(
    ("text", "outcome", "detail"),
    [
        ('#include <cstdio>\nint main(){int n;scanf("%d",&n);printf("%d\\n",n+1);}', "correct", "2 tests"),
        ("int main(){return x;}", "wrong", "compile_error"),
        ("#include <cstdlib>\nint main(){abort();}", "wrong", "runtime_error"),
        (
            "#include <cstdlib>\nint main(){for(;;)for(char*p=new char[1<<24],*q=p;q<p+(1<<24);q+=64)*q=rand();}",
            "wrong",
            "memory",
        ),
    ],
)
def test_verdict_of_a_cpp_program(text, outcome, detail):
    verdict = judge_code(fenced(text, "c++"), ADD_ONE, limits=Limits(time_s=5.0, memory_mb=128))
    assert (verdict.outcome, verdict.detail) == (outcome, detail)


@needs_bwrap
def test_first_failure_stop_is_a_setting():
    tests = [{"input": "", "output": o, "name": o} for o in ("7", "8", "7")]
    stopped = judge_report(fenced("print(7)"), tests, limits=LIMITS)
    whole = judge_report(fenced("print(7)"), tests, limits=dataclasses.replace(LIMITS, first_failure_stop=False))
    assert [test.outcome for test in stopped.tests] == ["accepted", "wrong_answer"]
    assert [test.outcome for test in whole.tests] == ["accepted", "wrong_answer", "accepted"]
    assert stopped.verdict == whole.verdict
    assert stopped.verdict.detail == "wrong_answer"


@needs_bwrap
def test_limits_come_from_the_problem_scaled():
    burn = "import time\nwhile time.process_time() < 1.5: pass\nprint(7)"
    tests = {"tests": [{"input": "", "output": "7"}], "time_limit": 1.0}
    assert judge_code(fenced(burn), tests).detail == "time_limit"
    assert judge_code(fenced(burn), tests, limits=Limits(time_scale=3.0)).outcome == "correct"
    fill = "x = b'x' * (300 << 20)\nprint(7)"
    tests = {"tests": [{"input": "", "output": "7"}], "memory_limit": 100}
    assert judge_code(fenced(fill), tests).detail == "memory"
    assert judge_code(fenced(fill), tests, limits=Limits(memory_scale=5.0)).outcome == "correct"


@needs_bwrap
def test_the_judges_own_failure_is_an_error(monkeypatch):
    def broken(*_, **__):
        raise sandbox.SandboxError("no namespaces left")

    monkeypatch.setattr(sandbox.Sandbox, "run", broken)
    verdict = judge_code(fenced("print(1)"), ADD_ONE)
    assert (verdict.outcome, verdict.reward) == ("error", None)


def test_refusal_is_an_error_of_the_user(monkeypatch):
    monkeypatch.setattr(sandbox, "find_sandbox", lambda python="": None)
    with pytest.raises(UserError, match="bubblewrap"):
        judge_code(fenced("print(1)"), ADD_ONE)
    with pytest.raises(UserError, match="bubblewrap"):
        list(judge_many([(fenced("print(1)"), ADD_ONE)]))


def test_bad_limits_are_named():
    with pytest.raises(UserError, match=r"limits.memory_mb is 0"):
        Limits(memory_mb=0)


@needs_bwrap
def test_many_in_order():
    items = [(fenced(f"print({n})"), [{"input": "", "output": str(n if n % 3 else -1)}]) for n in range(20)]
    outcomes = [report.verdict.outcome for report in judge_many(iter(items), limits=LIMITS)]
    assert outcomes == ["correct" if n % 3 else "wrong" for n in range(20)]


@needs_bwrap
def test_checker_programs_say_what_is_recorded():
    for row in rows("generated_checkers.jsonl"):
        for case in row["cases"]:
            tests = {
                "tests": [{"input": case["input"], "output": case["reference_output"]}],
                "generated_checker": row["generated_checker"],
            }
            verdict = judge_code(fenced(f"print({case['submission_output']!r}, end='')"), tests, limits=LIMITS)
            assert verdict.outcome == ("correct" if case["checker_stdout"] == "1" else "wrong"), (
                row["name"],
                case,
            )


@needs_bwrap
def test_a_broken_checker_is_an_error_and_one_that_stumbles_over_nonsense_rejects():
    tests = {"tests": [{"input": "", "output": "5"}], "checker": "import sys\nraise SystemExit(9)\n"}
    assert judge_code(fenced("print(5)"), tests).outcome == "error"
    tests["checker"] = "import sys\nprint(int(int(open(sys.argv[3]).read()) == int(open(sys.argv[2]).read())))\n"
    assert judge_code(fenced("print(5)"), tests).outcome == "correct"
    assert judge_code(fenced("print('five')"), tests).outcome == "wrong"


# --- function style ---------------------------------------------------------------------------------


@needs_bwrap
def test_functions_of_real_sets_are_judged_right_and_broken_ones_wrong():
    items, wanted = [], []
    for row in rows("humaneval.jsonl"):
        whole = row["prompt"] + row["canonical_solution"]
        broken = whole.replace("return ", "return None and ")
        items += [
            (fenced(whole), row),
            (fenced(row["canonical_solution"].rstrip()), row),
            (fenced(broken), row),
        ]
        wanted += ["correct", "correct", "wrong"]
    for row in rows("mbpp.jsonl"):
        items += [(fenced(row["code"]), row), (fenced("def unrelated(): pass"), row)]
        wanted += ["correct", "wrong"]
    for row in rows("humaneval_x.jsonl"):
        if row["task_id"].startswith("Python"):
            items.append((fenced(row["prompt"] + row["canonical_solution"]), row))
            wanted.append("correct")
    got = [report.verdict.outcome for report in judge_many(items, limits=LIMITS)]
    assert got == wanted


@needs_bwrap
@needs_cpp
@pytest.mark.slow
def test_cpp_functions_of_humaneval_x():
    given = [r for r in rows("humaneval_x.jsonl") if r["task_id"].startswith("CPP")]
    given = [r for r in given if r["task_id"] not in ("CPP/22", "CPP/162")]  # need boost and openssl
    items = [(fenced(r["canonical_solution"], "cpp"), r) for r in given]
    items += [(fenced(r["prompt"] + r["canonical_solution"], "cpp"), r) for r in given]
    items += [(fenced(r["prompt"] + "return {};}", "cpp"), r) for r in given]
    got = [report.verdict.outcome for report in judge_many(items, limits=LIMITS)]
    assert got == ["correct"] * 2 * len(given) + ["wrong"] * len(given)


@needs_bwrap
def test_methods_of_a_solution_class_with_plain_values():
    answers = json.loads((DATA / "livecodebench_fewshot_func.json").read_text())
    start = "from typing import List\n"
    tests = {"inputs": ["[4,4,2,4,3]", "[1,1,1,1,1]"], "outputs": ["3", "0"], "fn_name": "unequalTriplets"}
    assert judge_code(fenced(start + answers[0]["answer"]), tests, limits=LIMITS).outcome == "correct"
    tests["outputs"] = ["3", "1"]
    assert judge_code(fenced(start + answers[0]["answer"]), tests, limits=LIMITS).detail == "wrong_answer"


@needs_bwrap
@pytest.mark.parametrize(
    "value",
    [
        "1 << 4000",
        "-0.0",
        "float('inf')",
        "1j",
        "'\\ud800'",
        "b'\\xff'",
        "(1, [2])",
        "{1, (2, 3)}",
        "{(1,): {2: 3}}",
        "range(3)",
        "None",
        "frozenset({1})",
        "__import__('collections').Counter('aab')",
        "__import__('decimal').Decimal('0.1')",
        "__import__('fractions').Fraction(1, 3)",
        "__import__('datetime').date(2020, 1, 2)",
        "[[], {}, ()]",
    ],
)
def test_values_cross_unchanged(value):
    checks = [
        f"assert same({value}) == {value}",
        f"assert type(same({value})) is type({value})",
        f"assert same(0) != {value} or {value} == 0",
    ]
    verdict = judge_code(fenced("def same(x): return x"), {"test_list": checks}, limits=LIMITS)
    assert verdict.outcome == "correct", verdict


# --- recorded verdicts ------------------------------------------------------------------------------


def benchmark():
    spec = importlib.util.spec_from_file_location("judge_benchmark", ROOT / "benchmarks/judge.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_bwrap
@needs_cpp
@pytest.mark.slow
def test_recorded_verdicts_of_the_small_sets():
    judge = benchmark()
    judge.rows = lambda folder, name: rows(re.sub(r".*/|_stdio|_cpp|\.gz", "", name))
    for name in ("gcj_kickstart", "library_checker", "code_contests"):
        done = judge.sweep(None, name, Limits(first_failure_stop=False))
        assert done["programs"] > 2
        assert done["other"] == 0, done["differences"]


@needs_bwrap
@needs_cpp
@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SDZERO_DATA"), reason="SDZERO_DATA names no folder of larger test sets")
@pytest.mark.parametrize(
    "name",
    [
        "humaneval",
        "humaneval_x_python",
        "humaneval_x_cpp",
        "mbpp",
        "livecodebench",
        "gcj_kickstart",
        "library_checker",
        "kattis",
        "code_contests",
        "codeforces",
    ],
)
def test_whole_sets(name):
    done = benchmark().sweep(Path(os.environ["SDZERO_DATA"]), name, Limits(first_failure_stop=False))
    assert done["programs"] > 0
    assert done["other"] == 0, done["differences"]


def test_the_judge_loads_no_jax():
    code_ = "import sys; import sdzero_jax.verifiers.code; print('jax' in sys.modules, 'numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code_], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_every_limit_has_a_help_text_and_is_read():
    source = Path(code.__file__).read_text()
    for field in dataclasses.fields(Limits):
        assert Limits.__annotations__[field.name].__metadata__[0]
        assert f"limits.{field.name}" in source.replace("limits.{field.name}", "")


def test_tests_of_two_styles_are_refused():
    with pytest.raises(BadTests):
        CodeTests(asserts=("assert True",), cpp_test="int main(){}")
