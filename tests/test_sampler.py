"""The sampler: tokens and log-probs against the full forward, seeds, stops, filters, bad requests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdzero_jax.errors import UserError
from sdzero_jax.models import DecoderConfig, LanguageModel
from sdzero_jax.sampler import Request, Sampler
from sdzero_jax.sampler.sampling import filter_logits, request_key_data, sample_tokens

CONFIG = DecoderConfig(
    vocab_size=23, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=48,
    max_position=64, initializer_range=0.3,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
NEW = 12


@functools.cache
def params():
    return jax.jit(MODEL.init)(jax.random.key(3))


@functools.cache
def sampler(slots=4):
    return Sampler(MODEL, slots=slots, max_len=48, stop_ids=(22,), prompt_multiple=8)


def request(name, prompt, **settings):
    return Request(id=name, prompt=prompt, max_new_tokens=settings.pop("max_new_tokens", NEW), **settings)


REQUESTS = [request("a", [1, 2, 3]), request("b", [4]), request("c", [5, 6, 7, 8, 9]), request("d", [2] * 11)]


def generate(requests, seed=0, slots=4):
    return {(c.request_id, c.sample_index): c for c in sampler(slots).generate(params(), requests, seed=seed)}


@functools.cache
def full_logits():
    return jax.jit(lambda tokens: MODEL.unembed(params(), MODEL.apply(params(), tokens)[0])[0])


def test_greedy_tokens_and_logprobs_equal_the_uncached_forward():
    greedy = [dataclasses.replace(r, temperature=0.0) for r in REQUESTS]
    for (name, _), completion in generate(greedy).items():
        prompt = next(r.prompt for r in REQUESTS if r.id == name)
        ids = list(prompt)
        for token, logprob in zip(completion.ids, completion.logprobs):
            logits = full_logits()(jnp.array([ids + [0] * (32 - len(ids))]))[len(ids) - 1]
            assert token == int(jnp.argmax(logits))
            assert logprob == pytest.approx(float(jax.nn.log_softmax(logits)[token]), abs=1e-5)
            ids.append(token)
        assert set(completion.sampling_logprobs) == {0.0}


def test_sampled_logprobs_equal_the_uncached_forward_at_both_temperatures():
    cold = [dataclasses.replace(r, temperature=0.7) for r in REQUESTS]
    for (name, _), completion in generate(cold).items():
        prompt = list(next(r.prompt for r in REQUESTS if r.id == name))
        row = prompt + list(completion.ids)
        logits = full_logits()(jnp.array([row + [0] * (32 - len(row))]))
        for step, token in enumerate(completion.ids):
            at = logits[len(prompt) - 1 + step]
            assert completion.logprobs[step] == pytest.approx(float(jax.nn.log_softmax(at)[token]), abs=1e-5)
            wanted = float(jax.nn.log_softmax(at / 0.7)[token])
            assert completion.sampling_logprobs[step] == pytest.approx(wanted, abs=1e-5)


def test_a_request_does_not_depend_on_its_neighbours_slot_or_order():
    together = generate(REQUESTS)
    reverse = generate(REQUESTS[::-1])
    for item in REQUESTS:
        alone = generate([item])[item.id, 0]
        assert alone == together[item.id, 0] == reverse[item.id, 0]


def test_samples_differ_by_index_and_seed_and_repeat_exactly():
    several = [dataclasses.replace(REQUESTS[0], n=6)]
    first, again, other = generate(several), generate(several), generate(several, seed=1)
    assert first == again
    assert len({c.ids for c in first.values()}) > 1
    assert [c.ids for c in first.values()] != [c.ids for c in other.values()]


def test_stop_tokens_end_a_response_and_belong_to_it():
    never = generate([dataclasses.replace(REQUESTS[0], stop_ids=(), temperature=0.0)])["a", 0]
    assert never.finish_reason == "length" and len(never.ids) == NEW
    stop = never.ids[4]
    first = never.ids.index(stop)
    unused = next(token for token in range(23) if token not in never.ids)
    ended = generate([dataclasses.replace(REQUESTS[0], stop_ids=(unused, stop), temperature=0.0)])["a", 0]
    assert ended.finish_reason == "stop"
    assert ended.ids == never.ids[: first + 1]
    assert len(ended.logprobs) == len(ended.ids)


def test_the_last_token_may_be_the_stop():
    never = generate([dataclasses.replace(REQUESTS[0], stop_ids=(), temperature=0.0)])["a", 0]
    stop = never.ids[0]
    one = generate([request("a", [1, 2, 3], max_new_tokens=1, stop_ids=(stop,), temperature=0.0)])["a", 0]
    assert one.ids == (stop,) and one.finish_reason == "stop"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n": 0}, "n=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 60}, "wanted 1 to 48"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop_ids": (99,)}, "stop id 99"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_sampled(settings, words):
    with pytest.raises(UserError, match=words):
        sampler().generate(params(), [REQUESTS[0], request("x", [1, 2], **settings)], seed=0)


def test_bad_samplers_are_refused():
    with pytest.raises(UserError, match="slots"):
        Sampler(MODEL, slots=0, max_len=48, stop_ids=(22,))
    with pytest.raises(UserError, match="stop id 23"):
        Sampler(MODEL, slots=1, max_len=48, stop_ids=(23,))


# ------------------------------------------------------------------------------------- distributions

LOGITS = np.log(np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04], np.float32))


def filtered(**settings):
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    arrays = {k: jnp.array([v], jnp.int32 if k == "top_k" else jnp.float32) for k, v in values.items()}
    return np.asarray(jax.nn.softmax(filter_logits(jnp.asarray(LOGITS)[None], **arrays)[0]))


def test_filters_keep_what_they_say():
    np.testing.assert_allclose(filtered(top_k=2), [0.4 / 0.65, 0.25 / 0.65, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=0.7), np.array([0.4, 0.25, 0.15, 0, 0, 0]) / 0.8, atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=0.3), [1, 0, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(filtered(min_p=0.3), np.array([0.4, 0.25, 0.15, 0, 0, 0]) / 0.8, atol=1e-6)
    np.testing.assert_allclose(filtered(top_p=1.0, top_k=6), [0.4, 0.25, 0.15, 0.1, 0.06, 0.04], atol=1e-6)


def draws(count, temperature, **settings):
    values = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    keys = np.stack([request_key_data(7, f"r{i}", 0) for i in range(count)])
    column = lambda value, dtype=jnp.float32: jnp.full(count, value, dtype)  # noqa: E731
    tokens, _, _ = sample_tokens(
        jnp.broadcast_to(jnp.asarray(LOGITS), (count, len(LOGITS))), jnp.asarray(keys), column(0, jnp.int32),
        column(temperature), column(values["top_k"], jnp.int32), column(values["top_p"]), column(values["min_p"]),
        filtered=bool(settings),
    )  # fmt: skip
    return np.bincount(np.asarray(tokens), minlength=len(LOGITS))


def p_value(counts, probabilities):
    kept = probabilities > 0
    assert counts[~kept].sum() == 0, "a token outside the kept set was drawn"
    expected = probabilities[kept].astype(float)
    return stats.chisquare(counts[kept], counts.sum() * expected / expected.sum()).pvalue


@pytest.mark.parametrize(
    "settings", [{"temperature": 1.0}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}]
)
def test_draws_follow_the_distribution(settings):
    temperature = settings.pop("temperature", 1.0)
    counts = draws(20_000, temperature, **settings)
    assert p_value(counts, filtered(temperature=temperature, **settings)) > 1e-3


def test_the_distribution_test_notices_a_wrong_temperature():
    assert p_value(draws(20_000, 1.0), filtered(temperature=1.2)) < 1e-6
