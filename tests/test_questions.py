"""Questions from files: fields, answers, tests of programming problems."""

import base64
import gzip
import json
import math
import os
import pickle
import zlib

import pytest

from sdzero_jax.data import FieldMapping, read_questions, with_instruction
from sdzero_jax.data.code_rows import codeforces, live_code_bench, own_tests, unpickled
from sdzero_jax.data.questions import BadRow, gold_answers, last_boxed, read_rows
from sdzero_jax.errors import UserError
from sdzero_jax.problems import demonstration
from sdzero_jax.verifiers.code_tests import Case, CodeTests, parse_tests
from sdzero_jax.verifiers.fences import Program
from tests.rows import write

# Files and fields

ROWS = [{"problem": "1+1?", "answer": "2", "level": 3}, {"problem": "2+2?", "answer": 4.0, "level": 1}]


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json", "q.json.gz", "q.parquet"])
def test_every_form_of_file_gives_the_same_questions(tmp_path, name):
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS] if name == "q.parquet" else ROWS
    questions = read_questions(write(tmp_path / name, rows))
    assert [q.id for q in questions] == ["q-000000", "q-000001"]
    assert [q.prompt for q in questions] == ["1+1?", "2+2?"]
    assert questions[0].gold == ("2",) and questions[0].kind == "math" and questions[0].metadata == {"level": 3}
    assert questions[1].gold == (("4.0",) if name == "q.parquet" else ("4",))


def test_solutions_and_demonstrations_are_kept_whole(tmp_path):
    """SFT and SDFT read them; other long fields are no metadata."""
    program = "\n".join(f"x{number} = {number}" for number in range(100))
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    row = {"problem": "Add one.", "tests": tests, "solution": program, "notes": program}
    (question,) = read_questions(write(tmp_path / "q.jsonl", [row]), FieldMapping(kind="code"))
    assert question.metadata["solution"] == program and "notes" not in question.metadata
    assert program in demonstration(question)
    row = {"problem": "1+1?", "answer": "2", "demonstration": program}
    (question,) = read_questions(write(tmp_path / "m.jsonl", [row]))
    assert demonstration(question) == program


def test_a_mapping_names_the_fields(tmp_path):
    rows = [{"task": "1+1?", "reply": "two", "key": 7, "problem": "no", "answer": "no", "id": "no"}]
    mapping = FieldMapping(prompt="task", answer="reply", id="key")
    (question,) = read_questions(write(tmp_path / "q.jsonl", rows), mapping, name="mine")
    assert (question.id, question.prompt, question.gold) == ("mine-7", "1+1?", ("two",))


@pytest.mark.parametrize(
    ("rows", "mapping", "words"),
    [
        ([{"problem": "x"}], {}, "row 1: no answer field .wanted answer or final_answer or gold or solution"),
        (
            [{"question": "x", "answer": "1"}],
            {"prompt": "problem"},
            "no problem field .wanted problem.; its fields",
        ),
        ([{"problem": "x", "answer": " "}], {}, "empty answer"),
        ([{"problem": "x", "answer": []}], {}, "empty answer"),
        ([{"problem": " ", "answer": "1"}], {}, "'problem' holds no text"),
        ([{"problem": "x", "solution": "It is 7."}], {}, "solution without a boxed answer"),
        ([{"problem": "x", "answer": "1", "id": 1}] * 2, {}, "row 2: id 'q-1' occurs twice"),
        ([{"problem": "x", "answer": "1"}], {"id": "key"}, "no id field 'key'"),
        ([{"problem": "x", "answer": {"value": 2}}], {}, "answer is dict; wanted text, a number or a list"),
        ([{"problem": "x", "tests": []}], {"kind": "code"}, "no tests in field 'tests'"),
        ([{"problem": "x", "tests": 3}], {"kind": "code"}, "unusable tests .tests are a int"),
        ([], {}, "no rows"),
    ],
)
def test_unusable_rows_are_refused_in_one_line(tmp_path, rows, mapping, words):
    path = write(tmp_path / "q.jsonl", rows)
    with pytest.raises(UserError, match=words) as caught:
        read_questions(path, FieldMapping(**mapping))
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("q.csv", b"a,b", "unknown suffix '.csv'; wanted .jsonl, .json, .parquet"),
        ("q.jsonl", b'{"a": 1}\n{"a":', "line 2: not valid JSON"),  # a cut file is not a shorter one
        ("q.jsonl", b"[1]\n", "row 1: list; wanted a JSON object"),
        ("q.parquet", b"PAR0", "not a whole Parquet file"),
        ("q.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "q.jsonl.gz: cannot be read .*end-of-stream"),
        ("q.json.gz", b'{"a": 1}\n', "q.json.gz: cannot be read .Not a gzipped file"),
        ("q.jsonl.gz", gzip.compress(b"{}", mtime=0)[:10] + b"no deflate", "q.jsonl.gz: cannot be read .Error -3"),
        ("q.jsonl", b'{"a": "\xff"}\n', "line 1: not valid JSON .*utf-8"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        list(read_rows(tmp_path / name))
    with pytest.raises(UserError, match="no such file"):
        list(read_rows(tmp_path / "absent.jsonl"))


# Answers


@pytest.mark.parametrize(
    ("value", "gold"),
    [
        ("She has 1 * 2 = 2.\n#### 72", ("72",)),
        ("#### 1,080", ("1080",)),
        ("#### -12,345,678.5", ("-12345678.5",)),
        ("1,080", ("1,080",)),  # not GSM8K's form: a tuple perhaps
        (27.0, ("27",)),
        (0.5, ("0.5",)),
        (7, ("7",)),
        (["a", "b", "a"], ("a", "b")),
        ("\\boxed{6}", ("6",)),
        (r"First \boxed{1}, so $\boxed{\frac{a}{\{b\}}}$.", (r"\frac{a}{\{b\}}",)),
        (r"\left( 3, \frac{\pi}{2} \right)", (r"\left( 3, \frac{\pi}{2} \right)",)),
    ],
)
def test_gold_answers(value, gold):
    assert gold_answers(value) == gold


@pytest.mark.parametrize("value", [{"value": 2}, True, [None], ["2", [False]], float("nan"), -math.inf, b"2", None])
def test_answers_that_are_no_text_or_number_are_refused(value):
    """As text they would grade right answers as wrong."""
    with pytest.raises(BadRow, match="answer is"):
        gold_answers(value)
    assert gold_answers(10**400) == (str(10**400),)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\fbox{8}", "8"),
        (r"so $\boxed 5$.", "5"),
        (r"\boxed{\text{a } b}", r"\text{a } b"),
        (r"\boxed{12", None),
        ("none", None),
        (r"\boxed", None),
    ],
)
def test_last_boxed(text, box):
    assert last_boxed(text) == box


