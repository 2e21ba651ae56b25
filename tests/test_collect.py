"""Figures of a collection: what has no verdict is neither right nor wrong."""

import pytest

from sdzero_jax import collect
from sdzero_jax.collect import CollectConfig, collection_summary, sample
from sdzero_jax.errors import HealthStop
from sdzero_jax.examples import Question, RevisionTrace, Rollout, Verdict
from sdzero_jax.methods import SRT_STAGES, NothingLeft, SrtData, srt_sequences
from sdzero_jax.rollouts import SamplingConfig


def trace(outcome, index):
    right = Verdict.of("correct")
    return RevisionTrace("q", index, (1,), (2,), right, (3,), (4, index), Verdict.of(outcome), "stop")


@pytest.mark.parametrize(
    "outcomes, accuracy",
    [
        (["correct", "wrong", "error", "timeout"], 0.5),
        (["correct", "error"], 1.0),
        (["wrong", "error"], 0.0),
        (["error"], 0.0),
        ([], 0.0),
    ],
)
def test_revisions_without_a_verdict_are_left_out_of_their_accuracy(outcomes, accuracy):
    traces = [trace(outcome, index) for index, outcome in enumerate(outcomes)]
    summary = collection_summary(traces, [])
    assert summary["revised_accuracy"] == accuracy
    assert summary["revised"] == len(outcomes)


@pytest.mark.parametrize("outcomes, accuracy", [(["correct", "wrong", "error"], 0.5), (["error", "timeout"], 0.0)])
def test_samples_without_a_verdict_are_left_out_of_the_accuracy_shown(outcomes, accuracy, tmp_path, monkeypatch):
    questions = [Question(str(number), "", (), "math") for number in range(len(outcomes))]

    def responses(domain, sampler, params, part, config, **_):
        return [
            Rollout(question, (1,), (2,), (-1.0,), "stop", Verdict.of(outcome))
            for question, outcome in zip(part, outcomes)
        ]

    shown, fill = [], collect.fill

    def watched(log, name, items, size, make, figures):
        fill(log, name, items, size, make, lambda: shown.append(figures()) or shown[-1])

    monkeypatch.setattr(collect, "sample_responses", responses)
    monkeypatch.setattr(collect, "fill", watched)
    rollouts, _ = sample(
        tmp_path / "samples.jsonl", SamplingConfig(), None, None, None, questions, n=1, chunk=len(questions), seed=0
    )
    assert shown == [{"accuracy": accuracy}] and len(rollouts) == len(outcomes)


def test_a_chunk_without_any_verdict_stops_the_collection_with_its_reason(monkeypatch):
    """Else every question would be sampled before anybody hears that none can be graded."""
    bad = Rollout(Question("q", "", (), "code"), (1,), (2,), (), "stop", Verdict.of("gold_unparseable", "no tests"))
    monkeypatch.setattr(collect, "sample_and_revise", lambda *_, **__: ([bad, bad], [[], []]))
    with pytest.raises(HealthStop, match=r"none of 2 responses has a verdict \(gold_unparseable: no tests\)"):
        collect._collect_chunk(CollectConfig(), None, None, None, [bad.question], "collect/0", 0)


def test_without_a_trace_the_advice_is_not_to_collect_more():
    with pytest.raises(NothingLeft, match=r"no first attempt that collect\.revise takes had a verdict"):
        srt_sequences([], SRT_STAGES["joint"][0], SrtData(), 0)
