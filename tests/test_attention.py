"""Attention against a float64 numpy loop, and the chunked rung against the reference."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdzero_jax.errors import UserError

# The package exports the function under the module's name.
ops = importlib.import_module("sdzero_jax.ops.attention")


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
    monkeypatch.setattr(ops, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(ops, "_KV_BLOCK", 16)


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
    assert _largest(grad("chunked")) <= 2 * ops._QUERY_BLOCK * ops._KV_BLOCK


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
    for planned in ("cudnn", "splash", "pallas"):
        with pytest.raises(NotImplementedError, match="auto, reference, chunked are"):
            ops.attention(*qkv, **where, implementation=planned)
