"""Losses as pure functions: log-probs in, one value per token out; student first, teacher second."""

from sdzero_jax.losses.divergences import Divergence, forward_kl, jsd, mixed_kl, reverse_kl
from sdzero_jax.losses.policy_gradient import clipped_policy_gradient
from sdzero_jax.losses.registry import DIVERGENCES, get_divergence, needs_ids
from sdzero_jax.losses.tokens import (
    SAMPLE_MASKS,
    KLEstimates,
    importance_weight,
    kl_estimates,
    sample_mask,
    sampled_token_loss,
    temper,
    token_clip,
    token_clip_factor,
)
from sdzero_jax.losses.truncated import pointwise_clip, topk_divergence

__all__ = [
    "DIVERGENCES",
    "SAMPLE_MASKS",
    "Divergence",
    "KLEstimates",
    "clipped_policy_gradient",
    "forward_kl",
    "get_divergence",
    "importance_weight",
    "jsd",
    "kl_estimates",
    "mixed_kl",
    "needs_ids",
    "pointwise_clip",
    "reverse_kl",
    "sample_mask",
    "sampled_token_loss",
    "temper",
    "token_clip",
    "token_clip_factor",
    "topk_divergence",
]
