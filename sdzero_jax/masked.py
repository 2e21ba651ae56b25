"""Masked reductions: the only place of the package that divides by a token count.

Losses return one value per token; an objective turns a mask into token weights here,
multiplies and sums. Denominators are arguments, so that micro-batches, devices and
hosts can share a global one.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp

LengthMode = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_sum_over_max_length", "sum"]


def masked_sum(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Sum of `values` [...] where `mask` [...] is non-zero, weighted by it; float32 scalar.

    Masked-out entries may be infinite or NaN; they add exactly 0.
    """
    mask = mask.astype(jnp.float32)
    return jnp.sum(jnp.where(mask != 0, values.astype(jnp.float32) * mask, 0.0))


def masked_mean(values: jax.Array, mask: jax.Array, denominator: jax.Array | None = None) -> jax.Array:
    """`masked_sum` over `denominator` (default: the sum of the mask, at least 1)."""
    if denominator is None:
        denominator = jnp.maximum(jnp.sum(mask.astype(jnp.float32)), 1.0)
    return masked_sum(values, mask) / denominator


def length_denominator(mask: jax.Array, mode: LengthMode) -> jax.Array:
    """What `token_weights` divides by: tokens for token_mean, rows with a token for seq_*, 1 for sum.

    Sums over micro-batches, devices and hosts give the global denominator; mode sum needs none
    (1 is not to be added up).

    Args:
      mask: [B, R], non-zero where a token counts.
    """
    if mode not in get_args(LengthMode):
        raise ValueError(f"unknown length mode {mode!r}")
    mask = (mask != 0).astype(jnp.float32)
    if mode == "sum":
        return jnp.float32(1.0)
    if mode == "token_mean":
        return jnp.sum(mask)
    return jnp.sum(jnp.any(mask != 0, axis=-1).astype(jnp.float32))


def token_weights(
    mask: jax.Array, mode: LengthMode, denominator: jax.Array | None = None, max_length: int | None = None
) -> jax.Array:
    """Weights w [B, R] float32 such that sum(w * loss) is the batch loss in the given length mode.

    Args:
      mask: [B, R] non-negative weight of each token; 0 excludes it.
      mode: token_mean (sum over tokens / number of tokens), seq_mean_token_sum (SD-Zero paper:
        per-sequence sum, mean over sequences), seq_mean_token_mean (per-sequence mean, then mean),
        seq_sum_over_max_length (per-sequence sum / max_length, mean over sequences), sum.
      denominator: global denominator; default `length_denominator(mask, mode)` of this batch.
      max_length: needed by seq_sum_over_max_length.
    """
    if mode not in get_args(LengthMode):
        raise ValueError(f"unknown length mode {mode!r}")
    mask = mask.astype(jnp.float32)
    if denominator is None:
        denominator = length_denominator(mask, mode)
    weights = mask / jnp.maximum(denominator, 1.0)
    if mode == "seq_mean_token_mean":
        tokens = jnp.sum((mask != 0).astype(jnp.float32), axis=-1, keepdims=True)
        weights = weights / jnp.maximum(tokens, 1.0)
    elif mode == "seq_sum_over_max_length":
        if not max_length:
            raise ValueError("length mode seq_sum_over_max_length needs max_length > 0")
        weights = weights / max_length
    return weights
