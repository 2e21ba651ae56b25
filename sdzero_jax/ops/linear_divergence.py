"""From hidden states and unembeddings to per-token divergences, without ever holding [N, V] logits.

Chooses the implementation (reference: dense with plain autodiff; chunked: tiles of tokens; pallas: fused
kernels that stream the vocabulary), splits the tokens over the mesh, and defines the derivatives: for the
student's hidden states and unembedding only. "auto" takes chunked: the Pallas kernels were interpreted, and
compiled for TPUs, but never run or timed on a TPU or GPU. Leaves out masks, length modes and gathering of hidden
states.

Under plain jit XLA would gather every hidden state to every device. So with a mesh set
(`jax.set_mesh`) the tiles run inside `shard_map`, manual over the axes that split tokens, automatic
over the axis that splits the vocabulary, with one psum of the unembedding's gradient after the loop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels import linear_divergence_chunked as chunked
from kernels import linear_divergence_fused as fused
from kernels import linear_divergence_gpu, linear_divergence_tpu
from kernels.linear_divergence_chunked import Settings, Tokens
from sdzero_jax import losses
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.losses import spec
from sdzero_jax.losses.divergences import FULL, kl_parts

IMPLEMENTATIONS = ("auto", "reference", "chunked", "pallas")
KERNELS = {"tpu": linear_divergence_tpu, "gpu": linear_divergence_gpu}  # by platform
TOKEN_AXES = ("data", "fsdp")  # mesh axes that split tokens
VOCAB_AXIS = "tensor"  # mesh axis that splits the vocabulary
# Bytes of one model's float32 logits in one tile. Measured on CPU: up to 512 tokens at 8k columns a
# smaller tile is faster (caches); under 256 tokens the traffic to the unembedding's gradient shows.
GOOD_TILE_BYTES = 16 * 2**20
GOOD_TILE_TOKENS = 256
MAX_TILE_BYTES = 160 * 2**20  # 256 tokens at 152k columns
SAVE_LOGITS_BYTES = 256 * 2**20  # log-probs kept for the backward pass of the per-token form


class PerToken(NamedTuple):
    """Results by token, each [N] float32.

    value: the divergence (or -logp). logp_student, logp_teacher: ln S(y_t), ln T(y_t), None without
    ids or teacher. entropy: of S, in nats. All at the temperature of the call.
    """

    value: jax.Array
    logp_student: jax.Array | None
    logp_teacher: jax.Array | None
    entropy: jax.Array


def linear_divergence(
    h_student: jax.Array,
    w_student: jax.Array,
    h_teacher: jax.Array,
    w_teacher: jax.Array,
    *,
    ids: jax.Array | None = None,
    divergence: str | Callable = "reverse_kl",
    temperature: float = 1.0,
    tile: int | None = None,
    vocab_size: int | None = None,
    save_logits_bytes: int = SAVE_LOGITS_BYTES,
    implementation: str = "auto",
) -> PerToken:
    """Per-token divergence of softmax(h w^T / temperature), student against teacher.

    The gradient (of value, logp_student and entropy, with respect to h_student and w_student alone)
    recomputes every tile, six products of N x D x V where `linear_divergence_loss` needs four, unless the
    log-probs of both sides fit `save_logits_bytes`: then they are kept and four do here too.

    Args:
      h_student: [N, D]; its dtype is the dtype of the products, which accumulate in float32.
      w_student: [V, D], any float dtype; its gradient is accumulated in float32 and has its dtype.
      h_teacher, w_teacher: [N, D2], [V, D2]; they get no gradient.
      ids: [N] target ids, for the two log-probs.
      divergence: a name of `losses.get_divergence`, or a function of two [n, V] log-probs.
      temperature: both logits are divided by it, > 0.
      tile: tokens per tile (default by `default_tile`); the Pallas kernels choose their own blocks.
      vocab_size: rows of w from here on are padding and count as -inf (default: no padding).
      save_logits_bytes: most bytes of float32 log-probs, 8 N V on each device, to keep between forward and
        backward pass; 0 always recomputes. The chunked path alone reads it.
      implementation: auto (takes chunked), reference, chunked or pallas.
    Returns: PerToken. An infinite value has gradient 0.
    Raises: UserError for unknown names and unfit settings. NotImplementedError where pallas cannot serve:
      divergences other than the KLs and JSD, a vocabulary split over devices, other platforms.
    """
    implementation = _check(implementation, h_student, w_student, h_teacher, w_teacher, ids)
    tokens = Tokens(h_student, h_teacher, ids)
    settings = _settings(tokens, w_student, _with_ids(divergence, ids), temperature, tile, vocab_size)
    settings = dataclasses.replace(settings, save_logits_bytes=save_logits_bytes)
    if implementation == "pallas":
        settings = _fused_settings(settings, divergence)
    return _values(implementation, settings, tokens, w_student, w_teacher)


def linear_divergence_loss(
    h_student: jax.Array,
    w_student: jax.Array,
    h_teacher: jax.Array,
    w_teacher: jax.Array,
    token_weights: jax.Array,
    *,
    ids: jax.Array | None = None,
    divergence: str | Callable = "reverse_kl",
    temperature: float = 1.0,
    token_transform: Callable | None = None,
    token_inputs: tuple[jax.Array, ...] = (),
    tile: int | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, PerToken]:
    """sum_n weight_n * factor_n * divergence_n, with the gradients made in the forward pass.

    Arguments as in `linear_divergence`, and:
      token_weights: [N] float32, from `masked.token_weights`. A token of weight 0 adds exactly 0 to
        value and gradient, even if its hidden state or divergence is infinite or NaN.
      token_transform: (value [n], logp_student [n], *token_inputs [n]) -> factor [n], a constant to
        the gradient (`losses.token_clip_factor`, `losses.importance_weight`). It is called on a tile,
        so whatever it needs per token must come through token_inputs, not through a closure.
      token_inputs: arrays [N] handed to token_transform by tile.
    Returns: (float32 scalar, PerToken); PerToken carries no gradient.
    """
    implementation = _check(implementation, h_student, w_student, h_teacher, w_teacher, ids)
    tokens = Tokens(h_student, h_teacher, ids, token_weights, tuple(token_inputs))
    settings = _settings(tokens, w_student, _with_ids(divergence, ids), temperature, tile, vocab_size, token_transform)
    if implementation == "pallas":
        settings = _fused_settings(settings, divergence)
    return _loss(implementation, settings, tokens, w_student, w_teacher)


def linear_logprob(
    h: jax.Array,
    w: jax.Array,
    ids: jax.Array,
    *,
    temperature: float = 1.0,
    tile: int | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """ln softmax(h w^T / temperature) at ids: h [N, D], w [V, D], ids [N] -> [N] float32.

    Differentiable in h and w by recomputing tiles: four products of N x D x V in all.
    """
    implementation = _check(implementation, h, w, None, None, ids)
    tokens = Tokens(h, None, ids)
    settings = _settings(tokens, w, _negative_logp, temperature, tile, vocab_size)
    if implementation == "pallas":
        settings = _fused_settings(settings, _negative_logp)
    return -_values(implementation, settings, tokens, w, None).value


def linear_logprob_loss(
    h: jax.Array,
    w: jax.Array,
    ids: jax.Array,
    token_weights: jax.Array,
    *,
    temperature: float = 1.0,
    token_transform: Callable | None = None,
    token_inputs: tuple[jax.Array, ...] = (),
    tile: int | None = None,
    vocab_size: int | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, PerToken]:
    """sum_n -weight_n * factor_n * logp_n, gradients made in the forward pass: three products, not four.

    Arguments as in `linear_logprob` and `linear_divergence_loss`. Returns (float32 scalar, PerToken)
    with value = -logp; PerToken carries no gradient.
    """
    implementation = _check(implementation, h, w, None, None, ids)
    tokens = Tokens(h, None, ids, token_weights, tuple(token_inputs))
    settings = _settings(tokens, w, _negative_logp, temperature, tile, vocab_size, token_transform)
    if implementation == "pallas":
        settings = _fused_settings(settings, _negative_logp)
    return _loss(implementation, settings, tokens, w, None)


def default_tile(n: int, vocab: int) -> int:
    """Tokens per tile, at most n: 16 MiB of float32 logits, or 256 tokens if that is more and fits 160 MiB.

    At least 8; several tiles are of equal size, so that little is padded.
    """
    row = 4 * max(vocab, 1)
    most = max(8, min(MAX_TILE_BYTES // row, max(GOOD_TILE_BYTES // row, GOOD_TILE_TOKENS)))
    if n <= most:
        return max(n, 1)
    step = 128 if most >= 128 else 8
    most -= most % step
    tiles = math.ceil(n / most)
    return min(most, math.ceil(n / tiles / step) * step)


def _check(implementation, h_student, w_student, h_teacher, w_teacher, ids) -> str:
    """The implementation to use; raises on unknown names, unbuilt kernels and shapes that do not fit."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"unknown implementation {implementation!r}{nearest(implementation, IMPLEMENTATIONS)}")
    fits = h_student.ndim == w_student.ndim == 2 and h_student.shape[1] == w_student.shape[1]
    if h_teacher is not None:
        fits &= h_teacher.ndim == w_teacher.ndim == 2 and h_teacher.shape[1] == w_teacher.shape[1]
        fits &= h_teacher.shape[0] == h_student.shape[0] and w_teacher.shape[0] == w_student.shape[0]
    if ids is not None:
        fits &= ids.shape == h_student.shape[:1]
    if not fits:
        shapes = [None if x is None else x.shape for x in (h_student, w_student, h_teacher, w_teacher, ids)]
        raise ValueError(f"want h [N, D], w [V, D], h_teacher [N, D2], w_teacher [V, D2], ids [N]; got {shapes}")
    return "chunked" if implementation == "auto" else implementation


