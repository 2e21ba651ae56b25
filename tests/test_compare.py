"""Comparisons: what is refused before anything runs, tables by hand, equal budgets, kills and cached stages."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from sdzero_jax import compare, pipeline, runs, settings
from sdzero_jax.compare import Entry
from sdzero_jax.config import load_config, override
from sdzero_jax.errors import Fault, HealthStop, UserError

ROOT = pathlib.Path(__file__).parents[1]
PAPER = str(ROOT / "configs" / "compare_paper.py")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def comparison(*overrides):
    return compare.load_comparison(PAPER, overrides)


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(seeds=()), "seeds=.*one or more, all different"),
        (dict(seeds=(1, 1)), "all different"),
        (dict(budget=0), "budget=0 sampled tokens; wanted at least 1"),
        (dict(reference="gpro"), "unknown reference 'gpro'.*grpo"),
        (dict(entries={"x": Entry("x", "evaluate")}), "entry x: unknown stage 'evaluate'"),
        (dict(entries={"x": Entry("x", settings=("train.method=grop",))}), "unknown method 'grop'.*grpo"),
        (dict(entries={"x": Entry("x", settings=("train.nothing=1",))}), "unknown setting 'train.nothing'"),
        (dict(entries={"x": Entry("x", settings=("train.microbatches=3",))}), "microbatches=3 does not divide"),
        (dict(entries={"x": Entry("x", settings=("train.weights=[1,2]",))}), "1 terms, but 2 weights"),
        (dict(entries={"x": Entry("x", settings=("train.expected_tokens=0",), fill=True)}), "expected_tokens > 0"),
        (dict(entries={"x": Entry("x", settings=("train.layout.max_prompt=3",))}), "train.layout.max_prompt=3"),
        (dict(entries={"x": Entry("x", settings=("train.sampling.temperature=-1",))}), "temperature is -1"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(change, message, tmp_path):
    asked = dataclasses.replace(comparison(f"directory={tmp_path}"), **({"reference": ""} | change))
    with pytest.raises(UserError, match=message):
        compare.compare(asked)
    assert list(tmp_path.iterdir()) == []


def test_a_selection_of_nothing_is_refused():
    with pytest.raises(UserError, match=r"only=\[\] leaves nothing to compare; wanted some of"):
        comparison("only=[]")


def test_files_that_are_no_comparison(tmp_path):
    with pytest.raises(UserError, match=r"no config file .*did you mean 'configs/compare_paper.py'"):
        compare.load_comparison("configs/compare_papr.py", [])
    with pytest.raises(UserError, match=r"no get_comparison\(\) but get_config\(\): python run.py configs/demo.py"):
        compare.load_comparison("configs/demo.py", [])
    with pytest.raises(UserError, match="seeds=x"):
        comparison("seeds=x")
    with pytest.raises(UserError, match=r"only=.*no entry 'gpro'.*grpo"):
        comparison('only=["gpro"]')
    assert list(comparison('only=["sft","grpo"]').entries) == ["sft", "grpo"]


COMPARISONS = sorted(str(path) for path in (ROOT / "configs").glob("*.py") if "get_comparison" in path.read_text())


@pytest.mark.parametrize("path", COMPARISONS)
def test_every_comparison_of_the_project_is_in_order(path):
    compare.check_comparison(compare.load_comparison(path, []))


# ---------------------------------------------------------------------------------------------- tables


def result(tmp_path, name, rewards, tokens):
    """A run's result whose per-question rewards lie in a file, as `evaluate` leaves them."""
    path = tmp_path / f"{name}.jsonl"
    rows = [{"question_id": str(i), "reward": r} for i, r in enumerate(rewards)]
    path.write_text("\n".join(map(json.dumps, [*rows, {"closes": 0}])) + "\n")
    metrics = {"avg@4": sum(rewards) / len(rewards), "responses": str(path)}
    return {"metrics": metrics, "ledger": {"sampled_tokens": tokens}, "seconds": 1.0}


