"""Rollouts: graded while others are decoded, revised in their slots, and exact to resume, drawn ahead or not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sdzero_jax import signals
from sdzero_jax.config import load_config
from sdzero_jax.data import shuffled_batches
from sdzero_jax.errors import Stopped
from sdzero_jax.examples import Verdict
from sdzero_jax.rollouts import RolloutIterator, SamplingConfig, sample_and_revise, sample_responses
from sdzero_jax.runs import Run
from sdzero_jax.sampler import Request

SAMPLING = SamplingConfig(max_new_tokens=10)


@functools.cache
def run():
    config = load_config("configs/smoke.py")
    model = dataclasses.replace(config.model, hidden_size=32, num_layers=1, intermediate_size=64, initializer_range=0.3)
    return Run(dataclasses.replace(config, model=model))


@functools.cache
def params(seed=0):
    return run().model.init(jax.random.key(seed))


@functools.cache
def sampler():
    return run().sampler(4)


def by_length(questions, texts):
    """A verdict that a random model meets half of the time."""
    assert len(questions) == len(texts)
    return [Verdict.of("correct" if len(text) % 2 else "wrong") for text in texts]


@functools.cache
def domain():
    return dataclasses.replace(run().domain, verify=by_length)


def questions(count):
    return run().problems.questions("train", count)


def test_attempts_are_those_of_plain_sampling_and_revisions_those_of_a_prefill():
    asked = questions(7)
    attempts, revised = sample_and_revise(
        domain(), sampler(), params(), asked, SAMPLING, label="x", seed=3, n=2, revise=(0.0,)
    )
    plain = sample_responses(domain(), sampler(), params(), asked, SAMPLING, label="x/init", seed=3, n=2)
    assert attempts == plain
    assert [attempt.question.id for attempt in attempts] == [q.id for q in asked for _ in range(2)]
    wrong = [attempt.verdict.reward == 0.0 for attempt in attempts]
    assert 0 < sum(wrong) < len(attempts)
    assert [len(own) for own in revised] == [int(w) for w in wrong]
    for number, (attempt, own) in enumerate(zip(attempts, revised)):
        for revision in own:
            stops = domain().tokenizer.stop_ids
            first = attempt.response_ids[:-1] if attempt.response_ids[-1] in stops else attempt.response_ids
            prompt = (*attempt.prompt_ids, *first, *domain().phrase_ids(0.0))
            assert revision.prompt_ids == prompt and revision.question == attempt.question
            name = f"x/revision/{number:06d}/{attempt.question.id}"
            alone = next(sampler().generate(params(), [Request(name, prompt, 10)], seed=3))
            assert alone.ids == revision.response_ids
            np.testing.assert_allclose(alone.logprobs, revision.logprobs, atol=1e-5)


def test_several_revisions_of_one_attempt_differ():
    _, revised = sample_and_revise(
        domain(), sampler(), params(), questions(3), SAMPLING, label="x", seed=3, revisions=4
    )
    assert all(len(own) == 4 and len({r.response_ids for r in own}) > 1 for own in revised)
    assert [[r.sample_index for r in own] for own in revised] == [[0, 1, 2, 3]] * 3


def test_attempts_without_a_verdict_are_not_revised():
    failed = dataclasses.replace(domain(), verify=lambda questions, texts: [Verdict.of("error") for _ in texts])
    _, revised = sample_and_revise(failed, sampler(), params(), questions(3), SAMPLING, label="x", seed=3)
    assert revised == [[], [], []]


def test_an_error_of_the_grader_reaches_the_caller():
    def broken(questions, texts):
        raise RuntimeError("the grader broke")

    with pytest.raises(RuntimeError, match="the grader broke"):
        sample_responses(
            dataclasses.replace(domain(), verify=broken), sampler(), params(), questions(3), SAMPLING, label="x", seed=3
        )


def iterator(prefetch):
    return RolloutIterator(
        shuffled_batches(questions(12), 3, seed=5), domain(), sampler(), SAMPLING, label="it", seed=1, prefetch=prefetch
    )


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_resumed_iterator_goes_on_exactly(prefetch):
    whole = iterator(prefetch)
    states, batches = [], []
    for step in range(5):  # beyond an epoch of four batches
        states.append(whole.get_state())
        batches.append(whole.next(params(step)))
    for start in (0, 1, 3):
        again = iterator(prefetch)
        again.set_state(states[start])
        assert [again.next(params(step)) for step in range(start, 5)] == batches[start:]


def test_a_batch_drawn_ahead_is_one_step_old_and_no_more():
    ahead, fresh = iterator(True), iterator(False)
    got = [ahead.next(params(step)) for step in range(4)]
    assert got == [fresh.next(params(seed)) for seed in (0, 0, 1, 2)]


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_signal_cuts_sampling_short_and_the_batch_is_drawn_again(prefetch, monkeypatch):
    whole = iterator(prefetch)
    wanted = [whole.next(params(step)) for step in range(3)]
    cut = iterator(prefetch)
    assert prefetch or cut.next(params(0)) == wanted[0]  # with prefetch only the first batch can be cut
    before = cut.get_state()
    monkeypatch.setattr(signals, "pending", lambda: 15)
    with pytest.raises(Stopped) as stop:
        cut.next(params(0 if prefetch else 1))
    assert stop.value.signum == 15
    assert cut.get_state() == before
    monkeypatch.undo()
    again = iterator(prefetch)
    again.set_state(before)
    start = 0 if prefetch else 1
    assert [again.next(params(step)) for step in range(start, 3)] == wanted[start:]


def test_what_is_sampled_ahead_looks_at_no_signal(monkeypatch):
    ahead, wanted = iterator(True), iterator(True)
    first = ahead.next(params(0)), wanted.next(params(0))
    monkeypatch.setattr(signals, "pending", lambda: 15)
    assert first[0] == first[1] and ahead.next(params(1)) == wanted.next(params(1))
