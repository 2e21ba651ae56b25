"""Divergence from hidden states with the vocabulary streamed in blocks: what the TPU and GPU kernels share.

Per-token statistics that are updated block by block, the formulas of the KL family and the generalised
Jensen-Shannon divergence, and the order of the sweeps over the vocabulary. Only [block, block] logits
ever exist. Semantics are those of `linear_divergence_chunked`: -inf on both sides adds 0, -inf on one
side where the other has mass gives +inf with gradient 0, tokens of weight 0 add exactly 0.

Products of N x D x V: two for the statistics (JSD two more, because the mixture needs both normalisers),
then three for the gradient of the hidden states and three for that of the unembedding. The chunked loss
form needs four in all, but moves [tile, V] logits through memory several times.
Left out: the kernels themselves, truncated divergences, arbitrary functions, a sharded vocabulary.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import linear_divergence_chunked as chunked
from kernels.linear_divergence_chunked import Tokens, Values

MAX_VOCABULARY = 2**24  # ids travel as float32 among the other numbers of a token


class Form(NamedTuple):
    """Which divergence. kind "kl": weight * forward KL + (1 - weight) * reverse KL; "jsd": weight is beta."""

    kind: str
    weight: float

    @property
    def forward(self) -> bool:
        """Whether the forward KL is part of it."""
        return self.kind == "kl" and self.weight > 0.0

    @property
    def reverse(self) -> bool:
        return self.kind == "kl" and self.weight < 1.0


@dataclasses.dataclass(frozen=True)
class Settings(chunked.Settings):
    """As for the chunked path; `divergence`, `tile` and `varying_axes` go unused.

    kernel: the module whose sweeps run. interpret: on a CPU, for tests. blocks: tokens and columns per
    block (None: the kernel's choice).
    """

    form: Form = Form("kl", 0.0)
    kernel: ModuleType | None = None
    interpret: bool = False
    blocks: tuple[int, int] | None = None


class Reduce(NamedTuple):
    """How a kernel reduces [n, v] over the vocabulary and broadcasts the result back."""

    highest: Callable[[jax.Array], jax.Array]
    total: Callable[[jax.Array], jax.Array]
    wide: Callable[[jax.Array], jax.Array]


class Statistics(NamedTuple):
    """Running numbers per token, over the columns seen so far."""

    highest_s: jax.Array  # largest logit m
    mass_s: jax.Array  # sum exp(z - m)
    moment_s: jax.Array  # sum exp(z - m) (z - m), for the entropy
    highest_t: jax.Array
    mass_t: jax.Array
    forward: jax.Array  # sum exp(zt - mt) ((zt - mt) - (zs - ms))
    reverse: jax.Array  # sum exp(zs - ms) ((zs - ms) - (zt - mt))
    picked_s: jax.Array  # logit of the id
    picked_t: jax.Array


STATISTICS = len(Statistics._fields)
# Finite, so that no -inf - -inf arises before a column with mass was seen.
INITIAL = Statistics(*(float(jnp.finfo(jnp.float32).min) if "highest" in f else 0.0 for f in Statistics._fields))


class Row(NamedTuple):
    """What the later sweeps need to know of a token."""

    highest_s: jax.Array
    log_mass_s: jax.Array
    highest_t: jax.Array
    log_mass_t: jax.Array
    centre: jax.Array  # mean over S of the log ratio in the gradient: reverse KL or KL(S || M)
    entropy: jax.Array
    ids: jax.Array
    value_weight: jax.Array  # cotangents, 0 where the token adds nothing
    logp_weight: jax.Array
    entropy_weight: jax.Array


ROW = len(Row._fields)


# ---- inside a kernel: one block of logits ---------------------------------------------------------


def update(old: Statistics, zs: jax.Array, zt: jax.Array, hit: jax.Array, form: Form, over: Reduce) -> Statistics:
    """Statistics with the columns of zs, zt [n, v] added; hit [n, v] marks the column of the id."""
    highest_s = jnp.maximum(old.highest_s, over.highest(zs))
    highest_t = jnp.maximum(old.highest_t, over.highest(zt))
    shift_s, shift_t = old.highest_s - highest_s, old.highest_t - highest_t
    scale_s, scale_t = jnp.exp(shift_s), jnp.exp(shift_t)
    us, ut = zs - over.wide(highest_s), zt - over.wide(highest_t)
    es, et = jnp.exp(us), jnp.exp(ut)
    mass_s, mass_t = scale_s * old.mass_s, scale_t * old.mass_t

    def moment(old, scale, shift, mass, weight, term):
        # The earlier terms were relative to smaller maxima. Infinite ones survive unless their mass is gone.
        kept = jnp.where(scale == 0, 0.0, scale * old + shift * mass)
        return kept + over.total(jnp.where(weight == 0, 0.0, weight * term))

    forward, reverse = old.forward, old.reverse
    if form.forward:
        forward = moment(forward, scale_t, shift_t - shift_s, mass_t, et, ut - us)
    if form.reverse:
        reverse = moment(reverse, scale_s, shift_s - shift_t, mass_s, es, us - ut)
    return Statistics(
        highest_s,
        mass_s + over.total(es),
        moment(old.moment_s, scale_s, shift_s, mass_s, es, us),
        highest_t,
        mass_t + over.total(et),
        forward,
        reverse,
        old.picked_s + over.total(jnp.where(hit, zs, 0.0)),
        old.picked_t + over.total(jnp.where(hit, zt, 0.0)),
    )


def _log_ratios_to_mixture(s: jax.Array, t: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """ln S - ln M and ln T - ln M of M = (1 - beta) S + beta T, exactly 0 where s == t."""
    gap = jnp.where(s == t, 0.0, s - t)
    c = jnp.where(gap >= 0, beta, 1.0 - beta)
    fall = -jnp.abs(gap)
    drop = c * jnp.tanh(0.5 * fall) * (1.0 + jnp.exp(fall))  # c expm1(fall), which the kernels lack
    above = 1.0 + drop
    rise = jnp.where(above == 1.0, drop, jnp.log(above) * drop / (above - 1.0))  # log1p, which the GPU's lack
    return jnp.minimum(gap, 0.0) - rise, jnp.minimum(-gap, 0.0) - rise


def _log_probs(row: Row, zs: jax.Array, zt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both log-probs; equal logits with equal normalisers give equal bits."""
    return zs - row.highest_s - row.log_mass_s, zt - row.highest_t - row.log_mass_t


def mixture_terms(row: Row, zs: jax.Array, zt: jax.Array, beta: float) -> tuple[jax.Array, jax.Array]:
    """By entry: terms of KL(S || M) and of KL(T || M). `row` broadcasts against zs."""
    s, t = _log_probs(row, zs, zt)
    p, q = jnp.exp(s), jnp.exp(t)
    s_to_m, t_to_m = _log_ratios_to_mixture(s, t, beta)
    return jnp.where(p == 0, 0.0, p * s_to_m), jnp.where(q == 0, 0.0, q * t_to_m)


def logit_gradient(row: Row, zs: jax.Array, zt: jax.Array, hit: jax.Array, form: Form, values: bool) -> jax.Array:
    """d(sum of the weighted results) / dzs by entry, exactly 0 for tokens of weight 0.

    `row` broadcasts against zs. `values`: whether logp_student and entropy have cotangents too.
    """
    s, t = _log_probs(row, zs, zt)
    p = jnp.exp(s)
    # An infinite divergence has weight 0; what is -inf in t here has mass 0 in s, if not to the last bit.
    nothing = (p == 0) | (t == -jnp.inf)
    if form.kind == "jsd":
        ratio = _log_ratios_to_mixture(s, t, form.weight)[0]
        dz = jnp.where(p == 0, 0.0, (1.0 - form.weight) * p * (ratio - row.centre))
    elif form.forward and form.reverse:
        dz = (1.0 - form.weight) * jnp.where(nothing, 0.0, p * (s - t - row.centre))
        dz += form.weight * jnp.where(s == t, 0.0, p - jnp.exp(t))
    elif form.forward:
        dz = jnp.where(s == t, 0.0, p - jnp.exp(t))  # exp of equals may differ in the last bit
    else:
        dz = jnp.where(nothing, 0.0, p * (s - t - row.centre))
    live = row.value_weight != 0
    dz *= row.value_weight
    if values:
        live |= (row.logp_weight != 0) | (row.entropy_weight != 0)
        dz += row.logp_weight * (jnp.where(hit & (s != -jnp.inf), 1.0, 0.0) - p)
        dz -= row.entropy_weight * jnp.where(p == 0, 0.0, p * (s + row.entropy))
    return jnp.where(live, dz, 0.0)


# ---- around the kernels ----------------------------------------------------------------------------


def check(tokens: Tokens, w: jax.Array, settings: Settings) -> None:
    """NotImplementedError for what the kernel does not take."""
    for x in (tokens.student, tokens.teacher):
        if x.dtype not in settings.kernel.DTYPES:
            names = " and ".join(jnp.dtype(d).name for d in settings.kernel.DTYPES)
            raise NotImplementedError(f"these fused kernels take {names}, not {x.dtype}")
    if w.shape[0] > MAX_VOCABULARY:
        raise NotImplementedError(f"the fused kernels take at most {MAX_VOCABULARY} columns, not {w.shape[0]}")


def _values(tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings) -> tuple[Values, Row]:
    """Values of all tokens, and their rows with weights still 0."""
    form, kernel = settings.form, settings.kernel
    n = tokens.student.shape[0]
    ids = jnp.full(n, -1, jnp.int32) if tokens.ids is None else tokens.ids
    nothing = jnp.zeros_like(ids, jnp.float32)
    row = Row(*[nothing] * ROW)._replace(ids=ids.astype(jnp.float32))
    got = kernel.statistics(row, tokens, w, w_teacher, settings)
    normaliser_s = got.highest_s, jnp.log(got.mass_s)
    highest_t, log_mass_t = chunked._snap((got.highest_t, jnp.log(got.mass_t)), normaliser_s)
    row = row._replace(
        highest_s=got.highest_s,
        log_mass_s=normaliser_s[1],
        highest_t=highest_t,
        log_mass_t=log_mass_t,
        entropy=normaliser_s[1] - got.moment_s / got.mass_s,
    )
    gap = row.log_mass_s - row.log_mass_t
    if form.kind == "jsd":
        of_student, of_teacher = kernel.mixture(row, tokens, w, w_teacher, settings)
        value, centre = form.weight * of_teacher + (1.0 - form.weight) * of_student, of_student
    else:
        forward, reverse = got.forward / got.mass_t + gap, got.reverse / got.mass_s - gap
        value, centre = _mixed(forward, reverse, form), reverse
    logp_s = logp_t = None
    if tokens.ids is not None:
        known = (ids >= 0) & (ids < w.shape[0])  # others count as 0, as in the chunked path
        logp_s = jnp.where(known, got.picked_s - got.highest_s - row.log_mass_s, 0.0)
        logp_t = jnp.where(known, got.picked_t - highest_t - log_mass_t, 0.0)
    return Values(value, logp_s, logp_t, row.entropy), row._replace(centre=centre)


def _mixed(forward: jax.Array, reverse: jax.Array, form: Form) -> jax.Array:
    if not form.reverse:
        return forward
    if not form.forward:
        return reverse
    value = form.weight * forward + (1.0 - form.weight) * reverse
    return jnp.where(jnp.isinf(value), jnp.inf, value)


def _gradients(row: Row, values: bool, tokens: Tokens, w, w_teacher, settings: Settings):
    """dh [N, D] in h's dtype and dw [V, D] float32, for the weights in `row`."""
    live = (row.value_weight != 0) | (row.logp_weight != 0) | (row.entropy_weight != 0)

    def clean(h):  # 0 times what a dead token holds would be NaN
        return jnp.where(live[:, None], h, jnp.zeros((), h.dtype))

    tokens = tokens._replace(student=clean(tokens.student), teacher=clean(tokens.teacher))
    return settings.kernel.gradients(row, values, tokens, w, w_teacher, settings)


def values(tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings) -> Values:
    """Values of all tokens, as `chunked.values`."""
    check(tokens, w, settings)
    if tokens.student.shape[0] == 0:
        return chunked.values(tokens, w, w_teacher, settings)
    return _values(tokens, w, w_teacher, settings)[0]


def values_gradients(tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings):
    """(dh, dw) for cotangents of the values, as `chunked.values_gradients`; the statistics are made again."""
    check(tokens, w, settings)
    if tokens.student.shape[0] == 0:
        return chunked.values_gradients(tokens, w, w_teacher, settings)
    out, row = _values(tokens, w, w_teacher, settings)
    cotangent = tokens.cotangent
    finite = ~jnp.isinf(out.value)
    row = row._replace(
        value_weight=jnp.where(finite, cotangent.value, 0.0),
        entropy_weight=jnp.where(finite, cotangent.entropy, 0.0),
    )
    if cotangent.logp_student is not None:
        known = (tokens.ids >= 0) & (tokens.ids < w.shape[0])
        row = row._replace(logp_weight=jnp.where(finite & known, cotangent.logp_student, 0.0))
    return _gradients(row, True, tokens, w, w_teacher, settings)


def loss_gradients(tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings):
    """(weighted sum, values, dh, dw) of sum weight * transform * value, as `chunked.loss_gradients`."""
    check(tokens, w, settings)
    if tokens.student.shape[0] == 0:
        return chunked.loss_gradients(tokens, w, w_teacher, settings)
    out, row = _values(tokens, w, w_teacher, settings)
    factor = chunked.token_factor(out, tokens, settings)
    row = row._replace(value_weight=jnp.where(jnp.isinf(out.value), 0.0, factor).astype(jnp.float32))
    dh, dw = _gradients(row, False, tokens, w, w_teacher, settings)
    return chunked.weighted_sum(out.value, factor), out, dh, dw