def test_differences_are_paired_by_seed_and_intervals_are_those_of_student(tmp_path):
    asked = dataclasses.replace(
        comparison(), entries={"a": Entry("A"), "b": Entry("B"), "c": Entry("C")}, seeds=(1, 2, 3), reference="a",
        budget=100,
    )  # fmt: skip
    accuracies = {"a": [0.5, 0.25, 0.75], "b": [0.75, 0.5, 1.0], "c": [1.0, 0.25]}
    results = {
        name: {
            str(seed + 1): result(tmp_path, f"{name}{seed}", [1.0] * round(4 * v) + [0.0] * round(4 - 4 * v), 100)
            for seed, v in enumerate(values)
        }
        for name, values in accuracies.items()
    }
    results["c"]["3"] = {"stopped": "collapsed"}
    results["b"]["2"]["ledger"]["sampled_tokens"] = 106
    summary = compare.summarise(asked, results)
    b, c = summary["methods"]["b"], summary["methods"]["c"]
    assert b["difference"]["mean"] == pytest.approx(0.25) and b["difference"]["interval"] == pytest.approx((0.25, 0.25))
    half = 4.302653 * 0.25 / math.sqrt(3)  # t(0.975, 2 degrees), standard deviation 0.25
    assert b["interval"] == pytest.approx((0.75 - half, 0.75 + half), rel=1e-6)
    low, high = b["difference"]["question_interval"]
    assert 0 <= low < 0.25 < high < 0.6
    assert not b["at_budget"] and b["budget_share"] == pytest.approx(1.02) and summary["methods"]["a"]["at_budget"]
    assert set(c["difference"]["seeds"]) == {"1", "2"} and c["difference"]["mean"] == pytest.approx(0.25)
    text = compare.table(summary)
    assert "+0.250 [+0.250, +0.250]" in text and "x 1.02" in text
    assert "C (stopped on 1 of 3 seeds)  " in text and "B (stopped" not in text
    assert len({len(line) for line in text.splitlines()}) == 1, "the columns do not stand under their heads"


def test_real_questions_count_once_however_many_seeds_answered_them(tmp_path):
    asked = dataclasses.replace(
        comparison(), entries={"a": Entry("A"), "b": Entry("B")}, seeds=(1, 2, 3, 4), reference="a", budget=100
    )
    rewards = {"a": [0.0, 1.0, 0.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]}
    results = {
        name: {str(seed): result(tmp_path, f"{name}{seed}", values, 100) for seed in asked.seeds}
        for name, values in rewards.items()
    }

    def width(problems):
        config = dataclasses.replace(asked.config, problems=problems)
        summary = compare.summarise(dataclasses.replace(asked, config=config), results)
        low, high = summary["methods"]["b"]["difference"]["question_interval"]
        return high - low

    worlds, real = width(asked.config.problems), width(dataclasses.replace(asked.config.problems, train="x", test="y"))
    # The same six answers four times: as 24 questions the interval would be half as wide.
    assert 1.6 < real / worlds < 2.6


def test_a_gate_in_an_early_stage_ends_that_method_alone(tmp_path, monkeypatch):
    asked = dataclasses.replace(
        comparison(f"directory={tmp_path}", f"base.cache_dir={tmp_path}"), entries={"a": Entry("A", "srt")}, seeds=(1,)
    )

    def stops(run, stage):
        raise HealthStop(f"{stage} collapsed")

    monkeypatch.setattr(compare, "run_stage", stops)
    assert compare.run_entry(asked, asked.entries["a"], 1) == {"stopped": "base collapsed"}


# What only the data show, then what is wrong with the machine or the settings.
@pytest.mark.parametrize("error", [UserError("c.json: not valid JSON"), Fault("no store"), OSError(28, "full")])
def test_other_errors_end_the_whole_comparison(error, tmp_path, monkeypatch):
    def fails(run, stage):
        raise error

    monkeypatch.setattr(compare, "run_stage", fails)
    with pytest.raises(type(error)):
        compare.compare(two_entries(tmp_path))


def test_an_entry_with_nothing_to_train_on_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    asked = two_entries(tmp_path)

    def stage(run, name):
        if name == "srt":  # as the stage does, with what it has read
            pipeline.srt_sequences([], pipeline.SRT_STAGES["joint"][0], run.config.srt.data, 1)

    monkeypatch.setattr(compare, "run_stage", stage)
    monkeypatch.setattr(compare, "spent", lambda run, stages: compare.Ledger())
    monkeypatch.setattr(compare.Run, "need", lambda run, stage: {"seconds": 1.0})
    figures = result(tmp_path, "b", [1.0, 0.0], 100)["metrics"]
    monkeypatch.setattr(compare, "evaluate_stage", lambda run, stage: figures)
    summary = compare.compare(asked)
    assert "no revision trace to train on" in summary["methods"]["a"]["seeds"]["1"]["stopped"]
    assert summary["methods"]["b"]["mean"]["avg@4"] == 0.5
    assert "stopped on 1 of 1 seeds" in (asked.folder / "report" / "comparison.html").read_text()


