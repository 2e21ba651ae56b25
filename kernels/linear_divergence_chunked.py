"""Divergence from hidden states, a tile of tokens at a time, in plain XLA.

A tile holds [tile, V] float32 logits of student and teacher and nothing larger exists; products with
the unembedding are whole-vocabulary matmuls with float32 accumulation. Two ways to the gradient: made
in the forward pass, when the weight of every token is known (four products of N x D x V), or by
recomputing each tile in the backward pass (six).

The functions here see one device's tokens and know nothing of meshes, names of divergences or
custom_vjp. Left out: streaming of the vocabulary, which is what a fused kernel is for.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

MAX_PRODUCT_BYTES = 128 * 2**20  # of one partial product added to the unembedding's gradient


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed at trace time.

    divergence: (student_logp [n, V], teacher_logp [n, V] or None, ids [n] or None) -> [n].
    token_transform: None or (value [n], logp_student [n], *token_inputs [n]) -> factor [n].
    tile: tokens per tile. vocab_size: columns from here on are padding (None: no padding).
    varying_axes: mesh axes of an enclosing shard_map over which the tokens are split.
    save_logits_bytes: most bytes of log-probs that the caller keeps for the backward pass.
    """

    divergence: Callable
    temperature: float
    tile: int
    vocab_size: int | None = None
    token_transform: Callable | None = None
    varying_axes: tuple[str, ...] = ()
    save_logits_bytes: int = 0


class Values(NamedTuple):
    """Per-token results, each [n] float32; None where ids or the teacher are missing."""

    value: jax.Array
    logp_student: jax.Array | None
    logp_teacher: jax.Array | None
    entropy: jax.Array


class Tokens(NamedTuple):
    """What comes per token, leading axis N: hidden states, target ids, further inputs; None where absent.

    kept: log-probs of student and teacher, each [N, V], that the forward pass left for the backward pass.
    """

    student: jax.Array  # [N, D]
    teacher: jax.Array | None  # [N, D2]
    ids: jax.Array | None  # [N]
    cotangent: jax.Array | Values | None = None  # weights [N] of the loss form, Values of the other
    inputs: tuple[jax.Array, ...] = ()  # each [N]
    kept: tuple[jax.Array, jax.Array | None] | None = None


def _logits(h: jax.Array, w: jax.Array, settings: Settings) -> jax.Array:
    """h [n, D] times w [V, D] over the temperature, [n, V] float32; padding of the vocabulary is -inf."""
    dtype = jnp.promote_types(h.dtype, jnp.float32)
    z = jax.lax.dot_general(h, w, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    if settings.temperature != 1.0:
        z = z / settings.temperature
    if settings.vocab_size is not None and settings.vocab_size < w.shape[0]:
        column = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1)
        z = jnp.where(column < settings.vocab_size, z, -jnp.inf)
    return z


