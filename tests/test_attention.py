"""Attention in plain XLA: the reference against a float64 numpy loop, the chunked rung against both."""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_chunked
from sdzero_jax.errors import UserError

# The package exports the function under the module's name.
ops = importlib.import_module("sdzero_jax.ops.attention")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def inputs(seed=0, batch=2, q_len=37, kv_len=37, heads=6, kv_heads=2, width=8):
    """Two packed segments, then padding; positions restart in each segment."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = draw(batch, q_len, heads, width), *(draw(batch, kv_len, kv_heads, width) for _ in range(2))
    cut, end = kv_len // 3, kv_len - 4
    index = np.arange(kv_len)
    segments = np.tile(np.where(index < cut, 1, np.where(index < end, 2, 0)), (batch, 1)).astype(np.int32)
    positions = np.tile(np.where(index < cut, index, index - cut), (batch, 1)).astype(np.int32)
    where = dict(
        q_positions=positions[:, -q_len:],
        kv_positions=positions,
        q_segments=segments[:, -q_len:],
        kv_segments=segments,
    )
    return (q, k, v), where


def oracle(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window=None):
    """One query at a time in float64."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    batch, q_len, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(q_len):
            far = q_positions[b, t] - kv_positions[b]
            seen = (kv_segments[b] == q_segments[b, t]) & (q_segments[b, t] > 0) & (far >= 0)
            seen &= far < (window or 10**9)
            if not seen.any():
                continue
            for h in range(heads):
                score = k[b, seen, h // group] @ q[b, t, h] / np.sqrt(width)
                weight = np.exp(score - score.max())
                out[b, t, h] = weight @ v[b, seen, h // group] / weight.sum()
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention_chunked, "QUERY_BLOCK", 8)
    monkeypatch.setattr(attention_chunked, "KV_BLOCK", 16)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("q_len", [37, 1])
@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_matches_a_float64_loop(small_blocks, implementation, q_len, window):
    qkv, where = inputs(q_len=q_len)
    if q_len == 1:  # make the one query a real token
        where["q_positions"], where["q_segments"] = (
            where["kv_positions"][:, 30:31],
            where["kv_segments"][:, 30:31],
        )
    got = ops.attention(*qkv, **where, window=window, implementation=implementation)
    want = oracle(*qkv, **where, window=window)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert np.abs(want).max() > 0.5


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_a_query_that_sees_nothing_gets_zeros_and_no_gradient(small_blocks, implementation):
    qkv, where = inputs()
    run = functools.partial(ops.attention, **where, implementation=implementation)
    assert (np.asarray(run(*qkv))[:, -4:] == 0.0).all()  # padding
    grads = jax.jit(jax.grad(lambda *x: jnp.sum(run(*x) ** 2), argnums=(0, 1, 2)))(*qkv)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert (np.asarray(grad)[:, -4:] == 0.0).all() and np.abs(grad[:, :-4]).max() > 0


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_chunked_equals_reference_forward_and_backward(small_blocks, kv_heads, window):
    qkv, where = inputs(seed=1, kv_heads=kv_heads)
    target = np.random.default_rng(5).standard_normal(qkv[0].shape)

    def loss(implementation, *x):
        return jnp.sum(ops.attention(*x, **where, window=window, implementation=implementation) * target)

    run = lambda name: jax.jit(jax.value_and_grad(functools.partial(loss, name), argnums=(0, 1, 2)))(*qkv)  # noqa: E731
    (value, grads), (other_value, other_grads) = run("reference"), run("chunked")
    np.testing.assert_allclose(other_value, value, rtol=1e-5)
    for reference, chunked in zip(grads, other_grads, strict=True):
        np.testing.assert_allclose(chunked, reference, atol=1e-5)


def _largest(jaxpr):
    """The most elements any value of a jaxpr has, sub-jaxprs included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [np.prod(out.aval.shape, dtype=int) for out in equation.outvars]
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns"))
        subs = [getattr(value, "jaxpr", value) for value in values]
        sizes += [_largest(sub) for sub in subs if hasattr(sub, "eqns")]
    return max(sizes)


def test_chunked_never_holds_all_scores_not_even_backward():
    shape = dict(batch=1, q_len=1024, kv_len=1024, heads=2, kv_heads=1, width=4)
    qkv, where = inputs(**shape)

    def grad(implementation):
        loss = lambda *x: jnp.sum(ops.attention(*x, **where, implementation=implementation))  # noqa: E731
        return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*qkv).jaxpr

    assert _largest(grad("reference")) == 2 * 1024 * 1024
    assert _largest(grad("chunked")) <= 2 * attention_chunked.QUERY_BLOCK * attention_chunked.KV_BLOCK


def test_auto_takes_chunked_when_the_scores_are_many(monkeypatch):
    qkv, where = inputs()

    def trace(name):
        return str(jax.make_jaxpr(functools.partial(ops.attention, **where, implementation=name))(*qkv))

    assert trace("auto") == trace("reference") != trace("chunked")
    monkeypatch.setattr(ops, "_AUTO_CHUNKED_SCORES", 100)
    assert trace("auto") == trace("chunked")


def test_keys_are_not_repeated_for_grouped_queries():
    qkv, where = inputs(batch=1, q_len=1, kv_len=256, heads=8, kv_heads=1, width=64)
    jaxpr = jax.make_jaxpr(functools.partial(ops.attention, **where, implementation="reference"))(*qkv).jaxpr
    assert _largest(jaxpr) <= 256 * 64  # the keys themselves; repeated they would be 8 times that


def test_bfloat16_keeps_softmax_in_float32():
    qkv, where = inputs(seed=2)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in qkv)
    want = oracle(*(np.asarray(x, np.float64) for x in (q, k, v)), **where)
    for implementation in ("reference", "chunked"):
        out = ops.attention(q, k, v, **where, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2)


def test_names():
    qkv, where = inputs()
    with pytest.raises(UserError, match="'chunkd'; did you mean 'chunked'"):
        ops.attention(*qkv, **where, implementation="chunkd")
    with pytest.raises(UserError, match="row layout 'paded'; did you mean 'padded'"):
        ops.attention(*qkv, **where, layout="paded")


# ---- blocks that are not visited -----------------------------------------------------------------


def ragged(seed=3, batch=3, q_len=19, kv_len=61):
    """Queries at any positions over a cache that is filled in any order, with empty slots in between."""
    rng = np.random.default_rng(seed)
    draw = lambda length, high: rng.integers(0, high, (batch, length)).astype(np.int32)  # noqa: E731
    where = dict(
        q_positions=draw(q_len, 60),
        kv_positions=draw(kv_len, 60),
        q_segments=draw(q_len, 4),
        kv_segments=draw(kv_len, 4),
    )
    where["kv_segments"][:, 20:41] = 0  # a hole of more than one block
    shapes = ((batch, q_len, 4, 8), *[(batch, kv_len, 2, 8)] * 2)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes), where


@pytest.mark.parametrize("window", [None, 6])
def test_chunked_takes_any_positions_and_segments(small_blocks, window):
    qkv, where = ragged()
    got = ops.attention(*qkv, **where, window=window, implementation="chunked")
    want = oracle(*qkv, **where, window=window)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert (np.abs(want).max(axis=(2, 3)) == 0).any()  # some queries see nothing


def test_blocks_that_hold_a_visible_pair_are_visited():
    for seed in range(20):
        _, where = ragged(seed, q_len=40, kv_len=64)
        for window in (None, 6):
            mask = np.asarray(attention_chunked.visible(*where.values(), window)).any(axis=0)
            first, last = attention_chunked._visits(*where.values(), window, 8, 16)
            holds = mask.reshape(5, 8, 4, 16).any(axis=(1, 3))  # [N, M]
            for block, (low, high) in enumerate(zip(first, last, strict=True)):
                assert not holds[block, : int(low)].any() and not holds[block, int(high) :].any()


def visits(positions, segments, window=None, q_size=8, kv_size=16):
    both = (jnp.asarray(positions)[None], jnp.asarray(segments)[None])
    first, last = attention_chunked._visits(both[0], both[0], both[1], both[1], window, q_size, kv_size)
    return list(zip(first.tolist(), last.tolist(), strict=True))


def test_blocks_that_nobody_sees_are_not_visited():
    index, ones = np.arange(64), np.ones(64, np.int32)
    assert visits(index, ones) == [(0, 1), (0, 1), (0, 2), (0, 2), (0, 3), (0, 3), (0, 4), (0, 4)]
    # Query 40 sees 33 to 40 with a window of 8: blocks 2 (32 to 47) only.
    assert visits(index, ones, window=8) == [(0, 1), (0, 1), (0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)]
    # One query at a time: 16 sees itself, the first of block 1; 22 sees 15, the last of block 0; 23 does not.
    assert visits(index, ones, q_size=1)[16] == (0, 2)
    assert visits(index, ones, window=8, q_size=1)[22:24] == [(0, 2), (1, 2)]
    padded = np.where(index < 20, 1, 0)
    assert visits(index, padded) == [(0, 1), (0, 1), (0, 2)] + [(0, 0)] * 5
    packed = np.where(index < 32, 1, 2)
    assert visits(index % 32, packed) == [(0, 1), (0, 1), (0, 2), (0, 2), (2, 3), (2, 3), (2, 4), (2, 4)]


def test_gradients_of_keys_are_added_up_in_float32(small_blocks):
    """128 blocks of queries add to one key: in bfloat16 the sum would stop growing."""
    length = 128 * 8
    where = dict.fromkeys(("q_segments", "kv_segments"), jnp.ones((1, length), jnp.int32))
    where |= dict.fromkeys(("q_positions", "kv_positions"), jnp.arange(length, dtype=jnp.int32)[None])
    q = jnp.zeros((1, length, 1, 8), jnp.bfloat16)

    def loss(v, implementation):
        return jnp.sum(ops.attention(q, q, v, **where, implementation=implementation).astype(jnp.float32))

    got = jax.jit(jax.grad(functools.partial(loss, implementation="chunked")))(q)
    want = np.cumsum(1.0 / np.arange(1, length + 1)[::-1])[::-1]  # uniform weights 1 / (t + 1)
    np.testing.assert_allclose(np.asarray(got, np.float64)[0, :, 0, 0], want, rtol=8e-3)
