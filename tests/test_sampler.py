"""The sampler: tokens and log-probs against the full forward, seeds, slots, prefixes, stops, bad requests."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax.errors import UserError
from sdzero_jax.models import DecoderConfig, LanguageModel
from sdzero_jax.sampler import Request, Sampler, programs, prompt_buckets

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
    return Sampler(MODEL, slots=slots, max_len=48, stop_ids=(22,), block=4, prefill_tokens=16, prompt_multiple=8)


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


def test_a_request_does_not_depend_on_its_neighbours_slot_order_or_what_its_slot_held():
    rng = np.random.default_rng(0)
    crowd = [
        request(f"r{i}", rng.integers(0, 22, rng.integers(1, 20)).tolist(), max_new_tokens=int(rng.integers(1, 25)),
                temperature=float(rng.choice([0.0, 0.8, 1.0])), top_p=float(rng.choice([0.7, 1.0])))
        for i in range(17)
    ]  # fmt: skip
    together, reverse = generate(REQUESTS + crowd), generate((REQUESTS + crowd)[::-1])
    for item in [*REQUESTS, *crowd[:6]]:
        alone = generate([item])[item.id, 0]
        assert alone == together[item.id, 0] == reverse[item.id, 0]


def run(session):
    done = {}
    while session.busy:
        done |= {(c.request_id, c.sample_index): c for c in session.step()}
    return done


def test_samples_of_a_prompt_share_its_prefill():
    session = sampler().session(params(), seed=0)
    session.submit([request("a", [1, 2, 3], n=10), request("b", [4] * 7)])
    assert session.pending == 11
    done = run(session)
    assert len(done) == 11 and session.pending == 0
    assert session.statistics.prefilled == 3 + 7
    assert session.statistics.reused == 9 * 3
    assert session.statistics.decoded == sum(len(c.ids) for c in done.values())
    alone = run_one(request("a", [1, 2, 3], n=10))
    assert {key: c for key, c in done.items() if key[0] == "a"} == alone


def run_one(item):
    session = sampler().session(params(), seed=0)
    session.submit([item])
    return run(session)


@pytest.mark.parametrize("keep_end", [False, True])
def test_a_held_slot_is_continued_and_gives_what_a_prefill_gives(keep_end):
    first = [dataclasses.replace(item, hold=True) for item in REQUESTS]
    session = sampler().session(params(), seed=0)
    session.submit(first)
    done = run(session)
    assert not session.busy and session.live == 0
    phrase = [7, 8, 9, 7, 8]
    again = []
    for item in first:
        answer = list(done[item.id, 0].ids)
        if answer[-1] == 22 and not keep_end:
            answer = answer[:-1]
        prompt = [*item.prompt, *answer, *phrase]
        again.append(request(f"{item.id}2", prompt, prefix=(item.id, 0), max_new_tokens=8))
    before = session.statistics.prefilled
    session.submit(again)
    continued = run(session)
    assert session.statistics.prefilled == before  # nothing was read again
    assert session.statistics.reused == sum(len(item.prompt) - len(phrase) for item in again)
    for item in again:
        fresh = run_one(dataclasses.replace(item, prefix=None))[item.id, 0]
        assert fresh.ids == continued[item.id, 0].ids
        np.testing.assert_allclose(fresh.logprobs, continued[item.id, 0].logprobs, atol=1e-5)


def test_a_prompt_that_does_not_continue_its_prefix_is_prefilled():
    session = sampler().session(params(), seed=0)
    session.submit([dataclasses.replace(REQUESTS[0], hold=True)])
    run(session)
    other = request("other", [9, 9, 9, 9], prefix=("a", 0))
    session.submit([other])
    assert run(session) == run_one(dataclasses.replace(other, prefix=None))


def test_held_slots_wait_for_their_release():
    session = sampler(slots=1).session(params(), seed=0)
    session.submit([dataclasses.replace(REQUESTS[0], hold=True), REQUESTS[1]])
    assert [key for key, _ in run(session)] == ["a"]  # the only slot is held, so the other request waits
    assert session.pending == 1
    session.release(("a", 0))
    assert run(session)["b", 0].ids == run_one(REQUESTS[1])["b", 0].ids


def test_slots_are_refilled_while_requests_wait():
    lengths = np.clip(np.random.default_rng(0).lognormal(2.0, 1.0, 64), 1, 36).astype(int)
    session = sampler(slots=8).session(params(), seed=0)
    session.submit([request(str(i), [1, 2], max_new_tokens=int(n), stop_ids=()) for i, n in enumerate(lengths)])
    done = run(session)
    assert [len(done[str(i), 0].ids) for i in range(64)] == lengths.tolist()
    # A sequence ends in the middle of a block of 4 steps: half a block per sequence is lost, and no more.
    assert session.statistics.utilisation > lengths.mean() / (lengths.mean() + 2.5)
    # Without refill a group of 8 would take as many steps as its longest member.
    assert session.statistics.steps < 0.7 * sum(max(lengths[i : i + 8]) for i in range(0, 64, 8))


def test_prompt_buckets_are_few_and_waste_little():
    sizes = prompt_buckets(16, 4096)
    assert sizes[:9] == (16, 32, 48, 64, 96, 128, 192, 256, 384) and sizes[-1] >= 4095 and len(sizes) <= 18
    assert all(b / (a + 1) <= 2 for a, b in itertools.pairwise(sizes))
    assert prompt_buckets(8, 2) == (8,)


def test_prefill_shapes_do_not_depend_on_the_queue(monkeypatch):
    seen = []
    real = programs.prefill
    monkeypatch.setattr(programs, "prefill", lambda model, params, tokens, counts: (
        seen.append(tokens.shape), real(model, params, tokens, counts))[1])  # fmt: skip
    generate([request("long", [1] * 20)])
    generate([request(str(i), [1] * (3 + i)) for i in range(9)])
    assert set(seen) == {(1, 24), (2, 8), (1, 16)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_narrow_caches_sample_nearly_the_same(dtype):
    narrow = Sampler(MODEL, slots=4, max_len=48, stop_ids=(22,), block=4, prompt_multiple=8, cache_dtype=dtype)
    greedy = [dataclasses.replace(item, temperature=0.0) for item in REQUESTS]
    exact = generate(greedy)
    errors = []
    for completion in narrow.generate(params(), greedy, seed=0):
        want = exact[completion.request_id, 0]
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(completion.ids, want.ids))
        count = sum(1 for _ in same)  # until it draws another token
        errors += np.abs(np.subtract(completion.logprobs[:count], want.logprobs[:count])).tolist()
    assert 0 < np.mean(errors) < 0.05


def test_prefill_never_projects_the_prompt_to_the_vocabulary():
    model = LanguageModel(dataclasses.replace(CONFIG, vocab_size=151_936, max_position=20_000))
    shapes = model.param_shapes()
    tokens = jax.ShapeDtypeStruct((1, 16_384), jnp.int32)
    counts = jax.ShapeDtypeStruct((1,), jnp.int32)
    compiled = programs.prefill.lower(model, shapes, tokens, counts).compile()
    logits = 16_384 * 151_936 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 20


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


def test_a_cache_that_cannot_fit_is_refused_before_anything_is_sampled():
    huge = Sampler(MODEL, slots=10**7, max_len=48, stop_ids=(22,))
    with pytest.raises(UserError, match=r"sampler.slots=10000000 .* GiB are free; the nearest that fits: \d+"):
        huge.generate(params(), REQUESTS, seed=0)


def test_too_many_stop_ids_are_refused():
    with pytest.raises(UserError, match="9 stop ids; at most 8"):
        sampler().generate(params(), [request("a", [1], stop_ids=range(9))], seed=0)
