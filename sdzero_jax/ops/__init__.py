"""Operators that choose their implementation; the only room that imports `kernels`."""

from sdzero_jax.ops.attention import attention
from sdzero_jax.ops.linear_divergence import (
    PerToken,
    linear_divergence,
    linear_divergence_loss,
    linear_logprob,
    linear_logprob_loss,
)

__all__ = [
    "PerToken",
    "attention",
    "linear_divergence",
    "linear_divergence_loss",
    "linear_logprob",
    "linear_logprob_loss",
]
