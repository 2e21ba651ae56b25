"""Named problem sets: preparing from folders and from a stand-in hub, sources, overlap within a set."""

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import types

import pytest

from sdzero_jax.data import (
    FieldMapping,
    QuestionsConfig,
    known_sets,
    load_questions,
    open_split,
    prepare_set,
    with_instruction,
)
from sdzero_jax.data.questions import read_rows
from sdzero_jax.errors import UserError
from sdzero_jax.examples import Question
from sdzero_jax.prompts import MATH_INSTRUCTION
from sdzero_jax.verifiers.code_tests import parse_tests
from tests.rows import write

DATA = pathlib.Path(__file__).parent / "data" / "questions"
ROOT = pathlib.Path(__file__).parents[1]


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


def test_missing_folders_sets_and_splits_are_one_line(tmp_path, prepared, monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        prepare_set("gsm8k", data_dir=tmp_path, source_dir=tmp_path / "absent")
    with pytest.raises(UserError, match=r"no files of gsm8k; wanted .*gsm8k_train\.jsonl\*"):
        prepare_set("gsm8k", data_dir=tmp_path, source_dir=tmp_path)
    with pytest.raises(UserError, match=f"run: python run.py data prepare gsm8k --to {tmp_path}$"):
        open_split("gsm8k", "train", data_dir=tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"run: python run\.py data prepare gsm8k$"):
        open_split("gsm8k", "train")
    with pytest.raises(UserError, match="no split 'tests'; choose from train"):
        open_split("gsm8k", "tests", data_dir=prepared)


def unlink(name):
    return lambda folder: next(folder.rglob(name)).unlink()


def cut(folder):
    path = next(folder.rglob("*.array_record*"))
    path.write_bytes(path.read_bytes()[: 1 << 16])


@pytest.mark.parametrize(
    "harm",
    [
        unlink("*.array_record*"),
        cut,
        unlink("dataset_info.json"),
        lambda folder: (folder / "prepared.json").write_text("[1]"),
        lambda folder: (folder / "prepared.json").write_text("{"),
    ],
    ids=["no records", "cut records", "no info", "a list", "no JSON"],
)
def test_an_incomplete_copy_says_how_to_prepare_it_again(tmp_path, harm):
    write(tmp_path / "gsm8k_train.jsonl", [{"question": f"{n}?", "answer": "#### 1"} for n in range(3)])
    record = prepare_set("gsm8k", data_dir=tmp_path / "data", source_dir=tmp_path)
    harm(tmp_path / "data" / "gsm8k")
    with pytest.raises(UserError, match=r"gsm8k is incomplete .*data prepare gsm8k --to .* --force$") as caught:
        open_split("gsm8k", "train", data_dir=tmp_path / "data")
    assert "\n" not in str(caught.value)
    assert prepare_set("gsm8k", data_dir=tmp_path / "data", source_dir=tmp_path, force=True) == record
    assert len(open_split("gsm8k", "train", data_dir=tmp_path / "data")) == 3


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [{"question": f"{n}?", "answer": "1"} for n in range(3)]
    write(tmp_path / "gsm8k_train.jsonl", rows)
    assert prepare_set("gsm8k", data_dir="~/data", source_dir="~")["directory"] == str(tmp_path / "data" / "gsm8k")
    for source in ("gsm8k:train", "~/gsm8k_train.jsonl"):
        assert len(load_questions(QuestionsConfig(source, "~/data"))) == 3
    assert len(list(read_rows("~/gsm8k_train.jsonl"))) == 3


def test_rows_of_countdown_without_numbers_are_skipped(tmp_path):
    good = {"input": "30,100,93", "output": "23"}
    bad = [{**good, "input": "30,x"}, {**good, "output": "?"}, {"nums": [3, "x"], "target": 4}]
    rows = [good, *bad, {"nums": [3, 4], "target": float("inf")}]
    write(tmp_path / "countdown_test.jsonl", rows)
    record = prepare_set("countdown", data_dir=tmp_path / "data", source_dir=tmp_path)
    assert record["questions"] == {"test": 1} and sum(record["skipped"]["test"].values()) == 4
    assert all("not a row of countdown" in reason for reason in record["skipped"]["test"])


def test_a_cut_file_is_refused_with_its_path(tmp_path):
    path = write(tmp_path / "gsm8k_train.jsonl.gz", [{"question": "1?", "answer": "1"}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{path}: cannot be read"):
        prepare_set("gsm8k", data_dir=tmp_path / "data", source_dir=tmp_path)


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
            lfs = types.SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if "train" in path.name else None
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
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
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


def test_overlap_within_a_set_is_recorded(tmp_path):
    write(tmp_path / "gsm8k_train.jsonl", [{"question": f"{n}?", "answer": "#### 1"} for n in range(5)])
    write(tmp_path / "gsm8k_test.jsonl", [{"question": f"{n} ?", "answer": "#### 1"} for n in (3, 4, 5)])
    record = prepare_set("gsm8k", data_dir=tmp_path / "data", source_dir=tmp_path)
    assert record["overlap_with_own_train"] == {"test": 2}


def test_questions_are_replaced_not_changed(prepared):
    bare = open_split("mbpp", "test", data_dir=prepared)[0]
    asked = with_instruction(bare)
    assert dataclasses.replace(asked, prompt=bare.prompt) == bare
