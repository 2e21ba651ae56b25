"""Divergences between student and teacher over the whole vocabulary, one value per token.

Every function takes log-probs, student first and teacher second, [..., V] -> [...]. Statistics are
float32 (float64 stays float64) whatever the input dtype. Entries that are -inf on both sides (padding
of the vocabulary) add exactly 0; -inf on the side that is divided by, where the other side has mass,
gives +inf. A token of infinite value has gradient 0, so log-probs without NaN never give NaN.

Derivatives are written by hand and are those on the simplex: a multiple of the distribution itself,
which log_softmax would remove anyway, is left out. So they are right for log-probs that come out of
log_softmax, and exactly 0 where student and teacher are bit-identical.

Leaves out masks and means: `masked.py` does these.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sdzero_jax.losses import spec

Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _weighted(p: jax.Array, log_ratio: jax.Array) -> jax.Array:
    """p * log_ratio, exactly 0 where p is 0 (the ratio may be infinite or NaN there); NaN in p stays."""
    return jnp.where(p == 0, 0.0, p * log_ratio)


def _score(p: jax.Array, log_ratio: jax.Array, kl: jax.Array) -> jax.Array:
    """d/d(logits of p) of KL = sum p * log_ratio: p * (log_ratio - KL); 0 where KL is infinite."""
    kl = kl[..., None]
    return jnp.where((p == 0) | jnp.isinf(kl), 0.0, p * (log_ratio - kl))


@jax.custom_jvp
def _kl(p_logp: jax.Array, q_logp: jax.Array) -> jax.Array:
    """KL(p || q) = sum p (ln p - ln q)."""
    return jnp.sum(_weighted(jnp.exp(p_logp), p_logp - q_logp), axis=-1)


def _kl_jvp_p(tangent, value, p_logp, q_logp):
    return jnp.sum(_score(jnp.exp(p_logp), p_logp - q_logp, value) * tangent, axis=-1)


def _kl_jvp_q(tangent, value, p_logp, q_logp):
    nothing = (p_logp == q_logp) | jnp.isinf(value)[..., None]  # exp of equals may differ in the last bit
    return jnp.sum(jnp.where(nothing, 0.0, jnp.exp(q_logp) - jnp.exp(p_logp)) * tangent, axis=-1)


_kl.defjvps(_kl_jvp_p, _kl_jvp_q)


def forward_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """sum_v T (ln T - ln S): the expectation is over the teacher. [..., V] -> [...] in nats.

    Used by SDFT and by GKD at beta = 0.
    """
    return _kl(at_least_float32(teacher_logp), at_least_float32(student_logp))


def reverse_kl(student_logp: jax.Array, teacher_logp: jax.Array) -> jax.Array:
    """sum_v S (ln S - ln T): the expectation is over the student. [..., V] -> [...] in nats.

    The loss of the SD-Zero paper (arXiv 2604.12002). Rounding may leave it slightly negative.
    """
    return _kl(at_least_float32(student_logp), at_least_float32(teacher_logp))


def mixed_kl(student_logp: jax.Array, teacher_logp: jax.Array, weight: float = 0.5) -> jax.Array:
    """weight * forward_kl + (1 - weight) * reverse_kl. [..., V] -> [...] in nats.

    `weight` in [0, 1]. The loss of the SD-Zero authors' code with weight = 0.5.
    """
    weight = spec.number("mixed_kl weight", weight, 0.0, 1.0)
    if weight == 1.0:  # 0 times an infinite reverse KL would be NaN
        return forward_kl(student_logp, teacher_logp)
    if weight == 0.0:
        return reverse_kl(student_logp, teacher_logp)
    forward = forward_kl(student_logp, teacher_logp)
    value = weight * forward + (1.0 - weight) * reverse_kl(student_logp, teacher_logp)
    return jnp.where(jnp.isinf(value), jnp.inf, value)  # one infinite half takes the other's gradient too


def jsd(student_logp: jax.Array, teacher_logp: jax.Array, beta: float = 0.5) -> jax.Array:
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = (1 - beta) S + beta T. [..., V] -> [...] in nats.

    `beta` in [0, 1]; the ends are DEFINED as forward_kl (0) and reverse_kl (1), as in GKD and TRL: the
    formula itself would vanish there, so the scale jumps between 0 and 0.001. Always finite inside.
    Source: generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649); OPSD at beta = 0.5.
    """
    beta = spec.number("jsd beta", beta, 0.0, 1.0)
    if beta == 0.0:
        return forward_kl(student_logp, teacher_logp)
    if beta == 1.0:
        return reverse_kl(student_logp, teacher_logp)
    return _jsd(beta)(at_least_float32(student_logp), at_least_float32(teacher_logp))