def test_an_entry_without_budget_for_its_last_stage_is_recorded(tmp_path, monkeypatch):
    asked = two_entries(tmp_path)
    monkeypatch.setattr(compare, "run_stage", lambda run, stage: None)
    monkeypatch.setattr(compare, "spent", lambda run, stages: compare.Ledger(sampled_tokens=asked.budget))
    stopped = compare.run_entry(asked, Entry("x", "train", ("train.start=srt",), fill=True), 1)["stopped"]
    assert "tokens are sampled before its last stage" in stopped


def two_entries(folder):
    asked = comparison(f"directory={folder}", f"base.cache_dir={folder}")
    return dataclasses.replace(
        asked, entries={"a": Entry("A", "srt"), "b": Entry("B", "base")}, seeds=(1,), reference=""
    )


def test_tuning_tries_every_grid_on_validation_questions():
    asked = comparison()
    grids = {"a": Entry("A", grid=(("train.epochs=1",), ("train.epochs=2",))), "b": Entry("B")}
    asked = dataclasses.replace(asked, entries=grids, tuning_seeds=(7, 8))
    tried = compare.tuning(asked)
    assert list(tried.entries) == ["a/0", "a/1"] and tried.seeds == (7, 8)
    assert tried.config.evaluate.split == "validation" and asked.config.evaluate.split == "test"
    assert tried.folder != asked.folder and tried.entries["a/1"].settings[-1] == "train.epochs=2"
    methods = {f"a/{i}": {"mean": {"avg@4": 0.2 + i / 10}, "seeds": {"7": {}, "8": {}}} for i in range(2)}
    assert "train.epochs=2    (of 0.200, 0.300)" in compare.tuned(asked, {"k": 4, "methods": methods})
    methods["a/1"]["seeds"]["8"] = {"stopped": "collapsed"}  # good on the other seed only
    assert "train.epochs=1    (of 0.200, -inf)" in compare.tuned(asked, {"k": 4, "methods": methods})
    with pytest.raises(UserError, match="has a grid"):
        compare.tuning(dataclasses.replace(asked, entries={"b": Entry("B")}))


# ---------------------------------------------------------------------------------------------- hashes

REAL = load_config(str(ROOT / "configs" / "gsm8k_tiny.py"))
ALL = set(runs.BEFORE)


def changed(setting, *also, config=REAL):
    """The stages whose hash a setting changes."""
    config = override(config, also)
    one, other = (runs.Run(c) for c in (config, override(config, [setting])))
    return {stage for stage in runs.BEFORE if one.key(stage) != other.key(stage)}


def test_the_test_set_changes_the_evaluation_alone():
    assert changed("problems.test=other.jsonl") == {"evaluate"}
    assert changed("problems.test=other.jsonl", "problems.overlap=drop") == ALL  # it shapes the training questions
    assert changed("problems.train=other.jsonl") == changed("problems.seed=3") == ALL
    assert changed("problems.data_dir=elsewhere") == set()


def test_a_pretrained_base_depends_on_no_questions():
    for setting in ("problems.train=other.jsonl", "problems.system=Be brief.", "problems.max_prompt_tokens=99"):
        assert changed(setting, "base.pretrained=there") == ALL - {"base"}
    assert changed("problems.test=other.jsonl", "base.pretrained=there") == {"evaluate"}
    assert changed("seed=3", "base.pretrained=there") == ALL


