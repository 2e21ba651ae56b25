"""Questions from files and named sets: fields, answers, tests, ids, instructions, overlap."""

import base64
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
import types
import zlib

import pytest

from sdzero_jax.data import (
    FieldMapping,
    QuestionsConfig,
    check_overlap,
    find_overlap,
    known_sets,
    load_questions,
    open_split,
    prepare_set,
    read_questions,
    split_by_id,
    with_instruction,
    without_overlap,
)
from sdzero_jax.data.code_rows import codeforces, live_code_bench, stdio_tests, unpickled
from sdzero_jax.data.questions import BadRow, gold_answers, last_boxed, read_rows
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.prompts import MATH_INSTRUCTION
from sdzero_jax.verifiers.code_tests import parse_tests

DATA = pathlib.Path(__file__).parent / "data" / "questions"
ROOT = pathlib.Path(__file__).parents[1]


# Files and fields

ROWS = [{"problem": "1+1?", "answer": "2", "level": 3}, {"problem": "2+2?", "answer": 4.0, "level": 1}]


def write(path, rows):
    """The same rows in the form that the suffix names."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    text = json.dumps(rows) if ".json" in path.suffixes else "\n".join(map(json.dumps, rows)) + "\n\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.jsonl.gz", "q.json", "q.json.gz", "q.parquet"])
def test_every_form_of_file_gives_the_same_questions(tmp_path, name):
    rows = [{**row, "answer": str(row["answer"])} for row in ROWS] if name == "q.parquet" else ROWS
    questions = read_questions(write(tmp_path / name, rows))
    assert [q.id for q in questions] == ["q-000000", "q-000001"]
    assert [q.prompt for q in questions] == ["1+1?", "2+2?"]
    assert (
        questions[0].gold == ("2",) and questions[0].kind == "math" and questions[0].metadata == {"level": 3}
    )
    assert questions[1].gold == (("4.0",) if name == "q.parquet" else ("4",))


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
        ([{"problem": "x", "tests": []}], {"kind": "code"}, "no tests"),
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
        ("q.parquet", b"PAR0", "not a Parquet file"),
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


@pytest.mark.parametrize(
    "value",
    [
        [{"input": "1\n", "output": "2"}],
        {"inputs": ["1\n"], "outputs": ["2"]},
        '[{"input": {"stdin": "1\\n"}, "output": {"stdout": "2"}}]',
    ],
)
def test_forms_of_stdio_tests(value):
    tests = stdio_tests(value, {"time_limit": 2.0, "generated_checker": "print(1)"})
    assert tests == {
        "style": "stdio",
        "cases": [{"input": "1\n", "output": "2"}],
        "checker": "print(1)",
        "time_limit": 2.0,
    }


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"inputs": ["1"], "outputs": []}, [{"input": "1"}], [{"input": 1, "output": "2"}], "x"],
)
def test_malformed_tests_give_no_question(value):
    """With zero tests every program would pass."""
    with pytest.raises(BadRow):
        stdio_tests(value)


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
        "cases": [{"input": "[1]", "output": "2"}, {"input": "[3]", "output": "4"}],
    }
    assert question.prompt.startswith("Count the seniors.") and "def countSeniors" in question.prompt
    asked = with_instruction(question).prompt
    assert "standard input" not in asked and asked.endswith("one ```python block.")
    stdio = live_code_bench({**row, "metadata": "{}", "starter_code": ""}, "livecodebench")
    assert stdio.metadata["tests"]["style"] == "stdio"
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
        "style": "stdio", "cases": row["official_tests"], "checker": None, "complete": True,
        "time_limit": 2.0, "memory_limit": 256.0,
    }  # fmt: skip
    assert "You are an expert" not in question.prompt and "Their sum." in question.prompt
    assert question.metadata["demonstration"] == row["generation"]
    assert "Write a C++ program" in with_instruction(question).prompt
    assert "demonstration" not in codeforces({**row, "finish_reason": "length"}, "c", "cpp").metadata
    with pytest.raises(BadRow, match="interactive"):
        codeforces({**row, "interaction_format": "Ask."}, "c", "cpp")
    with pytest.raises(BadRow, match="files"):
        codeforces({**row, "input_mode": "file"}, "c", "cpp")
    with pytest.raises(BadRow, match="no tests"):
        codeforces({**row, "official_tests": None, "examples": None}, "c", "cpp")


def run_tests(question):
    """The reference solution under the question's own tests: right, and wrong when it returns nothing."""
    tests = parse_tests(question.metadata["tests"])
    checks = "\n".join([tests.setup, *tests.asserts])
    for solution, wanted in ((question.metadata["solution"], True), (f"def {tests.entry}(*_): pass", False)):
        space = {}
        try:
            reference = f"{tests.reference}    pass\n" if tests.reference else ""
            exec(f"{reference}{solution}\n{checks}", space)
            passed = True
        except Exception:
            passed = False
        assert passed == wanted, question.id