def _log_ratios_to_mixture(s: jax.Array, t: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """ln S - ln M and ln T - ln M, exactly 0 where s == t.

    From ln M = max(s, t) + log1p(c expm1(-|s - t|)), c the weight of the smaller: one exp, no overflow.
    """
    gap = jnp.where(s == t, 0.0, s - t)  # -inf on both sides would give NaN
    c = jnp.where(gap >= 0, beta, 1.0 - beta)
    rise = jnp.log1p(c * jnp.expm1(-jnp.abs(gap)))
    return jnp.minimum(gap, 0.0) - rise, jnp.minimum(-gap, 0.0) - rise


@functools.cache
def _jsd(beta: float) -> Divergence:
    @jax.custom_jvp
    def value_of(s, t):
        s_to_m, t_to_m = _log_ratios_to_mixture(s, t, beta)
        terms = beta * _weighted(jnp.exp(t), t_to_m) + (1.0 - beta) * _weighted(jnp.exp(s), s_to_m)
        return jnp.sum(terms, axis=-1)

    def jvp_s(tangent, _, s, t):  # the derivative through M cancels
        p, ratio = jnp.exp(s), _log_ratios_to_mixture(s, t, beta)[0]
        kl = jnp.sum(_weighted(p, ratio), axis=-1)
        return (1.0 - beta) * jnp.sum(_score(p, ratio, kl) * tangent, axis=-1)

    def jvp_t(tangent, _, s, t):
        p, ratio = jnp.exp(t), _log_ratios_to_mixture(s, t, beta)[1]
        kl = jnp.sum(_weighted(p, ratio), axis=-1)
        return beta * jnp.sum(_score(p, ratio, kl) * tangent, axis=-1)

    value_of.defjvps(jvp_s, jvp_t)
    return value_of


FULL = {
    "forward_kl": (forward_kl, ()),
    "reverse_kl": (reverse_kl, ()),
    "mixed_kl": (mixed_kl, ("weight",)),
    "jsd": (jsd, ("beta",)),
}  # name -> (function, settings in positional order): divergences between two whole distributions


def kl_parts(text: str) -> tuple[str, float]:
    """Name and setting with the KLs as ends of mixed_kl: forward_kl -> ("mixed_kl", 1.0).

    For the variants that need the terms and not the sum. Raises UserError for other names.
    """
    name, settings = spec.bind(text, FULL)
    if name in ("forward_kl", "reverse_kl"):
        return "mixed_kl", 1.0 if name == "forward_kl" else 0.0
    what = FULL[name][1][0]
    setting = spec.number(f"{name} {what}", settings.get(what, 0.5), 0.0, 1.0)
    if name == "jsd" and setting in (0.0, 1.0):
        return "mixed_kl", 1.0 - setting
    return name, setting


def terms(student_logp: jax.Array, teacher_logp: jax.Array, divergence: str) -> jax.Array:
    """What a divergence sums over the vocabulary, by entry, with the ordinary partial derivatives.

    [..., V] -> [..., V]; infinite terms have gradient 0. For distributions that do not sum to 1.
    """
    s, t = at_least_float32(student_logp), at_least_float32(teacher_logp)
    name, setting = kl_parts(divergence)
    if name == "jsd":
        return setting * _jsd_term(t, s, setting) + (1.0 - setting) * _jsd_term(s, t, 1.0 - setting)
    out = jnp.zeros_like(s)
    if setting > 0.0:
        out = out + setting * kl_terms(t, s)
    if setting < 1.0:
        out = out + (1.0 - setting) * kl_terms(s, t)
    return out


def kl_terms(p_logp: jax.Array, q_logp: jax.Array) -> jax.Array:
    """p (ln p - ln q) by entry with the ordinary derivatives; +inf with gradient 0 where only q is 0."""
    has_mass, reachable = jnp.exp(p_logp) != 0, q_logp != -jnp.inf
    p_logp = jnp.where(has_mass, p_logp, 0.0)
    q_logp = jnp.where(has_mass & reachable, q_logp, 0.0)
    finite = jnp.where(has_mass & reachable, jnp.exp(p_logp) * (p_logp - q_logp), 0.0)
    return jnp.where(has_mass & ~reachable, jnp.inf, finite)


def _jsd_term(p_logp: jax.Array, q_logp: jax.Array, weight: float) -> jax.Array:
    """p ln(p / (weight p + (1 - weight) q)) by entry."""
    has_mass = jnp.exp(p_logp) != 0
    p_logp = jnp.where(has_mass, p_logp, 0.0)
    mixture = jnp.logaddexp(p_logp + math.log(weight), q_logp + math.log1p(-weight))
    return jnp.where(has_mass, jnp.exp(p_logp) * (p_logp - mixture), 0.0)