def test_a_method_depends_on_what_it_reads():
    method = lambda name, *settings: (f"train.method={name}", *settings)  # noqa: E731
    unread = ("health.keep_rate_stop=0.1", "train.objective.guidance=1", "train.replay.pairs=4")
    for setting in unread:
        assert "train" not in changed(setting, *method("grpo"))
        assert "train" in changed(setting, *method("sdzero_hybrid"))
    assert "train" in changed("health.min_mean_tokens=3", *method("grpo"))
    assert "train" in changed("train.policy.clip_low=0.1", *method("grpo"))
    assert "train" not in changed("train.policy.clip_low=0.1", *method("sdzero"))
    sampling = "evaluate.sampling.temperature=0.5"
    assert "train" in changed(sampling, *method("grpo", "train.validate_every=8"))
    assert "train" not in changed(sampling, *method("grpo", "train.validate_every=0"))
    assert "train" not in changed(sampling, *method("rft", "train.validate_every=8"))  # nothing validates there
    assert "train" in changed(sampling, *method("sdzero", "train.validate_every=0"))  # its gate samples


@pytest.mark.parametrize("base", ["", "there"])
def test_figures_of_another_test_set_are_not_taken_for_these(base, tmp_path, monkeypatch):
    folders = []

    def evaluate(path, *_, **__):
        folders.append(path.parent)
        return [], {}

    monkeypatch.setattr(pipeline, "evaluate", evaluate)
    monkeypatch.setattr(pipeline, "write_json_atomic", lambda *_: None)
    for name in ("sampler", "params"):
        monkeypatch.setattr(runs.Run, name, lambda *_: (None, None))
    problems = property(lambda run: SimpleNamespace(questions=lambda *_: []))
    monkeypatch.setattr(runs.Run, "problems", problems)
    monkeypatch.setattr(runs.Run, "domain", None)
    plain = [f"run_dir={tmp_path}", f"base.pretrained={base}"]
    for more in ("problems.data_dir=elsewhere", "problems.test=other.jsonl", "evaluate.k=3", "problems.data_dir=here"):
        pipeline.evaluate_stage(runs.Run(override(REAL, [*plain, more])), "base")
    assert folders[0] == folders[3] and len(set(folders)) == 3


# ------------------------------------------------------------------------------------------ whole runs

SMALL = (
    "base.steps=120", "base.checkpoint.every=60", "task.chain.batch_sizes=[32,16,8]", "sampler.slots=64",
    "collect.questions=32", "collect.chunk=16", "srt.epochs=2", "srt.batch_size=8", "train.questions=32",
    "distill.questions=32", "evaluate.questions=8", "evaluate.k=2", "evaluate.chunk=8", "health.questions=8",
    "srt.data.only_right=false",
)  # fmt: skip


def command(folder, *extra):
    words = [f"directory={folder}", f"base.cache_dir={folder.parent / 'cache'}", "budget=6000", "seeds=[0]", *SMALL]
    return [sys.executable, "run.py", "compare", "configs/compare_paper.py", *words, *extra]


def one_batch(entry):
    """The most tokens that one batch of an entry samples."""
    train = settings.override(comparison().config, entry.settings).train
    return train.batch_size * train.samples * train.sampling.max_new_tokens


def comparable(folder):
    summary = json.loads((folder / "compare_paper" / "comparison.json").read_text())
    for method in summary["methods"].values():
        for run in method["seeds"].values():
            run.pop("seconds"), run["metrics"].pop("responses")
    summary.pop("config")  # it names the folders
    return summary


@pytest.mark.slow
def test_every_method_runs_and_spends_its_budget(tmp_path):
    budget = 12_000
    asked = command(tmp_path / "all", f"budget={budget}")
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = comparable(tmp_path / "all")
    for name, entry in comparison().entries.items():
        method = results["methods"][name]
        run = method["seeds"]["0"]
        assert "metrics" in run, (name, run)
        assert run["metrics"]["maj@2"] is not None, "answers must reach the records"
        if entry.fill:
            gap = abs(run["ledger"]["sampled_tokens"] - budget)
            assert gap <= 0.6 * one_batch(entry), name  # as near as whole batches allow: half a batch, and a bit
    assert (tmp_path / "all" / "compare_paper" / "report" / "comparison.html").stat().st_size > 10_000


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_table(tmp_path):
    some = 'only=["srt","reinforce","guided_replay"]'
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert subprocess.run(command(whole, some), cwd=ROOT, capture_output=True).returncode == 0
    for seconds in (20, 35):
        process = subprocess.Popen(
            command(killed, some), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(seconds)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command(killed, some), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.dumps(comparable(killed)) == json.dumps(comparable(whole))  # NaN equals NaN in text
