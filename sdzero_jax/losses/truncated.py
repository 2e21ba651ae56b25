"""Divergences that see only part of the vocabulary: top-k supports and the pointwise clip.

Values per token, [..., V] -> [...], student first. See `divergences.py` for dtypes, -inf and padding.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sdzero_jax.errors import UserError
from sdzero_jax.losses import spec
from sdzero_jax.losses.divergences import FULL, at_least_float32, kl_parts, terms

SUPPORTS = ("teacher", "student")
TAILS = ("renormalise", "bucket", "zero_outside")
OUTSIDE_LOGP = -100.0  # what the authors' code puts for ln T outside of the support


def topk_divergence(
    student_logp: jax.Array,
    teacher_logp: jax.Array,
    k: int,
    *,
    support: str = "teacher",
    tail: str = "renormalise",
    divergence: str = "reverse_kl",
) -> jax.Array:
    """A divergence on the k likeliest entries of one side. [..., V] -> [...] in nats.

    Args:
      k: entries kept (all of them when k >= V).
      support: whose top k: "teacher" (SD-Zero authors' code, k = 64) or "student" (SDPO, k = 100).
      tail: "renormalise": both sides softmax over the support, blind to all mass outside;
        "bucket": the mass outside becomes one more entry, ln(1 - sum p), on both sides (SDPO);
        "zero_outside": true student probabilities against the renormalised teacher; the reverse part
        adds H_rest + 100 P_rest with H_rest = sum_V S ln S - sum_K S ln S, P_rest = 1 - sum_K S.
      divergence: forward_kl, reverse_kl, mixed_kl(w) or jsd(beta), as text.
    Raises UserError for unknown names. A side without any mass in the support counts as -inf on it.
    """
    spec.choice("support", support, SUPPORTS)
    spec.choice("tail", tail, TAILS)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise UserError(f"topk k is {k!r}, wanted a whole number of at least 1")
    name, settings = spec.bind(divergence, FULL)
    inner = functools.partial(FULL[name][0], **settings)

    s, t = at_least_float32(student_logp), at_least_float32(teacher_logp)
    ranked = jax.lax.stop_gradient(t if support == "teacher" else s)
    index = jax.lax.top_k(ranked, min(k, s.shape[-1]))[1]  # [..., K]
    s_k = jnp.take_along_axis(s, index, axis=-1)  # [..., K]
    t_k = jnp.take_along_axis(t, index, axis=-1)
    if tail == "renormalise":
        return inner(_renormalise(s_k), _renormalise(t_k))
    if tail == "bucket":
        return inner(_with_bucket(s_k), _with_bucket(t_k))
    inside = jnp.put_along_axis(jnp.zeros(s.shape, bool), index, True, axis=-1, inplace=False)
    return _zero_outside(s, s_k, _renormalise(t_k), ~inside, divergence)


def _log_mass(logp: jax.Array) -> jax.Array:
    """ln sum p over the last axis, [..., K] -> [..., 1]; -inf with gradient 0 when there is none."""
    some = jnp.any(logp != -jnp.inf, axis=-1, keepdims=True)
    mass = jax.nn.logsumexp(jnp.where(some, logp, 0.0), axis=-1, keepdims=True)
    return jnp.where(some, mass, -jnp.inf)


def _renormalise(logp: jax.Array) -> jax.Array:
    mass = _log_mass(logp)
    return logp - jnp.where(mass != -jnp.inf, mass, 0.0)


def _with_bucket(logp: jax.Array) -> jax.Array:
    """Appends ln(1 - sum p), [..., K] -> [..., K + 1]; at least ln 1e-7."""
    rest = jnp.log(-jnp.expm1(jnp.minimum(_log_mass(logp), -1e-7)))
    return jnp.concatenate([logp, rest], axis=-1)


def _zero_outside(s: jax.Array, s_k: jax.Array, t_k: jax.Array, outside: jax.Array, divergence: str):
    """Terms on the support plus H_rest + 100 P_rest, the rest summed directly: 1 - sum_K S cancels badly."""
    reachable = outside & (s != -jnp.inf)
    safe = jnp.where(reachable, s, 0.0)
    p_rest = jnp.where(reachable, jnp.exp(safe), 0.0)  # [..., V]
    name, setting = kl_parts(divergence)
    if name == "jsd":  # T = 0 outside, so M = (1 - beta) S there
        rest = -(1.0 - setting) * math.log1p(-setting) * p_rest
    else:
        rest = (1.0 - setting) * p_rest * (safe - OUTSIDE_LOGP)
    inside = jnp.sum(terms(s_k, t_k, divergence), axis=-1)
    # An infinite token has no gradient.
    return jnp.where(jnp.isinf(inside), jnp.inf, inside + jnp.sum(rest, axis=-1))


def pointwise_clip(
    student_logp: jax.Array, teacher_logp: jax.Array, cap: float, *, divergence: str = "forward_kl"
) -> jax.Array:
    """sum_v min(term_v, cap): each vocabulary term of the divergence clipped from above. [..., V] -> [...].

    Terms can be negative and only large positive ones are cut, so the sum can turn negative and its
    minimum need not be at S = T; kept because OPSD uses it. Clipped terms have gradient 0.

    Args:
      cap: the largest term, in nats, > 0.
      divergence: forward_kl, reverse_kl, mixed_kl(w) or jsd(beta), as text.
    """
    cap = spec.number("pointwise_clip cap", cap, 0.0, math.inf, open_low=True)
    each = terms(student_logp, teacher_logp, divergence)
    value = jnp.sum(jnp.where(each < cap, each, cap), axis=-1)
    # A multiple of sum S, constant on the simplex, cancels the terms' own at S = T: the gradient
    # vanishes there by subtraction of equals and not up to the rounding of sum S = 1.
    name, setting = kl_parts(divergence)
    if name == "jsd":
        return value
    ones = (2.0 * setting - 1.0) * jnp.sum(jnp.exp(at_least_float32(student_logp)), axis=-1)
    return value + (ones - jax.lax.stop_gradient(ones))
