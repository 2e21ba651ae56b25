"""Causal grouped-query attention with segments, positions and a sliding window.

Two implementations under one signature: "reference" writes the [T, S] scores down, "chunked"
visits blocks of queries and of keys with an online softmax and never holds more than one block
of scores, forward or backward. "auto" takes the second when T * S is large. Left out: the fused
kernels (cuDNN, splash), which are refused by name until they are measured here.
"""

import math

import jax
import jax.numpy as jnp

from sdzero_jax.errors import UserError, nearest

IMPLEMENTATIONS = ("auto", "reference", "chunked")
_PLANNED = ("cudnn", "splash", "pallas")
# Above this many scores per head and row, blocks are cheaper than a written-down matrix.
_AUTO_CHUNKED_SCORES = 1 << 20
_QUERY_BLOCK = 256
_KV_BLOCK = 512
# Stands for -inf where -inf - -inf would give nan.
_MASKED = -1e30


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of q over the keys of its own segment at or before its position.

    q [B, T, H, D], k and v [B, S, KV, D] with H a multiple of KV; positions and segments int32
    [B, T] and [B, S]. Segment 0 is padding: it sees nothing and is seen by nothing. With `window`
    a query sees the `window` latest positions, its own included. Scores are scaled by D ** -0.5;
    softmax is float32. Returns [B, T, H, D] in q's dtype; a query that sees no key gets zeros.
    """
    if implementation in _PLANNED:
        there = ", ".join(IMPLEMENTATIONS)
        raise NotImplementedError(f"attention {implementation!r} is not there; {there} are")
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown attention implementation {implementation!r}{nearest(implementation, IMPLEMENTATIONS)}"
        )
    batch, q_len, heads, head_dim = q.shape
    kv_len, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    if implementation == "auto":
        implementation = "chunked" if q_len * kv_len > _AUTO_CHUNKED_SCORES else "reference"
    # [B, T, KV, G, D]: query heads grouped by the key head they share, so that k is not repeated.
    q = q.reshape(batch, q_len, kv_heads, heads // kv_heads, head_dim)
    where = (q_positions, kv_positions, q_segments, kv_segments)
    run = _chunked if implementation == "chunked" else _reference
    return run(q, k, v, *where, window).reshape(batch, q_len, heads, head_dim)


def visible(
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """Boolean [B, T, S]: may the query at t look at the key at s."""
    distance = q_positions[:, :, None] - kv_positions[:, None, :]  # [B, T, S]
    same = (q_segments[:, :, None] == kv_segments[:, None, :]) & (kv_segments[:, None, :] != 0)
    mask = same & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """float32 [B, KV, G, T, S]."""
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q.shape[-1])


def _reference(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    mask = visible(q_positions, kv_positions, q_segments, kv_segments, window)
    mask = mask[:, None, None]  # [B, 1, 1, T, S]
    scores = jnp.where(mask, _scores(q, k), _MASKED)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N, ...] -> [N / size, B, size, ...], padded with zeros (segment 0) to a whole block."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _chunked(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    q_len, kv_len = q.shape[1], k.shape[1]
    q_size, kv_size = min(_QUERY_BLOCK, q_len), min(_KV_BLOCK, kv_len)
    queries = tuple(_blocks(x, q_size) for x in (q, q_positions, q_segments))
    keys = tuple(_blocks(x, kv_size) for x in (k, v, kv_positions, kv_segments))

    def one_query_block(_, block):
        q, q_positions, q_segments = block
        batch, size, kv_heads, group, head_dim = q.shape
        rows = (batch, kv_heads, group, size)
        start = (
            jnp.full(rows, _MASKED, jnp.float32),  # running maximum
            jnp.zeros(rows, jnp.float32),  # running sum of weights
            jnp.zeros((*rows, head_dim), jnp.float32),  # running weighted sum of values
        )

        def one_kv_block(carry, block):
            top, total, out = carry
            k, v, kv_positions, kv_segments = block
            mask = visible(q_positions, kv_positions, q_segments, kv_segments, window)[:, None, None]
            scores = jnp.where(mask, _scores(q, k), _MASKED)
            # Every shift of the exponent gives the same result, so none of them needs a gradient.
            new_top = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(scores, axis=-1)))
            weights = jnp.where(mask, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            values = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return (new_top, total, out * shrink[..., None] + values), None

        (_, total, out), _ = jax.lax.scan(jax.checkpoint(one_kv_block, prevent_cse=False), start, keys)
        out = out / jnp.where(total == 0.0, 1.0, total)[..., None]  # [B, KV, G, T, D]
        return None, jnp.einsum("bkgtd->btkgd", out).astype(q.dtype)

    _, out = jax.lax.scan(jax.checkpoint(one_query_block, prevent_cse=False), None, queries)
    out = jnp.moveaxis(out, 0, 1)  # [B, N, block, KV, G, D]
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :q_len]
