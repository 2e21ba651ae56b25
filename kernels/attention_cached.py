"""Attention of new tokens over a cache: what is stored, what waits in the tail, and the tokens themselves.

The stored keys are read in chunks with an online softmax, up to the longest live row, so one program
serves every length and a chunk that a row does not reach leaves its result bit for bit as it was. Keys
may be stored as int8 or fp8 with a scale per token and head. Forward only.
Left out: a kernel that gives each row its own number of chunks.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.attention_chunked import MASKED


class Stored(NamedTuple):
    """Keys and values of N layers, cut into chunks of C slots; position p of a row lies in slot p % (chunks * C)."""

    k: jax.Array  # [N, chunks, B, KV, D, C], transposed for the product that reads it
    v: jax.Array  # [N, chunks, B, KV, C, D]
    k_scale: jax.Array | None  # [N, chunks, B, KV, C], None when not quantised
    v_scale: jax.Array | None
    length: jax.Array  # [B] tokens of the row so far

    @property
    def slots(self) -> int:
        """Slots per row."""
        return self.v.shape[1] * self.v.shape[4]


def slot_positions(slots: jax.Array, length: jax.Array, size: int) -> jax.Array:
    """Position held by each of slots [C] in rows of `length` [B] tokens: int32 [B, C], negative = none.

    The latest position below the length that falls on the slot, counting round and round `size` slots.
    """
    return slots + size * ((length[:, None] - 1 - slots) // size)


def chunks_needed(stored: Stored, length: jax.Array) -> jax.Array:
    """How many chunks hold the tokens of the longest of rows of `length` [B]."""
    chunk = stored.v.shape[4]
    return (jnp.minimum(jnp.max(length), stored.slots) + chunk - 1) // chunk


def cached_attention(
    q: jax.Array,
    new: tuple[jax.Array, jax.Array],
    tail: tuple[jax.Array, jax.Array, jax.Array],
    stored: Stored,
    layer: jax.Array,
    chunks: jax.Array,
    q_positions: jax.Array,
    window: int | None,
) -> jax.Array:
    """Softmax attention of q over earlier tokens of its row.

    Args:
      q: [B, T, H, D], at q_positions int32 [B, T]; negative is padding, which sees nothing.
      new: (k, v) [B, KV, T, D] of the same tokens.
      tail: (k, v) [B, KV, K, D] and positions [B, K] of tokens that are not stored yet; negative is unused.
      stored: what is stored, in no slots or many; `layer` picks from its first axis.
      chunks: how many chunks of `stored` to visit, see `chunks_needed`.
    Returns: [B, T, H, D] in q's dtype.
    """
    batch, queries, heads, width = q.shape
    kv_heads, group = new[0].shape[1], heads // new[0].shape[1]
    # All queries that share a key head, [B, KV, M, D] with M = T * G: one plain product per key head.
    flat = q.reshape(batch, queries, kv_heads, group, width).swapaxes(1, 2).reshape(batch, kv_heads, -1, width)
    flat_positions = jnp.repeat(q_positions, group, axis=1)  # [B, M]

    def seen(positions):  # [B, S] -> [B, 1, M, S]
        distance = flat_positions[:, :, None] - positions[:, None, :]
        mask = (positions[:, None, :] >= 0) & (distance >= 0)
        mask = mask if window is None else mask & (distance < window)
        return mask[:, None]

    def few(running, k, v, positions):  # k, v [B, KV, S, D]
        products = _product("bkmd,bksd->bkms", flat, k) / math.sqrt(width)
        return _fold(running, products, seen(positions), lambda weights: _product("bkms,bksd->bkmd", weights, v))

    rows = flat.shape[:3]
    running = (
        jnp.full(rows, MASKED, jnp.float32),  # running maximum
        jnp.zeros(rows, jnp.float32),  # running sum of weights
        jnp.zeros(flat.shape, jnp.float32),  # running weighted sum of values
    )
    if stored.slots:
        running = _fold_stored(running, flat, stored, layer, chunks, seen)
    running = few(running, *tail)
    _, total, out = few(running, *new, q_positions)
    out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
    return out.reshape(batch, kv_heads, queries, group, width).swapaxes(1, 2).reshape(q.shape).astype(q.dtype)


def _fold_stored(running, q, stored: Stored, layer, chunks, seen):
    """The first `chunks` chunks of a layer's stored keys and values, folded into the running softmax."""
    chunk = stored.v.shape[4]

    def part(x, index):  # chunk [B, KV, ...] of x [N, chunks, B, KV, ...]
        starts = (layer, index, *(0,) * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, starts, (1, 1, *x.shape[2:]))[0, 0]

    def one(index, running):
        k = part(stored.k, index).astype(q.dtype)  # [B, KV, D, C]
        products = _product("bkmd,bkds->bkms", q, k) / math.sqrt(q.shape[-1])
        if stored.k_scale is not None:
            products *= part(stored.k_scale, index)[:, :, None]
        positions = slot_positions(index * chunk + jnp.arange(chunk), stored.length, stored.slots)

        def values(weights):
            if stored.v_scale is not None:
                weights = weights * part(stored.v_scale, index)[:, :, None]
            return _product("bkms,bksd->bkmd", weights, part(stored.v, index).astype(q.dtype))

        return _fold(running, products, seen(positions), values)

    return jax.lax.fori_loop(0, chunks, one, running)


def _fold(running, products, mask, values):
    """One more piece of keys: products [B, KV, M, S], mask [B, 1, M, S], values(weights) [B, KV, M, D]."""
    top, total, out = running
    masked = jnp.where(mask, products, MASKED)
    new_top = jnp.maximum(top, jnp.max(masked, axis=-1))
    weights = jnp.where(mask, jnp.exp(masked - new_top[..., None]), 0.0)
    shrink = jnp.exp(top - new_top)
    return new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + values(weights)


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(spec, x.astype(y.dtype), y, preferred_element_type=jnp.float32)