def _normaliser(z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest logit and ln sum exp(z - largest), each [n, 1]; no gradient: `_log_probs` has it all."""
    highest = jnp.max(z, axis=-1, keepdims=True)
    return highest, jnp.log(jnp.sum(jnp.exp(z - highest), axis=-1, keepdims=True))


@jax.custom_jvp
def _log_probs(z: jax.Array, highest: jax.Array, log_sum: jax.Array) -> jax.Array:
    """log_softmax of z [n, V] given its normaliser; for the gradient only the result is kept."""
    return z - highest - log_sum


@_log_probs.defjvp
def _log_probs_jvp(primals, tangents):
    logp, tangent = _log_probs(*primals), tangents[0]
    return logp, tangent - jnp.sum(jnp.exp(logp) * tangent, axis=-1, keepdims=True)


def _snap(normaliser, other):
    """`other` where the two are equal but for rounding.

    The compiler may sum the student's and the teacher's vocabulary in different orders. With this,
    equal logits have bit-equal log-probs, so that their divergence is exactly 0.
    """
    (highest, log_sum), (other_highest, other_log_sum) = normaliser, other
    rounding = 16 * jnp.finfo(log_sum.dtype).eps
    equal = (highest == other_highest) & (jnp.abs(log_sum - other_log_sum) <= rounding)
    return highest, jnp.where(equal, other_log_sum, log_sum)


def pick(logp: jax.Array, ids: jax.Array | None) -> jax.Array | None:
    """logp[n, ids[n]] as a masked sum: it fuses with the other reductions and needs no gather of shards."""
    if ids is None or logp is None:
        return None
    column = jax.lax.broadcasted_iota(ids.dtype, logp.shape, 1)
    return jnp.sum(jnp.where(column == ids[:, None], logp, 0.0), axis=-1)


def _entropy(logp: jax.Array) -> jax.Array:
    mass = logp != -jnp.inf
    safe = jnp.where(mass, logp, 0.0)  # a masked-out -inf must not meet 0 in the backward pass
    return -jnp.sum(jnp.where(mass, jnp.exp(safe) * safe, 0.0), axis=-1)


def _prepare(tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings):
    """Logits of the student [n, V], their normaliser, and log-probs of the teacher [n, V] or None."""
    if tokens.kept is not None:  # log-probs are logits that are normalised already
        return tokens.kept[0], (0.0, 0.0), tokens.kept[1]
    z = _logits(tokens.student, w, settings)
    normaliser = jax.lax.stop_gradient(_normaliser(z))
    if tokens.teacher is None:
        return z, normaliser, None
    zt = _logits(tokens.teacher, w_teacher, settings)
    return z, normaliser, _log_probs(zt, *_snap(_normaliser(zt), normaliser))


def _values(s: jax.Array, t: jax.Array | None, ids: jax.Array | None, settings: Settings) -> Values:
    return Values(settings.divergence(s, t, ids), pick(s, ids), pick(t, ids), _entropy(s))


def tile_values(tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings):
    """(Values, log-probs of both sides) of all tokens at once: the body of a tile, and the dense reference."""
    z, normaliser, t = _prepare(tokens, w, w_teacher, settings)
    s = _log_probs(z, *normaliser)
    return _values(s, t, tokens.ids, settings), (s, t)


def token_factor(values: Values, tokens: Tokens, settings: Settings) -> jax.Array:
    """weight times token_transform, [n]; exactly 0 where the weight is 0."""
    weight = tokens.cotangent
    if settings.token_transform is None:
        return weight
    logp = values.logp_student
    factor = settings.token_transform(values.value, logp, *tokens.inputs).astype(weight.dtype)
    return jnp.where(weight != 0, weight * factor, 0.0)


def weighted_sum(values: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(factor != 0, values * factor, 0.0))


def values(tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings) -> Values:
    """Values of all tokens, tile by tile: one product with each unembedding."""
    return values_and_kept(tokens, w, w_teacher, settings)[0]


def values_and_kept(tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings):
    """(Values, what `Tokens.kept` takes): the log-probs of all tokens, for a backward pass without recomputing."""

    def body(carry, tile):
        return carry, tile_values(tile, w, w_teacher, settings)

    return _over_tiles(body, (), tokens, settings)[1]


def values_gradients(
    tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings
) -> tuple[jax.Array, jax.Array]:
    """(dh [N, D] in h's dtype, dw [V, D] in float32) for cotangents of the values.

    From `tokens.kept`, else by recomputing the logits.
    """

    def body(dw, tile):
        z, normaliser, t = _prepare(tile, w, w_teacher, settings)
        out, pull = jax.vjp(lambda z: _values(_log_probs(z, *normaliser), t, tile.ids, settings), z)
        dz = pull(tile.cotangent)[0]
        live = jnp.any(jnp.stack([c != 0 for c in jax.tree.leaves(tile.cotangent)]), axis=0)
        dh, dw = _products(dz, live & ~jnp.isinf(out.value), tile.student, w, dw, settings)
        return dw, dh

    dw, dh = _over_tiles(body, _gradient_carry(tokens, w, settings), tokens, settings)
    return dh, dw


def loss_gradients(
    tokens: Tokens, w: jax.Array, w_teacher: jax.Array | None, settings: Settings
) -> tuple[jax.Array, Values, jax.Array, jax.Array]:
    """(weighted sum, values, dh [N, D], dw [V, D] float32) of sum weight * transform * value."""

    def body(carry, tile):
        total, dw = carry
        z, normaliser, t = _prepare(tile, w, w_teacher, settings)

        def value_of(z):
            s = _log_probs(z, *normaliser)
            return settings.divergence(s, t, tile.ids), s

        value, pull, s = jax.vjp(value_of, z, has_aux=True)
        out = Values(value, pick(s, tile.ids), pick(t, tile.ids), _entropy(s))
        factor = token_factor(out, tile, settings)
        live = (factor != 0) & ~jnp.isinf(value)
        dz = pull(jnp.where(live, factor, 0.0).astype(value.dtype))[0]
        dh, dw = _products(dz, live, tile.student, w, dw, settings)
        return (total + weighted_sum(value, factor), dw), (out, dh)

    dw = _gradient_carry(tokens, w, settings)
    total = _varying(jnp.zeros((), dw.dtype), settings)
    (total, dw), (out, dh) = _over_tiles(body, (total, dw), tokens, settings)
    return total, out, dh, dw


def _products(dz, live, h, w, dw, settings: Settings):
    """dh = dz w and dw += dz^T h. Tokens that are not live add exactly 0, whatever they hold."""
    dz = jnp.where(live[:, None], dz, 0.0)
    if settings.temperature != 1.0:
        dz = dz / settings.temperature
    dz = dz.astype(h.dtype)
    dh = jax.lax.dot_general(dz, w, (((1,), (0,)), ((), ())), preferred_element_type=dw.dtype)
    h = jnp.where(live[:, None], h, jnp.zeros((), h.dtype))
    return dh.astype(h.dtype), _add_outer(dw, dz, h)


def _add_outer(dw: jax.Array, dz: jax.Array, h: jax.Array) -> jax.Array:
    """dw [V, D] + dz^T [V, n] h [n, D], in strips of D, so that no second [V, D] buffer exists.

    A loop, because the compiler would compute unrolled strips side by side. Strips of D and not of V,
    which may be split over devices.
    """

    def product(h):
        return jax.lax.dot_general(dz, h, (((0,), (0,)), ((), ())), preferred_element_type=dw.dtype)

    depth = h.shape[1]
    wanted = max(1, -(-dw.size * dw.dtype.itemsize // MAX_PRODUCT_BYTES))
    strips = next((k for k in range(wanted, min(4 * wanted, depth) + 1) if depth % k == 0), 1)
    if strips == 1:
        return dw + product(h)
    width = depth // strips

    def body(i, dw):
        part = product(jax.lax.dynamic_slice_in_dim(h, i * width, width, axis=1))
        strip = jax.lax.dynamic_slice_in_dim(dw, i * width, width, axis=1) + part
        return jax.lax.dynamic_update_slice_in_dim(dw, strip, i * width, axis=1)

    return jax.lax.fori_loop(0, strips, body, dw)


def _varying(x: jax.Array, settings: Settings) -> jax.Array:
    return jax.lax.pcast(x, settings.varying_axes, to="varying") if settings.varying_axes else x


def _gradient_carry(tokens: Tokens, w: jax.Array, settings: Settings) -> jax.Array:
    dtype = jnp.promote_types(tokens.student.dtype, jnp.float32)
    return _varying(jnp.zeros(w.shape, dtype), settings)


def _over_tiles(body: Callable, carry, tokens: Tokens, settings: Settings):
    """Scans `body` over tiles of the tokens; one call without a loop when one tile holds them all."""
    n, tile = tokens.student.shape[0], settings.tile
    if n <= tile:
        return body(carry, tokens)
    tiles = -(-n // tile)
    padding = tiles * tile - n

    def cut(x):
        if padding:
            x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(tiles, tile, *x.shape[1:])

    carry, out = jax.lax.scan(body, carry, jax.tree.map(cut, tokens))
    return carry, jax.tree.map(lambda x: x.reshape(tiles * tile, *x.shape[2:])[:n], out)
