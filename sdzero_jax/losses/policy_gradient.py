"""Policy-gradient losses: log-probs of the sampled tokens in, one value per token out."""

import jax
import jax.numpy as jnp

from sdzero_jax.losses.divergences import at_least_float32
from sdzero_jax.losses.tokens import MAX_LOG_RATIO


def clipped_policy_gradient(
    logp: jax.Array,
    logp_rollout: jax.Array,
    advantage: jax.Array,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> jax.Array:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logp - logp_rollout). [...] -> [...].

    Token-level PPO surrogate with DAPO's asymmetric clip (arXiv 2503.14476) and no KL term. The
    exponent is kept within +-20, so that a stray token cannot overflow.

    Args:
      logp: ln S(y_t) of the student now, [B, R].
      logp_rollout: ln S(y_t) when it was sampled, [B, R]; no gradient flows into it.
      advantage: [B, R] or broadcastable ([B, 1]).
    """
    gap = at_least_float32(logp) - jax.lax.stop_gradient(at_least_float32(logp_rollout))
    ratio = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return -jnp.minimum(ratio * advantage, clipped * advantage)
