"""Per-token losses and factors from the log-probs of the sampled token alone, [...] -> [...].

Also the monitors k1, k2, k3, the temperature, and the masks that choose whole samples.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sdzero_jax.losses import spec
from sdzero_jax.losses.divergences import at_least_float32

MAX_LOG_RATIO = 20.0  # exp(20) is finite in float32 with room to multiply
SAMPLE_MASKS = ("all", "only_wrong", "only_correct", "only_finished")


def sampled_token_loss(student_logp_y: jax.Array, teacher_logp_y: jax.Array) -> jax.Array:
    """-sg(ln T(y_t) - ln S(y_t)) ln S(y_t), [...] -> [...] in nats.

    Its gradient is an unbiased, high-variance estimate of that of reverse_kl per position when y is
    sampled from S; its value estimates nothing. Source: on-policy distillation, an option of SDPO.
    """
    student, teacher = at_least_float32(student_logp_y), at_least_float32(teacher_logp_y)
    return -jax.lax.stop_gradient(teacher - student) * student


def token_clip_factor(loss: jax.Array, tau: float) -> jax.Array:
    """sg(tau / max(loss, tau)), [...] in (0, 1]: what `token_clip` multiplies by.

    1 for losses up to tau, slightly negative ones included, where min(1, tau / loss) would explode.
    """
    tau = spec.number("token_clip tau", tau, 0.0, math.inf, open_low=True)
    return jax.lax.stop_gradient(tau / jnp.maximum(at_least_float32(loss), tau))


def token_clip(loss: jax.Array, tau: float) -> jax.Array:
    """loss * sg(tau / max(loss, tau)): caps a token's loss at tau nats, keeps its gradient's direction.

    [...] -> [...]. Source: OPSD.
    """
    loss = at_least_float32(loss)
    clipped = loss * token_clip_factor(loss, tau)
    return jnp.where(jnp.isinf(loss) & (loss > 0), tau, clipped)  # inf * 0 would be NaN


def importance_weight(logp: jax.Array, logp_rollout: jax.Array, cap: float = 2.0) -> jax.Array:
    """sg(min(exp(clip(ln S - ln S_rollout, -20, 20)), cap)): factor for a per-token loss, [...] -> [...].

    Args:
      logp: ln S(y_t) of the student now.
      logp_rollout: ln S(y_t) when it was sampled, at the same temperature.
      cap: largest weight (truncated importance sampling; SDPO 2).
    """
    gap = at_least_float32(logp) - at_least_float32(logp_rollout)
    ratio = jnp.exp(jnp.clip(gap, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return jax.lax.stop_gradient(jnp.minimum(ratio, cap))


def temper(logp: jax.Array, temperature: float) -> jax.Array:
    """Log-probs of softmax(logits / temperature), from logits or log-probs, [..., V] -> [..., V]."""
    temperature = spec.number("temperature", temperature, 0.0, math.inf, open_low=True)
    return jax.nn.log_softmax(at_least_float32(logp) / temperature, axis=-1)


class KLEstimates(NamedTuple):
    """Monte-Carlo estimates of reverse KL from sampled tokens, each [...] in nats."""

    k1: jax.Array
    k2: jax.Array
    k3: jax.Array


def kl_estimates(student_logp_y: jax.Array, teacher_logp_y: jax.Array) -> KLEstimates:
    """k1 = -A, k2 = A^2 / 2, k3 = e^A - 1 - A with A = ln T(y_t) - ln S(y_t). Monitors, not losses."""
    a = jax.lax.stop_gradient(at_least_float32(teacher_logp_y) - at_least_float32(student_logp_y))
    return KLEstimates(k1=-a, k2=a * a / 2, k3=jnp.expm1(a) - a)


def sample_mask(name: str, reward: jax.Array, finished: jax.Array) -> jax.Array:
    """Which samples count, [B] float32 in {0, 1}.

    Args:
      name: all (SD-Zero), only_wrong, only_correct, only_finished.
      reward: [B], 1 correct, 0 wrong, NaN no verdict: such a sample never counts.
      finished: [B], non-zero where the response ended by itself.
    Raises UserError for another name.
    """
    spec.choice("sample mask", name, SAMPLE_MASKS)
    reward, finished = jnp.asarray(reward), jnp.asarray(finished)
    keep = ~jnp.isnan(reward.astype(jnp.float32))
    if name == "only_wrong":
        keep &= reward < 0.5
    elif name == "only_correct":
        keep &= reward >= 0.5
    elif name == "only_finished":
        keep &= finished != 0
    return keep.astype(jnp.float32)
