"""Fused divergence from hidden states for Hopper GPUs: Pallas kernels through Mosaic GPU (jax 0.11 on).

One warpgroup computes [64, 128] logits of both models with WGMMA, hidden states and unembedding arriving
in strips through a TMA pipeline. The forward sweep keeps its tokens and walks through the vocabulary,
statistics in registers. Going back, a token's sum over the vocabulary does not fit a warpgroup's
registers: a kernel writes d(loss)/d(logits) of a band of columns, [N, band] in bfloat16, and XLA
multiplies it with the unembedding and the hidden states. Formulas: `linear_divergence_fused`.

Checked: values and gradients in jax's interpreter of such kernels, which knows no registers, and that they
lower to Mosaic GPU's dialect. Never compiled by ptxas, run or timed: spills and races would not have shown.
Left out: float32 (its WGMMA is TF32), hidden sizes that do not divide by 64, warp specialisation,
clusters. A vocabulary that does not divide by 128 costs a padded copy of both unembeddings.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels import linear_divergence_fused as fused
from kernels.linear_divergence_chunked import Tokens
from kernels.linear_divergence_fused import Reduce, Row, Settings, Statistics

DTYPES = (jnp.bfloat16,)
TOKENS, COLUMNS, STRIP = 64, 128, 64  # per block: rows, columns, and hidden units per step of the pipeline
STEPS = 4  # strips in flight
BAND = 4096  # columns whose gradient exists at once


def _plgpu():
    """jax's Mosaic GPU interface; before 0.11 it lacks what the kernels use."""
    if jax.__version_info__ < (0, 11):
        raise NotImplementedError(f"the Pallas kernels for GPUs need jax 0.11, this is {jax.__version__}; use chunked")
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def statistics(row: Row, tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings) -> Statistics:
    """One sweep over the vocabulary: running statistics, each [N] float32."""

    def sweep(row, logits, over, fill, steps):
        def body(j, old):
            zs, zt, hit = logits(j)
            return fused.update(old, zs, zt, hit, settings.form, over)

        return jax.lax.fori_loop(0, steps, body, Statistics(*(fill(x) for x in fused.INITIAL)))

    return Statistics(*_by_token(sweep, fused.STATISTICS, row, tokens, w, w_teacher, settings))


def mixture(row: Row, tokens: Tokens, w: jax.Array, w_teacher: jax.Array, settings: Settings):
    """KL(S || M) and KL(T || M), each [N] float32, given the normalisers."""

    def sweep(row, logits, over, fill, steps):
        wide = Row(*(over.wide(x) for x in row))

        def body(j, sums):
            zs, zt, _ = logits(j)
            terms = fused.mixture_terms(wide, zs, zt, settings.form.weight)
            return tuple(a + over.total(b) for a, b in zip(sums, terms))

        return jax.lax.fori_loop(0, steps, body, (fill(0.0), fill(0.0)))

    return _by_token(sweep, 2, row, tokens, w, w_teacher, settings)