@pytest.mark.parametrize("name", ["humaneval", "humaneval_x", "mbpp"])
def test_python_functions_pass_their_own_tests(prepared, name):
    questions = [q for q in open_split(name, "test", data_dir=prepared) if q.metadata["language"] == "python"]
    assert len(questions) == (406 if name == "mbpp" else 131)
    for question in questions[:40]:
        run_tests(question)


# Named sets

SMALL = {  # what tests/data holds -> questions per split
    "gsm8k": {"train": 7473},
    "humaneval": {"test": 131},
    "humaneval_x": {"test": 262},
    "mbpp": {"train": 298, "validation": 68, "test": 406},
    "countdown": {"test": 256},
    "amo_bench": {"test": 8},
    "openr1_math_220k": {"train": 1},
}
LARGE = {  # what the folder in SDZERO_DATA holds beyond that
    "gsm8k": {"train": 7473, "test": 1319},
    "math": {"train": 7470, "test": 5000},
    "math500": {"test": 500},
    "aime24": {"test": 30},
    "amc23": {"test": 40},
    "olympiadbench": {"test": 675},
    "deepscaler": {"train": 975},
    "codeforces_cots": {"test": 326},
    "livecodebench": {"test": 3},
    "aime25": None,
    "hmmt25": None,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """All sets of tests/data, prepared once."""
    folder = tmp_path_factory.mktemp("prepared")
    for name in SMALL:
        prepare_set(name, data_dir=folder, source_dir=DATA)
    return folder


def test_the_required_sets_are_known():
    required = (
        "gsm8k math500 math aime24 aime25 hmmt25 amc23 olympiadbench amo_bench openr1_math_220k deepscaler "
        "codeforces_cots livecodebench humaneval mbpp countdown"
    )
    assert set(required.split()) <= set(known_sets()) == SMALL.keys() | LARGE.keys()
    with pytest.raises(UserError, match="did you mean 'gsm8k'"):
        prepare_set("gsm8")


def check_prepared(record, folder, counts):
    assert record["questions"] == counts
    for split, count in counts.items():
        questions = open_split(record["name"], split, data_dir=folder)
        assert len(questions) == count
        assert len({question.id for question in questions}) == count
        for question in questions:
            assert question.prompt == question.prompt.strip() != ""
            assert bool(question.gold) != (question.kind == "code")
            if question.kind == "code":
                parse_tests(question.metadata["tests"])  # what the judge can read, at least one test


@pytest.mark.parametrize("name", SMALL)
def test_sets_of_the_repository(prepared, name):
    check_prepared(json.loads((prepared / name / "prepared.json").read_text()), prepared, SMALL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_sets_of_the_larger_folder(tmp_path, name):
    if not os.environ.get("SDZERO_DATA"):
        pytest.skip("SDZERO_DATA names no folder with the larger problem sets")
    try:
        record = prepare_set(name, data_dir=tmp_path, source_dir=os.environ["SDZERO_DATA"])
    except UserError as error:
        assert LARGE[name] is None and "no files of" in str(error)
        pytest.skip(f"problem set missing: {error}")
    check_prepared(record, tmp_path, LARGE[name])


def test_what_was_skipped_is_counted(prepared):
    assert json.loads((prepared / "amo_bench" / "prepared.json").read_text())["skipped"] == {
        "test": {"answer in words": 3}
    }


def test_a_prepared_question_is_the_row(prepared):
    question = open_split("gsm8k", "train", data_dir=prepared)[0]
    with gzip.open(DATA / "gsm8k_train.jsonl.gz", "rt") as rows:
        row = json.loads(next(rows))
    wanted = Question("gsm8k-train-000000", row["question"], ("72",), "math", {"solution": row["answer"]})
    assert question == wanted
    assert with_instruction(question).prompt == f"{row['question']} {MATH_INSTRUCTION}"
    assert with_instruction(with_instruction(question)) == with_instruction(question)
    countdown = open_split("countdown", "test", data_dir=prepared)[0]
    assert countdown.metadata == {"numbers": [30, 100, 93], "target": 23} and countdown.gold == ("23",)


def test_preparing_again_does_nothing_and_other_files_rewrite(tmp_path):
    source = tmp_path / "from"
    source.mkdir()
    rows = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(3)]
    write(source / "gsm8k_train.jsonl", rows)
    first = prepare_set("gsm8k", data_dir=tmp_path, source_dir=source)
    assert first["questions"] == {"train": 3} and first["missing_splits"] == ["test"]
    stamp = (tmp_path / "gsm8k" / "prepared.json").stat().st_mtime_ns
    assert prepare_set("gsm8k", data_dir=tmp_path, source_dir=source) == first
    assert (tmp_path / "gsm8k" / "prepared.json").stat().st_mtime_ns == stamp
    write(source / "gsm8k_train.jsonl", rows[:2])
    assert prepare_set("gsm8k", data_dir=tmp_path, source_dir=source)["questions"] == {"train": 2}
    write(source / "gsm8k_train.jsonl", [{"question": "x", "answer": ""}])
    with pytest.raises(UserError, match=r"split train: no questions in gsm8k_train\.jsonl"):
        prepare_set("gsm8k", data_dir=tmp_path, source_dir=source)
    assert len(open_split("gsm8k", "train", data_dir=tmp_path)) == 2  # the old one stands
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_missing_folders_sets_and_splits_are_one_line(tmp_path, prepared):
    with pytest.raises(UserError, match="no such folder"):
        prepare_set("gsm8k", data_dir=tmp_path, source_dir=tmp_path / "absent")
    with pytest.raises(UserError, match=r"no files of gsm8k; wanted .*gsm8k_train\.jsonl\*"):
        prepare_set("gsm8k", data_dir=tmp_path, source_dir=tmp_path)
    with pytest.raises(UserError, match=r"run: python run\.py data prepare gsm8k"):
        open_split("gsm8k", "train", data_dir=tmp_path)
    with pytest.raises(UserError, match="no split 'tests'; choose from train"):
        open_split("gsm8k", "tests", data_dir=prepared)


# The hub (a stand-in: nothing here reaches a network)


class FakeHub:
    """One repository whose "main" is a commit; counts what is asked for."""

    def __init__(self, folder, commit="c1"):
        self.folder, self.commit, self.asked = folder, commit, []

    def dataset_info(self, repo, revision, files_metadata):
        assert files_metadata
        self.asked.append((repo, revision))
        siblings = []
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            lfs = (
                types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest())
                if "train" in path.name
                else None
            )
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            name = path.relative_to(self.folder).as_posix()
            siblings.append(types.SimpleNamespace(rfilename=name, lfs=lfs, blob_id=blob))
        sha = self.commit if revision == "main" else revision
        return types.SimpleNamespace(sha=sha, siblings=siblings)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    folder = tmp_path / "hub"
    (folder / "main").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [{"question": f"{split} {n}?", "answer": f"#### {n}"} for n in range(3)]
        write(folder / "main" / f"{split}-00000-of-00001.parquet", rows)
    (folder / "README.md").write_text("card")
    fake = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)

    def snapshot_download(repo, *, repo_type, revision, allow_patterns):
        assert repo_type == "dataset" and "README.md" not in allow_patterns and len(allow_patterns) == 1
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def test_fetching_records_and_then_keeps_the_commit(hub, tmp_path):
    record = prepare_set("gsm8k", data_dir=tmp_path / "data")
    assert record["questions"] == {"train": 3, "test": 3}
    assert record["source"] == {"commits": {"openai/gsm8k": "c1"}}
    assert hub.asked == [("openai/gsm8k", "main"), ("openai/gsm8k", "c1")]  # both splits of one commit
    hub.commit, hub.asked = "c2", []
    assert prepare_set("gsm8k", data_dir=tmp_path / "data") == record and not hub.asked  # no network needed
    for options, commit in (({"revision": "v9"}, "v9"), ({}, "v9"), ({"force": True}, "c2")):
        record = prepare_set("gsm8k", data_dir=tmp_path / "data", **options)
        assert record["source"] == {"commits": {"openai/gsm8k": commit}}


