"""Figures of an evaluation by hand: missing verdicts, intervals, lengths; what the command prints."""

import numpy as np
import pytest

import run
from sdzero_jax import evaluate as evaluation
from sdzero_jax import pipeline, runs
from sdzero_jax.evaluate import EvaluateConfig, evaluation_metrics
from sdzero_jax.examples import Question


def records(rewards, tokens=None, answers=None):
    """One record per first attempt, from the rewards of each question."""
    return [
        {
            "question_id": f"q{number}", "sample_index": index, "reward": reward, "response": "", "finish": "stop",
            "tokens": tokens[number][index] if tokens else 3,
            "answer": str(answers[number][index]) if answers else None,
        }
        for number, own in enumerate(rewards)
        for index, reward in enumerate(own)
    ]  # fmt: skip


def test_pass_at_k_leaves_out_questions_with_fewer_than_k_verdicts():
    metrics = evaluation_metrics(records([[0.0, 0.0], [0.0, 1.0], [0.0, None], [None, None]]), 2)
    assert metrics["pass@2"] == 0.5  # of the two with both verdicts; with pass@1 of the third it would be 1/3
    assert metrics["pass@2_left_out"] == 2 and metrics["no_verdict"] == 3
    assert metrics["avg@2"] == pytest.approx((0.0 + 0.5 + 0.0) / 3)
    nothing = evaluation_metrics(records([[0.0, None]]), 2)
    assert nothing["pass@2"] is None and nothing["pass@2_interval"] is None and nothing["pass@2_left_out"] == 1


def test_every_figure_over_questions_has_its_interval():
    # Each question's commonest answer is right for half of them; at least one answer is right for three in four.
    rewards = [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]] * 25
    answers = [[1, 1, 2], [1, 2, 2], [2, 2, 2], [1, 1, 1]] * 25
    metrics = evaluation_metrics(records(rewards, answers=answers), 3)
    for name, mean in (("avg@3", 0.5), ("pass@3", 0.75), ("maj@3", 0.5)):
        low, high = metrics[f"{name}_interval"]
        values = {"avg@3": [2 / 3, 1 / 3, 0, 1], "pass@3": [1, 1, 0, 1], "maj@3": [1, 0, 0, 1]}[name]
        half = 1.96 * np.std(values) / 10  # 100 questions
        assert metrics[name] == pytest.approx(mean)
        assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_a_chunk_without_any_verdict_does_not_end_the_evaluation(tmp_path, monkeypatch):
    rows = iter([records([[None, None]]), records([[1.0, 0.0]])])
    monkeypatch.setattr(evaluation, "_evaluate_chunk", lambda *_: next(rows))
    asked = [Question(f"q{number}", "", (), "math") for number in range(2)]
    config = EvaluateConfig(k=2, chunk=1)
    _, metrics = evaluation.evaluate(tmp_path / "r.jsonl", config, None, None, None, asked, name="base", seed=0)
    assert metrics["avg@2"] == 0.5 and metrics["no_verdict"] == 2


def test_the_lengths_of_responses_have_a_distribution():
    metrics = evaluation_metrics(records([[0.0] * 11], tokens=[[*range(10, 20), 1000]]), 11)
    wanted = {"tokens_p10": 11.0, "tokens_p50": 15.0, "tokens_p90": 19.0, "tokens_max": 1000}
    assert {name: metrics[name] for name in wanted} == wanted
    assert evaluation_metrics([], 1)["tokens_max"] is None


def test_evaluating_prints_a_table(tmp_path, monkeypatch, capsys):
    figures = {"model": "base"} | evaluation_metrics(records([[0.0, 1.0]]), 2)
    monkeypatch.setattr(pipeline, "run_stage", lambda run, stage: {"models": {"base": figures}})
    monkeypatch.setattr(runs.Run, "need", lambda run, stage: {})
    monkeypatch.setattr("sdzero_jax.signals.install", lambda: None)
    places = [f"run_dir={tmp_path / 'run'}", f"base.cache_dir={tmp_path / 'cache'}"]
    assert run.main(["evaluate", str(CONFIG), *places]) == 0
    heads, row = capsys.readouterr().out.strip().splitlines()
    assert heads.split()[:3] == ["model", "avg@2", "pass@2"] and row.split()[:3] == ["base", "0.500", "1.000"]


CONFIG = run.DEMO