def gradients(row: Row, values: bool, tokens: Tokens, w, w_teacher, settings: Settings):
    """dh [N, D] in h's dtype and dw [V, D] float32, band by band of the vocabulary."""
    size = w.shape[0]
    h, ht, rows, w, w_teacher = _padded(tokens, row, w, w_teacher)
    band = min(BAND, w.shape[0])

    def body(k, carry):
        dh, dw = carry
        start = jnp.minimum(k * band, w.shape[0] - band)  # the last band overlaps its neighbour
        ws, wt = (jax.lax.dynamic_slice_in_dim(x, start, band) for x in (w, w_teacher))
        column = start + jnp.arange(band)
        fresh = (column >= k * band) & (column < (settings.vocab_size or size))
        dz = _logit_gradient(rows.at[Row._fields.index("ids")].add(-start), values, h, ht, ws, wt, settings)
        dz = jnp.where(fresh, dz, jnp.zeros((), dz.dtype))
        dh += jax.lax.dot_general(dz, ws, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        part = jax.lax.dot_general(dz, h, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        old = jax.lax.dynamic_slice_in_dim(dw, start, band)
        part = jnp.where((column >= k * band)[:, None], part, old)
        return dh, jax.lax.dynamic_update_slice_in_dim(dw, part, start, axis=0)

    start = jnp.zeros(h.shape, jnp.float32), jnp.zeros(w.shape, jnp.float32)
    dh, dw = jax.lax.fori_loop(0, -(-w.shape[0] // band), body, start)
    return dh[: tokens.student.shape[0]].astype(h.dtype), dw[:size]


# ---- the kernels -----------------------------------------------------------------------------------


def _block_logits(plgpu, h_ref, w_ref, tokens, columns, scale: float) -> jax.Array:
    """[TOKENS, COLUMNS] float32: rows of h times rows of w, by strips of the hidden units."""
    transforms = (plgpu.TilingTransform((8, STRIP)), plgpu.SwizzleTransform(128))

    def accumulate(sums):
        def step(_, h, w):
            plgpu.wgmma(sums, h, w.transpose((1, 0)))
            plgpu.wgmma_wait(0)

        strips = h_ref.shape[1] // STRIP
        plgpu.emit_pipeline(
            step,
            grid=(strips,),
            in_specs=[
                plgpu.BlockSpec((TOKENS, STRIP), lambda k: (tokens, k), transforms=transforms),
                plgpu.BlockSpec((COLUMNS, STRIP), lambda k: (columns, k), transforms=transforms),
            ],
            max_concurrent_steps=min(STEPS, strips),
        )(h_ref, w_ref)
        return sums[...]

    z = pl.run_scoped(accumulate, plgpu.ACC((TOKENS, COLUMNS), jnp.float32))
    return z if scale == 1.0 else z * scale


def _tools(plgpu, rows_ref, h_ref, ht_ref, w_ref, wt_ref, settings: Settings, limit: int):
    """The token block's row, its logits by block of columns, and how to reduce them."""
    block = jax.lax.axis_index("tokens")
    by_row = plgpu.Layout.WGMMA.reduce(1)
    here = pl.ds(block * TOKENS, TOKENS)
    row = Row(*(plgpu.load(rows_ref, (k, here), layout=by_row, optimized=False) for k in range(fused.ROW)))
    over = Reduce(
        highest=lambda x: jnp.max(x, axis=1),
        total=lambda x: jnp.sum(x, axis=1),
        wide=lambda x: jax.lax.broadcast_in_dim(x, (TOKENS, COLUMNS), [0]),
    )

    def logits(j):
        zs, zt = (
            _block_logits(plgpu, a, b, block, j, 1.0 / settings.temperature)
            for a, b in ((h_ref, w_ref), (ht_ref, wt_ref))
        )
        column = plgpu.broadcasted_iota(jnp.int32, (TOKENS, COLUMNS), 1, layout=plgpu.Layout.WGMMA) + j * COLUMNS
        inside = column < limit
        hit = column.astype(jnp.float32) == over.wide(row.ids)
        return jnp.where(inside, zs, -jnp.inf), jnp.where(inside, zt, -jnp.inf), hit

    def fill(value):
        return plgpu.layout_cast(jnp.full((TOKENS,), value, jnp.float32), by_row)

    return row, logits, over, fill


def _by_token(sweep, width: int, row: Row, tokens: Tokens, w, w_teacher, settings: Settings) -> tuple[jax.Array, ...]:
    """Runs a sweep over the vocabulary for every block of tokens: `width` results, each [N] float32."""
    plgpu = _plgpu()
    n, size = tokens.student.shape[0], w.shape[0]
    h, ht, rows, w, w_teacher = _padded(tokens, row, w, w_teacher)

    def body(rows_ref, h_ref, ht_ref, w_ref, wt_ref, out_ref, out_smem):
        row, logits, over, fill = _tools(
            plgpu, rows_ref, h_ref, ht_ref, w_ref, wt_ref, settings, settings.vocab_size or size
        )
        for k, result in enumerate(sweep(row, logits, over, fill, w_ref.shape[0] // COLUMNS)):
            out_smem[k] = result
        plgpu.commit_smem()
        here = pl.ds(jax.lax.axis_index("tokens") * TOKENS, TOKENS)
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[:, here])
        plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((width, h.shape[0]), jnp.float32),
        scratch_types=[plgpu.SMEM((width, TOKENS), jnp.float32)],
        grid=(h.shape[0] // TOKENS,),
        grid_names=("tokens",),
        interpret=_interpreter(plgpu, settings),
    )(rows, h, ht, w, w_teacher)
    return tuple(out[:, :n])


def _logit_gradient(rows: jax.Array, values: bool, h, ht, w, w_teacher, settings: Settings) -> jax.Array:
    """d(loss)/d(logits) [N, V] in h's dtype, for a band of the vocabulary; columns of padding hold anything."""
    plgpu = _plgpu()
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def body(rows_ref, h_ref, ht_ref, w_ref, wt_ref, out_ref, out_smem):
        row, logits, over, _ = _tools(plgpu, rows_ref, h_ref, ht_ref, w_ref, wt_ref, settings, w_ref.shape[0])
        i, j = jax.lax.axis_index("tokens"), jax.lax.axis_index("columns")
        zs, zt, hit = logits(j)
        wide = Row(*(over.wide(x) for x in row))
        dz = fused.logit_gradient(wide, zs, zt, hit, settings.form, values) * (1.0 / settings.temperature)
        out_smem[...] = dz.astype(out_smem.dtype)
        plgpu.commit_smem()
        here = out_ref.at[pl.ds(i * TOKENS, TOKENS), pl.ds(j * COLUMNS, COLUMNS)]
        plgpu.copy_smem_to_gmem(out_smem, here)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((h.shape[0], w.shape[0]), h.dtype),
        scratch_types=[plgpu.SMEM((TOKENS, COLUMNS), h.dtype, transforms=transforms)],
        grid=(h.shape[0] // TOKENS, w.shape[0] // COLUMNS),
        grid_names=("tokens", "columns"),
        interpret=_interpreter(plgpu, settings),
    )(rows, h, ht, w, w_teacher)


# ---- calling them ----------------------------------------------------------------------------------


def _padded(tokens: Tokens, row: Row, w: jax.Array, w_teacher: jax.Array):
    """h, ht, rows [ROW, N], w, w_teacher in whole blocks; the added tokens have weight 0."""
    for x in (tokens.student, tokens.teacher):
        if x.shape[1] % STRIP:
            raise NotImplementedError(f"the GPU kernels want a hidden size that divides by {STRIP}, not {x.shape[1]}")
    rows = jnp.stack(row, axis=1)
    h, ht, rows = (_pad(x, TOKENS) for x in (tokens.student, tokens.teacher, rows))
    return h, ht, rows.T, _pad(w, COLUMNS), _pad(w_teacher, COLUMNS)


def _pad(x: jax.Array, block: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % block), (0, 0)))


def _interpreter(plgpu, settings: Settings):
    if not settings.interpret:
        return None
    return plgpu.InterpretGPUParams()
