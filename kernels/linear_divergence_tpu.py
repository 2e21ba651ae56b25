"""Fused divergence from hidden states for TPUs: Pallas kernels compiled by Mosaic.

Four sweeps, all of them blocks of tokens against blocks of the vocabulary with whole hidden states:
statistics, mixture (JSD only) and the gradient of the hidden states keep a block of tokens and stream
the vocabulary; the gradient of the unembedding keeps a block of the vocabulary and streams the tokens.
Logits exist as one [block, block] tile on the chip. Formulas and the order of the sweeps: `linear_divergence_fused`.

Checked: values and gradients in interpret mode, and compilation for v5e, v5p and v6e. Never run on a TPU.
Left out: a vocabulary split over devices, blocks of the hidden dimension.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels import linear_divergence_fused as fused
from kernels.linear_divergence_chunked import Tokens
from kernels.linear_divergence_fused import Reduce, Row, Settings, Statistics

# (rows kept, rows streamed) per step, the best that fits: a kept block decides how often the other side
# is read again. Sizes divide by the 128 lanes.
BLOCKS = ((1024, 512), (512, 512), (512, 256), (256, 256), (256, 128), (128, 128))
DTYPES = (jnp.float32, jnp.bfloat16)
BLOCK_BYTES = 48 * 2**20  # of on-chip memory for blocks and tiles; the smallest of these chips has 64 MiB
LIMIT_BYTES = 60 * 2**20
TILES = 10  # [block, block] float32 arrays alive at once, a generous guess
TOKEN_STEP = 16  # rows of a bfloat16 register
BY_ROW = Reduce(
    highest=lambda x: jnp.max(x, axis=1, keepdims=True),
    total=lambda x: jnp.sum(x, axis=1, keepdims=True),
    wide=lambda x: x,
)
ACROSS = (((1,), (1,)), ((), ()))  # [a, D] x [b, D] -> [a, b]
ALONG = (((1,), (0,)), ((), ()))  # [a, b] x [b, D] -> [a, D]


def statistics(row: Row, tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings) -> Statistics:
    """One sweep over the vocabulary: running statistics, each [N] float32."""
    out = _by_token(_statistics_kernel, fused.STATISTICS, row, tokens, w, w_teacher, settings)
    return Statistics(*(out[:, k] for k in range(fused.STATISTICS)))


def mixture(row: Row, tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings):
    """KL(S || M) and KL(T || M), each [N] float32, given the normalisers."""
    out = _by_token(_mixture_kernel, 2, row, tokens, w, w_teacher, settings)
    return out[:, 0], out[:, 1]


def gradients(row: Row, values: bool, tokens: Tokens, w, w_teacher, settings: Settings):
    """dh [N, D] in h's dtype and dw [V, D] float32, both accumulated in float32."""
    kernel = functools.partial(_hidden_gradient_kernel, values=values)
    dh = _by_token(kernel, None, row, tokens, w, w_teacher, settings)
    return dh, _unembedding_gradient(row, values, tokens, w, w_teacher, settings)