def _settings(tokens, w, divergence, temperature, tile, vocab_size, token_transform=None) -> Settings:
    n, vocab = tokens.student.shape[0], w.shape[0]
    if not temperature > 0:
        raise UserError(f"temperature is {temperature!r}, wanted a number above 0")
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise UserError(f"tile is {tile!r}, wanted a whole number of at least 1")
    if vocab_size is not None and not 1 <= vocab_size <= vocab:
        raise UserError(f"vocab_size is {vocab_size!r}, wanted 1 to {vocab}, the rows of the unembedding")
    if token_transform is not None and tokens.ids is None:
        raise UserError("token_transform needs ids, got none; pass the target ids")
    for x in (tokens.cotangent, *tokens.inputs):
        if x is not None and x.shape != (n,):
            raise ValueError(f"token_weights and token_inputs must be [{n}], got {x.shape}")
    if token_transform is not None:
        _check_transform(token_transform, n, tokens.inputs)
    return Settings(divergence, float(temperature), tile or 0, vocab_size, token_transform)


def _check_transform(token_transform: Callable, n: int, inputs: tuple[jax.Array, ...]) -> None:
    """Tries the transform on another length, so that a closure over [N] fails at any size, not at scale."""
    shapes = [jax.ShapeDtypeStruct((n + 2,), dtype) for dtype in (jnp.float32, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((n + 2,), x.dtype) for x in inputs]
    try:
        fits = jax.eval_shape(token_transform, *shapes).shape == (n + 2,)
    except (TypeError, ValueError) as error:
        raise ValueError("token_transform must work by token: pass arrays [N] as token_inputs") from error
    if not fits:
        raise ValueError("token_transform must return one factor per token it is given")


def _platform() -> str:
    """What the program is made for; a test puts "tpu" here to compile without one, "interpret" to run."""
    return jax.default_backend()


def _fused_settings(settings: Settings, divergence: str | Callable) -> fused.Settings:
    """Settings of the fused kernels; NotImplementedError says what they cannot do."""
    name = spec.parse(divergence)[0] if isinstance(divergence, str) else getattr(divergence, "__name__", "a function")
    if not isinstance(divergence, str) or name not in FULL:
        raise NotImplementedError(f"the Pallas kernels compute {', '.join(FULL)}, not {name}; use chunked")
    name, weight = kl_parts(divergence)
    platform = _platform()
    if platform not in KERNELS:
        raise NotImplementedError(f"there are Pallas kernels for {' and '.join(KERNELS)}, not {platform}; use chunked")
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    form = fused.Form("jsd" if name == "jsd" else "kl", weight)
    return fused.Settings(**fields, form=form, kernel=KERNELS[platform])


def _engine(settings: Settings):
    """The module with values, values_gradients and loss_gradients."""
    return fused if isinstance(settings, fused.Settings) else chunked


def _negative_logp(student_logp, teacher_logp, ids):
    del teacher_logp
    return -chunked.pick(student_logp, ids)


def _with_ids(divergence: str | Callable, ids: jax.Array | None) -> Callable:
    """A function (student_logp, teacher_logp, ids) -> [n], the same object for the same divergence."""
    at_ids = isinstance(divergence, str) and losses.needs_ids(divergence)
    if at_ids and ids is None:
        raise UserError(f"divergence {divergence!r} needs ids, got none; pass the sampled ids")
    function = losses.get_divergence(divergence) if isinstance(divergence, str) else divergence
    return _adapted(function, at_ids)


@functools.lru_cache(maxsize=256)
def _adapted(function: Callable, at_ids: bool) -> Callable:
    if at_ids:
        return lambda s, t, ids: function(chunked.pick(s, ids), chunked.pick(t, ids))
    return lambda s, t, ids: function(s, t)


# ---- implementations and their derivatives -------------------------------------------------------


def _values(implementation, settings: Settings, tokens: Tokens, w, w_teacher) -> PerToken:
    if implementation == "reference":
        return PerToken(*_dense(settings, tokens, w, w_teacher))
    return PerToken(*_chunked_values(settings, tokens, w, w_teacher))


def _loss(implementation, settings: Settings, tokens: Tokens, w, w_teacher) -> tuple[jax.Array, PerToken]:
    if implementation == "reference":
        out = _dense(settings, tokens, w, w_teacher)
        factor = jax.lax.stop_gradient(chunked.token_factor(out, tokens, settings))
        return chunked.weighted_sum(out.value, factor), PerToken(*jax.lax.stop_gradient(out))
    total, out = _chunked_loss(settings, tokens, w, w_teacher)
    return total, PerToken(*out)


def _dense(settings: Settings, tokens: Tokens, w, w_teacher):
    # The operator's contract: nothing flows into the teacher, whoever calls.
    teacher, w_teacher = jax.lax.stop_gradient((tokens.teacher, w_teacher))
    return chunked.tile_values(tokens._replace(teacher=teacher), *_cast(tokens, w, w_teacher), settings)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_values(settings, tokens, w, w_teacher):
    run = _sharded(_engine(settings).values, settings, tokens, sums=False)
    return run(tokens, *_cast(tokens, w, w_teacher))


def _chunked_values_fwd(settings, tokens, w, w_teacher):
    if not _keeps_logits(settings, tokens, w):
        return _chunked_values(settings, tokens, w, w_teacher), (tokens, w, w_teacher)
    run = _sharded(chunked.values_and_kept, settings, tokens, sums=(False, False))
    out, kept = run(tokens, *_cast(tokens, w, w_teacher))
    return out, (tokens._replace(kept=kept), w, w_teacher)


def _keeps_logits(settings: Settings, tokens: Tokens, w) -> bool:
    """Whether the log-probs of one device's tokens fit `save_logits_bytes`."""
    sizes = _auto_axes()
    devices = math.prod(size for name, size in sizes.items() if name in (*TOKEN_AXES, VOCAB_AXIS))
    sides = 1 if tokens.teacher is None else 2
    needed = 4 * sides * tokens.student.shape[0] * w.shape[0] / devices
    return not isinstance(settings, fused.Settings) and needed <= settings.save_logits_bytes


def _chunked_values_bwd(settings, residuals, cotangent):
    tokens, w, w_teacher = residuals
    run = _sharded(_engine(settings).values_gradients, settings, tokens, sums=(False, True))
    dh, dw = run(tokens._replace(cotangent=cotangent), *_cast(tokens, w, w_teacher))
    return Tokens(dh, None, None, None, None), dw.astype(w.dtype), None


_chunked_values.defvjp(_chunked_values_fwd, _chunked_values_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked_loss(settings, tokens, w, w_teacher):
    def forward(tokens, w, w_teacher, settings):
        out = _engine(settings).values(tokens, w, w_teacher, settings)
        return chunked.weighted_sum(out.value, chunked.token_factor(out, tokens, settings)), out

    return _sharded(forward, settings, tokens, sums=(True, False))(tokens, *_cast(tokens, w, w_teacher))


def _chunked_loss_fwd(settings, tokens, w, w_teacher):
    run = _sharded(_engine(settings).loss_gradients, settings, tokens, sums=(True, False, False, True))
    total, out, dh, dw = run(tokens, *_cast(tokens, w, w_teacher))
    return (total, out), (dh, dw.astype(w.dtype))


def _chunked_loss_bwd(settings, residuals, cotangent):
    del settings
    dh, dw = residuals
    scale = cotangent[0]
    dh, dw = ((scale * x).astype(x.dtype) for x in (dh, dw))
    return Tokens(dh, None, None, None, None), dw, None


_chunked_loss.defvjp(_chunked_loss_fwd, _chunked_loss_bwd)


def _cast(tokens: Tokens, w, w_teacher):
    """Unembeddings in the dtype of their hidden states, before any gathering of their shards."""
    w = w.astype(tokens.student.dtype)
    return w, None if w_teacher is None else w_teacher.astype(tokens.teacher.dtype)


# ---- the mesh ------------------------------------------------------------------------------------


def _auto_axes() -> dict[str, int]:
    """Mesh axes that are set, have more than one device and are not already manual."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto and size > 1}


def _all_auto_axes() -> set[str]:
    """Those of a single device too: XLA refuses to split a kernel even over them."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}


def _sharded(function: Callable, settings: Settings, tokens: Tokens, sums: bool | tuple[bool, ...]) -> Callable:
    """`function(tokens, w, w_teacher, settings)` with the tokens split over the mesh, if one is set.

    `sums` says which of its results add up over the tokens; the others are per token, leading axis N.
    """
    sizes = _auto_axes()
    n, tensor = tokens.student.shape[0], sizes.get(VOCAB_AXIS, 1)
    axes = tuple(name for name in TOKEN_AXES if name in sizes) if n else ()
    parts = math.prod(sizes[name] for name in axes)
    local = math.ceil(n / parts)
    fixed = isinstance(settings, fused.Settings)
    if fixed and (others := [name for name in sizes if name not in TOKEN_AXES]):
        raise NotImplementedError(f"the Pallas kernels take a whole vocabulary, not one split over {others}")

    def of_vocabulary(w):
        cut = w is not None and tensor > 1 and w.shape[0] % tensor == 0
        return jax.lax.with_sharding_constraint(w, P(VOCAB_AXIS, None)) if cut else w

    def run(tokens, w, w_teacher):
        tile = settings.tile or default_tile(local, math.ceil(w.shape[0] / tensor))
        here = dataclasses.replace(settings, tile=tile, varying_axes=axes)
        return function(tokens, of_vocabulary(w), of_vocabulary(w_teacher), here)

    if not axes:
        return run

    def run_and_add(tokens, w, w_teacher):
        return jax.tree.map(lambda add, x: jax.lax.psum(x, axes) if add else x, sums, run(tokens, w, w_teacher))

    split = jax.shard_map(
        run_and_add,
        in_specs=(P(axes), P(), P()),
        out_specs=jax.tree.map(lambda add: P() if add else P(axes), sums),
        axis_names=_all_auto_axes() if fixed else set(axes),
        check_vma=not fixed,
    )

    def padded(tokens, w, w_teacher):
        padding = local * parts - n
        if not padding:
            return split(tokens, w, w_teacher)
        tokens = jax.tree.map(lambda x: jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)), tokens)
        out = split(tokens, w, w_teacher)
        return jax.tree.map(lambda add, x: x if add else jax.tree.map(lambda y: y[:n], x), sums, out)

    return padded
