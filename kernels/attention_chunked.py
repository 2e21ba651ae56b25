"""Attention by blocks in plain XLA: an online softmax forward, a recomputing backward.

One block of scores exists at a time, forward and backward (FlashAttention, arXiv:2205.14135 and
arXiv:2307.08691, without its memory hierarchy). Key blocks that no query of a block can see are not
visited: which those are is read from positions and segments when the program runs, so a causal row
costs half, a window costs its width, and empty cache slots, padding and other segments cost nothing.
Left out: dropout, biases, forward-mode derivatives.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Largest blocks; on a CPU 256 x 256 was fastest at 600 to 2,048 tokens.
QUERY_BLOCK = 256
KV_BLOCK = 256
# Stands for -inf where -inf - -inf would give nan.
MASKED = -1e30
_FAR = 1 << 29  # beyond every position and segment id; twice it still fits int32


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


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, KV, G, D], k [B, S, KV, D] -> float32 [B, KV, G, T, S], scaled by D ** -0.5."""
    products = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    return products / math.sqrt(q.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def chunked_attention(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    """Attention of q [B, T, KV, G, D] over k, v [B, S, KV, D] -> [B, T, KV, G, D] in q's dtype.

    Positions and segments int32 [B, T] and [B, S]; what sees what is `visible`. A query that sees no key
    gets zeros. Gradients of k and v are accumulated in float32.
    """
    return _forward(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window)[0]


def _forward(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    """(out [B, T, KV, G, D], log-sum-exp of the scores [N, B, KV, G, block] float32)."""
    q_len, q_size, kv_size = q.shape[1], *_sizes(q, k)
    visits = _visits(q_positions, kv_positions, q_segments, kv_segments, window, q_size, kv_size)
    queries = tuple(_blocks(x, q_size) for x in (q, q_positions, q_segments))
    keys = tuple(_padded(x, kv_size) for x in (k, v, kv_positions, kv_segments))

    def one_query_block(_, block):
        (q, q_positions, q_segments), (first, last) = block
        batch, size, kv_heads, group, head_dim = q.shape
        rows = (batch, kv_heads, group, size)
        start = (
            jnp.full(rows, MASKED, jnp.float32),  # running maximum
            jnp.zeros(rows, jnp.float32),  # running sum of weights
            jnp.zeros((*rows, head_dim), jnp.float32),  # running weighted sum of values
        )

        def one_kv_block(index, carry):
            top, total, out = carry
            k, v, kv_positions, kv_segments = (_block(x, index, kv_size) for x in keys)
            mask = visible(q_positions, kv_positions, q_segments, kv_segments, window)[:, None, None]
            masked = jnp.where(mask, scores(q, k), MASKED)
            new_top = jnp.maximum(top, jnp.max(masked, axis=-1))
            weights = jnp.where(mask, jnp.exp(masked - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            values = jnp.einsum("bkgts,bskd->bkgtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + values

        top, total, out = jax.lax.fori_loop(first, last, one_kv_block, start)
        total = jnp.where(total == 0.0, 1.0, total)
        out = jnp.einsum("bkgtd->btkgd", out / total[..., None]).astype(q.dtype)
        return None, (out, top + jnp.log(total))

    _, (out, log_total) = jax.lax.scan(one_query_block, None, (queries, visits))
    return _joined(out, q_len), log_total


def _forward_rule(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    out, log_total = _forward(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window)
    return out, (q, k, v, q_positions, kv_positions, q_segments, kv_segments, out, log_total)


def _backward_rule(window, residuals, d_out):
    q, k, v, q_positions, kv_positions, q_segments, kv_segments, out, log_total = residuals
    q_len, kv_len, q_size, kv_size = q.shape[1], k.shape[1], *_sizes(q, k)
    visits = _visits(q_positions, kv_positions, q_segments, kv_segments, window, q_size, kv_size)
    # Sum over keys of weight times its gradient, which the softmax subtracts: [B, T, KV, G].
    mean = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    queries = tuple(_blocks(x, q_size) for x in (q, q_positions, q_segments, d_out, mean))
    keys = tuple(_padded(x, kv_size) for x in (k, v, kv_positions, kv_segments))

    def one_query_block(carry, block):
        (q, q_positions, q_segments, d_out, mean), log_total, (first, last) = block
        mean = jnp.einsum("btkg->bkgt", mean)

        def one_kv_block(index, carry):
            dq, dk, dv = carry
            k, v, kv_positions, kv_segments = (_block(x, index, kv_size) for x in keys)
            mask = visible(q_positions, kv_positions, q_segments, kv_segments, window)[:, None, None]
            weights = jnp.where(mask, jnp.exp(scores(q, k) - log_total[..., None]), 0.0)  # [B, KV, G, T, S]
            d_weights = jnp.einsum("btkgd,bskd->bkgts", d_out, v, preferred_element_type=jnp.float32)
            d_scores = (weights * (d_weights - mean[..., None]) / math.sqrt(q.shape[-1])).astype(q.dtype)
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            dq += product("bkgts,bskd->btkgd", d_scores, k)
            dk = _add(dk, product("bkgts,btkgd->bskd", d_scores, q), index)
            dv = _add(dv, product("bkgts,btkgd->bskd", weights.astype(d_out.dtype), d_out), index)
            return dq, dk, dv

        start = (jnp.zeros(q.shape, jnp.float32), *carry)
        dq, *carry = jax.lax.fori_loop(first, last, one_kv_block, start)
        return tuple(carry), dq.astype(q.dtype)

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
    (dk, dv), dq = jax.lax.scan(one_query_block, start, (queries, log_total, visits))
    return (_joined(dq, q_len), dk[:, :kv_len].astype(k.dtype), dv[:, :kv_len].astype(v.dtype), *(None,) * 4)


chunked_attention.defvjp(_forward_rule, _backward_rule)


def _visits(q_positions, kv_positions, q_segments, kv_segments, window, q_size, kv_size):
    """(first, last), each [N] int32: block n of the queries sees keys in the key blocks first to last - 1 only.

    Found from the ranges of positions and segments in each block, so a visited block may still be all masked.
    """

    def ranges(x, segments, size):  # two [B, N]
        real = _padded(segments, size).reshape(segments.shape[0], -1, size) != 0
        x = _padded(x, size).reshape(real.shape)
        return jnp.min(x, axis=-1, where=real, initial=_FAR), jnp.max(x, axis=-1, where=real, initial=-_FAR)

    q_low, q_high = (x[:, :, None] for x in ranges(q_positions, q_segments, q_size))
    kv_low, kv_high = (x[:, None, :] for x in ranges(kv_positions, kv_segments, kv_size))
    q_first, q_last = (x[:, :, None] for x in ranges(q_segments, q_segments, q_size))
    kv_first, kv_last = (x[:, None, :] for x in ranges(kv_segments, kv_segments, kv_size))
    needed = (q_high >= kv_low) & (q_last >= kv_first) & (q_first <= kv_last)  # [B, N, M]
    if window is not None:
        needed &= q_low - kv_high < window
    needed = jnp.any(needed, axis=0)  # over the batch: its rows go through the blocks together
    first = jnp.argmax(needed, axis=1)
    last = needed.shape[1] - jnp.argmax(needed[:, ::-1], axis=1)
    return first.astype(jnp.int32), jnp.where(jnp.any(needed, axis=1), last, first).astype(jnp.int32)


def _sizes(q: jax.Array, k: jax.Array) -> tuple[int, int]:
    return _even(q.shape[1], QUERY_BLOCK), _even(k.shape[1], KV_BLOCK)


def _even(length: int, most: int) -> int:
    """Size of blocks of at most `most`, all but equal, so that little of the last one is padding."""
    blocks = max(1, -(-length // most))
    return length if blocks == 1 else min(most, -(-length // (8 * blocks)) * 8)


def _padded(x: jax.Array, size: int) -> jax.Array:
    """[B, N, ...] with zeros (segment 0) after it, up to a whole number of blocks."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (x.ndim - 2))


def _block(x: jax.Array, index: jax.Array, size: int) -> jax.Array:
    """Block `index` of [B, N, ...]."""
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _add(x: jax.Array, block: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, N, ...] with `block` added to its block `index`."""
    start = index * block.shape[1]
    block = block + jax.lax.dynamic_slice_in_dim(x, start, block.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=1)


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, N, ...] -> [N / size, B, size, ...], padded to whole blocks."""
    x = _padded(x, size)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _joined(x: jax.Array, length: int) -> jax.Array:
    """[N, B, block, ...] -> [B, length, ...]: the inverse of `_blocks`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