# Programming problems


ASSERT = "assert f(1) == 2"


@pytest.mark.parametrize(
    ("value", "style", "wanted"),
    [
        ([{"input": "1\n", "output": "2"}], "stdio", {"cases": (Case("1\n", "2", "0"),)}),
        ({"inputs": ["1\n"], "outputs": ["2"]}, "stdio", {"cases": (Case("1\n", "2", "0"),)}),
        (
            '[{"input": {"stdin": "1\\n"}, "output": {"stdout": "2"}}]',
            "stdio",
            {"cases": (Case("1\n", "2", "0"),)},
        ),
        ({"fn_name": "f", "inputs": ["1"], "outputs": ["2"]}, "call", {"calls": (((1,), 2),), "entry": "f"}),
        ([ASSERT], "assert", {"asserts": (ASSERT,), "entry": "f"}),
        (
            {"style": "assert", "test_list": [ASSERT], "test_setup_code": "import re"},
            "assert",
            {"asserts": (ASSERT,), "entry": "f", "setup": "import re"},
        ),
        (
            {
                "prompt": "int f(int x) {",
                "test": "#include <cassert>\nint main() { assert(f(1) == 2); }",
                "declaration": "",
            },
            "assert",
            {"cpp_test": "#include <cassert>\nint main() { assert(f(1) == 2); }", "reference": "int f(int x) {"},
        ),
    ],
)
def test_own_tests_reach_the_judge_in_every_form(tmp_path, value, style, wanted):
    """With the row's limits and checker, and a prompt that asks for what is judged: a program or a function."""
    row = {"problem": "Add one.", "tests": value, "time_limit": "2.5", "generated_checker": "import sys\n"}
    (question,) = read_questions(write(tmp_path / "q.jsonl", [row]), FieldMapping(kind="code"))
    assert question.metadata["tests"]["style"] == style
    language = "cpp" if "cpp_test" in wanted else "python"  # the tests', before the mapping's
    assert question.metadata["language"] == language
    checker = Program("python", "import sys\n")
    assert parse_tests(question.metadata["tests"]) == CodeTests(
        **wanted, language=language, time_limit=2.5, checker=checker
    )
    spoken = {"python": "Python", "cpp": "C++"}[language]
    asks = f"Write a {spoken} program that reads" if style == "stdio" else f"Write the {spoken} function"
    assert asks in with_instruction(question).prompt


@pytest.mark.parametrize(
    "value",
    [{}, {"inputs": ["1"], "outputs": []}, [{"input": "1"}], [{"input": 1, "output": "2"}], "x", 3, True, ["f(1)"],
     {"tests": [ASSERT], "comparison": "tokenz"}],
)  # fmt: skip
def test_malformed_tests_give_no_question(value):
    """With zero tests every program would pass."""
    with pytest.raises(BadRow, match=r"^unusable tests [^\n]*$"):
        own_tests(value, {}, "python")