@pytest.mark.parametrize("name", ["train", "test"])  # large files have a sha256, small ones git's hash
def test_a_damaged_download_is_refused(hub, tmp_path, monkeypatch, name):
    import huggingface_hub

    good = huggingface_hub.snapshot_download
    victim = hub.folder / "main" / f"{name}-00000-of-00001.parquet"

    def damage(*args, **kwargs):
        victim.write_bytes(victim.read_bytes() + b"x")
        return good(*args, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", damage)
    with pytest.raises(UserError, match=f"{victim.name}: checksum differs from openai/gsm8k's"):
        prepare_set("gsm8k", data_dir=tmp_path / "data")
    assert not (tmp_path / "data" / "gsm8k").exists()


def test_without_a_network_one_line_says_what_to_do(tmp_path):
    code = (
        "from sdzero_jax.data import prepare_set; from sdzero_jax.errors import UserError\n"
        f"try: prepare_set('gsm8k', data_dir={str(tmp_path)!r})\n"
        "except UserError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert out.stdout.count("\n") == 1, out.stderr
    assert "cannot reach the hub for openai/gsm8k (OfflineModeIsEnabled)" in out.stdout
    assert "hf download --repo-type dataset openai/gsm8k --local-dir DIR" in out.stdout
    assert "python run.py data prepare gsm8k --from DIR" in out.stdout


def test_companion_rows_lend_the_tests(tmp_path):
    """codeforces_cots has no tests; open-r1/codeforces has, by the same id."""
    cots, tests = tmp_path / "solutions_py_decontaminated", tmp_path / "verifiable"
    cots.mkdir()
    tests.mkdir()
    row = {"id": "1/A", "title": "Sum", "description": "Add.", "examples": [{"input": "1", "output": "1"}]}
    write(cots / "train-00000-of-00001.parquet", [{**row, "generation": "g1"}, {**row, "generation": "g2"}])
    official = [{"input": "2", "output": "2"}, {"input": "3", "output": "3"}]
    write(
        tests / "train-00000-of-00001.parquet",
        [{"id": "1/A", "official_tests": official, "official_tests_complete": True, "input_mode": "stdio"}],
    )
    record = prepare_set("codeforces_cots", data_dir=tmp_path / "data", source_dir=tmp_path)
    assert record["questions"] == {"train": 1} and record["skipped"] == {"train": {"repeated id": 1}}
    (question,) = open_split("codeforces_cots", "train", data_dir=tmp_path / "data")
    assert question.metadata["language"] == "python" and question.metadata["demonstration"] == "g1"
    assert question.metadata["tests"]["cases"] == official and question.metadata["tests"]["complete"]


# Sources as configs name them, and imports


def test_a_source_is_a_prepared_split_or_a_file(tmp_path, prepared):
    questions = load_questions(QuestionsConfig("gsm8k:train", str(prepared)))
    assert len(questions) == 7473 and questions[7472].prompt.endswith(f" {MATH_INSTRUCTION}")
    path = write(tmp_path / "q.jsonl", [{"task": "1+1?", "answer": "2"}])
    config = QuestionsConfig(str(path), fields=FieldMapping(prompt="task"))
    assert [question.prompt for question in load_questions(config)] == [f"1+1? {MATH_INSTRUCTION}"]
    with pytest.raises(UserError, match="wanted NAME:SPLIT"):
        load_questions(QuestionsConfig("gsm8k"))


def test_importing_loads_no_heavy_library():
    code = (
        "import sys; import sdzero_jax.data; heavy = ('tensorflow_datasets', 'transformers', 'tokenizers', "
        "'huggingface_hub', 'pyarrow', 'tensorflow'); print([m for m in heavy if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# Splits and overlap


def question(number, prompt, kind="math"):
    return Question(f"q-{number}", prompt, ("1",), kind)


def test_splits_follow_ids_only():
    questions = [question(n, f"{n}?") for n in range(2000)]
    splits = split_by_id(questions, {"collect": 0.5, "distill": 0.3, "validation": 0.2})
    assert {q.id for split in splits.values() for q in split} == {q.id for q in questions}
    assert sum(map(len, splits.values())) == 2000
    assert [round(len(split) / 2000, 1) for split in splits.values()] == [0.5, 0.3, 0.2]
    fewer = split_by_id(questions[1000:][::-1], {"collect": 0.5, "distill": 0.3, "validation": 0.2})
    for name, split in fewer.items():
        assert {q.id for q in split} <= {q.id for q in splits[name]}
    assert (
        split_by_id(questions, {"a": 0.5, "b": 0.5}, 0)["a"]
        != split_by_id(questions, {"a": 0.5, "b": 0.5}, 1)["a"]
    )
    for shares in ({"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(UserError, match="sum to 1"):
            split_by_id(questions, shares)


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("what is  $\\frac{1}{2} + x$ ?", True),
        ("What is $\\dfrac{1}{2}+x$?\n", True),
        (f"What is $\\frac{{1}}{{2}} + x$? {MATH_INSTRUCTION}", True),
        ("What is $\\frac{1}{2} - x$?", False),
        ("What is $\\frac{1}{3} + x$?", False),
    ],
)
def test_the_same_problem_in_another_spelling_is_found(other, same):
    train, test = question(1, "What is $\\frac{1}{2} + x$?"), question(2, other)
    assert bool(find_overlap([train], {"math500": [test]})) == same


def test_decimals_and_signs_tell_problems_apart():
    texts = ["Is 1.5 > x?", "Is 15 > x?", "Is 1.5 < x?", "Is -1.5 > x?", "Is 1,5 > x?"]
    texts += ["$\\frac{1}{23}$?", "$\\frac{12}{3}$?", "5! is?", "5 is?", "x^{10}?", "x^10 + 0?"]
    for number, text in enumerate(texts):
        others = [question(n, t) for n, t in enumerate(texts, start=10) if n != number + 10]
        assert not find_overlap([question(0, text)], {"e": others})


def test_overlap_is_refused_unless_allowed(caplog):
    train = [question(1, "A?"), question(2, "B?"), question(3, "C?")]
    evaluation = {
        "gsm8k": [question(10, "b ?")],
        "math500": [question(3, "other"), question(11, "b?"), question(12, "C")],
        "x": [],
    }
    with pytest.raises(UserError) as caught:
        check_overlap(train, evaluation)
    assert "1 with gsm8k, 2 with math500 (first: q-2 is q-10)" in str(caught.value)
    pairs = check_overlap(train, evaluation, allow=True)
    assert len(pairs) == 3 and "allowed" in caplog.text
    assert [q.id for q in without_overlap(train, pairs)] == ["q-1"]
    assert check_overlap([question(9, "D?")], evaluation) == []


def test_overlap_within_a_set_is_recorded(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", [{"question": f"{n}?", "answer": "#### 1"} for n in range(5)])
    write(tmp_path / "gsm8k_test.jsonl", [{"question": f"{n} ?", "answer": "#### 1"} for n in (3, 4, 5)])
    record = prepare_set("gsm8k", data_dir=tmp_path / "data", source_dir=tmp_path)
    assert record["overlap_with_own_train"] == {"test": 2}


def test_questions_are_replaced_not_changed(prepared):
    bare = open_split("mbpp", "test", data_dir=prepared)[0]
    asked = with_instruction(bare)
    assert dataclasses.replace(asked, prompt=bare.prompt) == bare