def _unembedding_gradient(row: Row, values: bool, tokens: Tokens, w, w_teacher, settings: Settings) -> jax.Array:
    h, ht, depth = tokens.student, tokens.teacher, w.shape[1]
    streamed, kept = _blocks(h, ht, w.shape[0], settings, keep_tokens=False)
    h, ht, rows = _pad(streamed, h, ht, _pack(row))
    here = lambda j, i: (j, 0)  # noqa: E731
    there = lambda j, i: (i, 0)  # noqa: E731
    return pl.pallas_call(
        functools.partial(_unembedding_gradient_kernel, values=values, settings=settings, size=w.shape[0]),
        grid=(pl.cdiv(w.shape[0], kept), h.shape[0] // streamed),
        in_specs=[
            pl.BlockSpec((fused.ROW, streamed), lambda j, i: (0, i)),
            pl.BlockSpec((streamed, depth), there),
            pl.BlockSpec((streamed, ht.shape[1]), there),
            pl.BlockSpec((kept, depth), here),
            pl.BlockSpec((kept, ht.shape[1]), here),
        ],
        out_specs=pl.BlockSpec((kept, depth), here),
        out_shape=jax.ShapeDtypeStruct(w.shape, jnp.float32),
        compiler_params=_parameters(),
        interpret=settings.interpret,
    )(rows.T, h, ht, w, w_teacher)


# ---- the kernels -----------------------------------------------------------------------------------


def _logits(h_ref, w_ref, column, settings: Settings, size: int, tokens_first: bool = True) -> jax.Array:
    """[tokens, columns] float32, or its transpose; -inf from the end of the vocabulary on."""
    pair = (h_ref[...], w_ref[...]) if tokens_first else (w_ref[...], h_ref[...])
    z = jax.lax.dot_general(*pair, ACROSS, preferred_element_type=jnp.float32)
    if settings.temperature != 1.0:
        z = z * (1.0 / settings.temperature)
    return jnp.where(column < (settings.vocab_size or size), z, -jnp.inf)


def _columns(index, block: int, shape: tuple[int, int], axis: int) -> jax.Array:
    return index * block + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _both_logits(row, hs_ref, ht_ref, ws_ref, wt_ref, settings, size):
    """Logits of both models and where the id is, for a block of tokens and of columns."""
    shape = (hs_ref.shape[0], ws_ref.shape[0])
    column = _columns(pl.program_id(1), shape[1], shape, 1)
    zs = _logits(hs_ref, ws_ref, column, settings, size)
    return zs, _logits(ht_ref, wt_ref, column, settings, size), column == row.ids.astype(jnp.int32)


def _statistics_kernel(rows_ref, hs_ref, ht_ref, ws_ref, wt_ref, out_ref, *, settings, size):
    @pl.when(pl.program_id(1) == 0)
    def _start():
        for k, value in enumerate(fused.INITIAL):
            out_ref[:, k : k + 1] = jnp.full((out_ref.shape[0], 1), value, jnp.float32)

    zs, zt, hit = _both_logits(_row(rows_ref), hs_ref, ht_ref, ws_ref, wt_ref, settings, size)
    old = Statistics(*(out_ref[:, k : k + 1] for k in range(fused.STATISTICS)))
    for k, new in enumerate(fused.update(old, zs, zt, hit, settings.form, BY_ROW)):
        out_ref[:, k : k + 1] = new


def _mixture_kernel(rows_ref, hs_ref, ht_ref, ws_ref, wt_ref, out_ref, *, settings, size):
    @pl.when(pl.program_id(1) == 0)
    def _start():
        out_ref[...] = jnp.zeros_like(out_ref)

    row = _row(rows_ref)
    zs, zt, _ = _both_logits(row, hs_ref, ht_ref, ws_ref, wt_ref, settings, size)
    for k, term in enumerate(fused.mixture_terms(row, zs, zt, settings.form.weight)):
        out_ref[:, k : k + 1] += BY_ROW.total(term)


def _hidden_gradient_kernel(rows_ref, hs_ref, ht_ref, ws_ref, wt_ref, out_ref, sum_ref, *, values, settings, size):
    @pl.when(pl.program_id(1) == 0)
    def _start():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    row = _row(rows_ref)
    zs, zt, hit = _both_logits(row, hs_ref, ht_ref, ws_ref, wt_ref, settings, size)
    dz = _scaled(fused.logit_gradient(row, zs, zt, hit, settings.form, values), settings)
    w = ws_ref[...]
    end = settings.vocab_size or size
    if end < size or size % w.shape[0]:  # beyond the end lies anything, NaN too
        inside = _columns(pl.program_id(1), w.shape[0], (w.shape[0], 1), 0) < end
        w = jnp.where(inside, w, jnp.zeros((), w.dtype))
    sum_ref[...] += jax.lax.dot_general(dz.astype(w.dtype), w, ALONG, preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(1) == pl.num_programs(1) - 1)
    def _finish():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _unembedding_gradient_kernel(rows_ref, hs_ref, ht_ref, ws_ref, wt_ref, out_ref, *, values, settings, size):
    """Transposed, [columns, tokens], so that the product with the hidden states needs no transpose."""

    @pl.when(pl.program_id(1) == 0)
    def _start():
        out_ref[...] = jnp.zeros_like(out_ref)

    row = Row(*(rows_ref[k : k + 1, :] for k in range(fused.ROW)))
    shape = (ws_ref.shape[0], hs_ref.shape[0])
    column = _columns(pl.program_id(0), shape[0], shape, 0)
    zs = _logits(hs_ref, ws_ref, column, settings, size, tokens_first=False)
    zt = _logits(ht_ref, wt_ref, column, settings, size, tokens_first=False)
    dz = fused.logit_gradient(row, zs, zt, column == row.ids.astype(jnp.int32), settings.form, values)
    h = hs_ref[...]
    dz = _scaled(dz, settings).astype(h.dtype)
    out_ref[...] += jax.lax.dot_general(dz, h, ALONG, preferred_element_type=jnp.float32)


def _scaled(dz: jax.Array, settings: Settings) -> jax.Array:
    return dz if settings.temperature == 1.0 else dz * (1.0 / settings.temperature)


# ---- calling them ----------------------------------------------------------------------------------


def _by_token(kernel, width: int | None, row: Row, tokens: Tokens, w, w_teacher, settings: Settings) -> jax.Array:
    """Runs a kernel that keeps tokens and streams the vocabulary: [N, width] float32, or dh [N, D] if None."""
    n, depth = tokens.student.shape
    keep, stream = _blocks(tokens.student, tokens.teacher, w.shape[0], settings, keep_tokens=True)
    h, ht, rows = _pad(keep, tokens.student, tokens.teacher, _pack(row))
    here = lambda i, j: (i, 0)  # noqa: E731
    there = lambda i, j: (j, 0)  # noqa: E731
    out_width, dtype = (depth, h.dtype) if width is None else (width, jnp.float32)
    return pl.pallas_call(
        functools.partial(kernel, settings=settings, size=w.shape[0]),
        grid=(h.shape[0] // keep, pl.cdiv(w.shape[0], stream)),
        in_specs=[
            pl.BlockSpec((keep, fused.ROW), here),
            pl.BlockSpec((keep, depth), here),
            pl.BlockSpec((keep, ht.shape[1]), here),
            pl.BlockSpec((stream, depth), there),
            pl.BlockSpec((stream, ht.shape[1]), there),
        ],
        out_specs=pl.BlockSpec((keep, out_width), here),
        out_shape=jax.ShapeDtypeStruct((h.shape[0], out_width), dtype),
        scratch_shapes=[pltpu.VMEM((keep, depth), jnp.float32)] if width is None else [],
        compiler_params=_parameters(),
        interpret=settings.interpret,
    )(rows, h, ht, w, w_teacher)[:n]


def _row(rows_ref) -> Row:
    return Row(*(rows_ref[:, k : k + 1] for k in range(fused.ROW)))


def _pack(row: Row) -> jax.Array:
    return jnp.stack(row, axis=1)  # [N, ROW]


def _pad(block: int, *arrays: jax.Array) -> list[jax.Array]:
    """Zeros up to a multiple of the block: tokens of weight 0."""
    return [jnp.pad(x, ((0, -x.shape[0] % block), (0, 0))) for x in arrays]


def _parameters():
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT_BYTES)


def _blocks(h: jax.Array, ht: jax.Array, size: int, settings: Settings, keep_tokens: bool) -> tuple[int, int]:
    """(tokens, columns) per block for sweeps that keep tokens, or that keep columns."""
    n, depth = h.shape
    n = -(-n // TOKEN_STEP) * TOKEN_STEP
    if settings.blocks is not None:
        return min(settings.blocks[0], n), min(settings.blocks[1], size)
    both = depth * h.dtype.itemsize + ht.shape[1] * ht.dtype.itemsize  # bytes of one token or column
    gradient = depth * (4 + 2 * h.dtype.itemsize)  # a float32 sum and two buffers of output; dw needs no more
    for keep, stream in BLOCKS:
        if 2 * (keep + stream) * both + keep * gradient + TILES * 4 * keep * stream <= BLOCK_BYTES:
            tokens, columns = (keep, stream) if keep_tokens else (stream, keep)
            return min(tokens, n), min(columns, size)
    raise NotImplementedError(f"hidden states of {depth} and {ht.shape[1]} do not fit the TPU kernels' blocks")