@pytest.mark.parametrize("limit", ["2 seconds", 0, -1, True, math.inf, math.nan, [2], pytest.param(10**400, id="huge")])
def test_limits_that_are_no_positive_numbers_are_refused(limit):
    """They would make every verdict gold_unparseable, or no limit."""
    with pytest.raises(BadRow, match=r"time_limit is .* wanted a positive number"):
        own_tests([ASSERT], {"time_limit": limit}, "python")
    with pytest.raises(BadRow, match=r"memory_limit is .* wanted a positive number"):
        own_tests({"test_list": [ASSERT], "memory_limit": limit}, {}, "python")


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickled_tests_are_read_without_calling_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert unpickled(packed({"a": [1, "b"]})) == {"a": [1, "b"]}
    with pytest.raises(BadRow, match="calls code"):
        unpickled(packed(Attack()))
    assert not (tmp_path / "pwned").exists()
    for broken in ("", "!", base64.b64encode(b"no zlib").decode(), packed([1])[:-8]):
        with pytest.raises(BadRow, match="cannot be unpacked"):
            unpickled(broken)


def test_packed_tests_that_unfold_too_far_are_refused(monkeypatch):
    monkeypatch.setattr("sdzero_jax.data.code_rows.LARGEST_TESTS", 1000)
    with pytest.raises(BadRow, match="too large"):
        unpickled(packed("a" * 100_000))


def test_live_code_bench_rows_as_published():
    row = {
        "question_id": "2727",
        "question_content": "Count the seniors.",
        "starter_code": "class Solution:\n    def countSeniors(self, details):\n        ",
        "public_test_cases": json.dumps([{"input": "[1]", "output": "2", "testtype": "functional"}]),
        "private_test_cases": packed(json.dumps([{"input": "[3]", "output": "4", "testtype": "functional"}])),
        "metadata": json.dumps({"func_name": "countSeniors"}),
        "difficulty": "easy",
    }
    question = live_code_bench(row, "livecodebench")
    assert question.metadata["tests"] == {
        "style": "call",
        "fn_name": "countSeniors",
        "cases": [
            {"input": "[1]", "output": "2", "testtype": "functional"},
            {"input": "[3]", "output": "4", "testtype": "functional"},
        ],
        "language": "python",
    }
    assert question.prompt.startswith("Count the seniors.") and "def countSeniors" in question.prompt
    asked = with_instruction(question).prompt
    assert "standard input" not in asked and asked.endswith("one ```python block.")
    public = json.dumps([{"input": "1", "output": "2", "testtype": "stdin"}])
    programs = {"metadata": "{}", "starter_code": "", "public_test_cases": public, "private_test_cases": public}
    stdio = live_code_bench({**row, **programs}, "livecodebench")
    assert stdio.metadata["tests"]["style"] == "stdio" and stdio.metadata["tests"]["language"] == "python"
    assert "reads standard input" in with_instruction(stdio).prompt


def test_codeforces_rows():
    row = {
        "id": "1/A",
        "title": "Sum",
        "description": "Add two numbers.",
        "input_format": "Two integers.",
        "output_format": "Their sum.",
        "examples": [{"input": "1 2", "output": "3"}],
        "official_tests": [{"input": "1 2\r\n", "output": "3\r\n"}, {"input": "5 5\r\n", "output": "10\r\n"}],
        "official_tests_complete": True,
        "generated_checker": None,
        "time_limit": 2.0,
        "memory_limit": 256.0,
        "input_mode": "stdio",
        "prompt": "You are an expert. Write C++.",
        "generation": "<think>...</think> ```cpp```",
        "finish_reason": "stop",
        "interaction_format": None,
    }
    question = codeforces(row, "codeforces_cots", "cpp")
    assert question.id == "codeforces_cots-1/A-cpp"
    assert question.metadata["tests"] == {
        "style": "stdio", "cases": row["official_tests"], "complete": True,
        "time_limit": 2.0, "memory_limit": 256.0, "language": "cpp",
    }  # fmt: skip
    assert "You are an expert" not in question.prompt and "Their sum." in question.prompt
    assert parse_tests(question.metadata["tests"]).language == "cpp"
    assert question.metadata["demonstration"] == row["generation"]
    assert "Write a C++ program" in with_instruction(question).prompt
    assert "demonstration" not in codeforces({**row, "finish_reason": "length"}, "c", "cpp").metadata
    with pytest.raises(BadRow, match="interactive"):
        codeforces({**row, "interaction_format": "Ask."}, "c", "cpp")
    with pytest.raises(BadRow, match="files"):
        codeforces({**row, "input_mode": "file"}, "c", "cpp")
    with pytest.raises(BadRow, match="no tests"):
        codeforces({**row, "official_tests": None, "examples": None}, "c", "cpp")
