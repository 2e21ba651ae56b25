"""JAX's splash attention for TPU (jax.experimental.pallas) behind this project's shapes and masks.

Left out: caches, positions other than the index in the row, and meshes (a kernel sees one device's share).
"""

import functools

import jax
import jax.numpy as jnp

BLOCK = 512  # rows and keys per block; not tuned
LANES = 128  # a block is a multiple of this


def splash_attention(q, k, v, segments, window, interpret: bool = False):
    """Attention within segments, causal by index -> [B, T, H, D] in q's dtype.

    q [B, T, H, D]; k, v [B, T, KV, D]; segments int32 [B, T]. Equal to causality by position where
    positions rise by one along every segment. Segment 0 gets zeros. `window` counts the latest indices
    that a query sees, its own included. `interpret` runs it without a TPU, slowly.
    """
    length, block = q.shape[1], min(BLOCK, _up(q.shape[1], LANES))
    kernel = _kernel(q.shape[2], _up(length, block), window, block, interpret)
    real = (segments != 0)[:, :, None, None]

    def by_head(x):  # [B, T, N, D] -> [B, N, T padded, D]
        return jnp.pad(x, ((0, 0), (0, -length % block), (0, 0), (0, 0))).swapaxes(1, 2)

    # The kernel does not scale. Padding sees padding in it, which keeps every softmax finite.
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    segments = jnp.pad(segments, ((0, 0), (0, -length % block)))
    out = jax.vmap(kernel)(by_head(scaled), by_head(k), by_head(v), segments)
    return jnp.where(real, out.swapaxes(1, 2)[:, :length], 0)


@functools.lru_cache(maxsize=64)
def _kernel(heads: int, length: int, window: int | None, block: int, interpret: bool):
    """The kernel for one row, its block lists numpy constants; cached, since listing the blocks takes seconds."""
    # Imported here: Pallas for TPU is slow to import, and most runs never need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as lists

    left = None if window is None else window - 1
    mask = masks.MultiHeadMask([masks.LocalMask((length, length), (left, 0), 0)] * heads)
    # What splash.make_splash_mha does, except that nothing is put on a device: under the mesh of a TPU
    # that is not attached there is none, and inside a trace the cache would hold tracers.
    queries, mask_function = lists.process_mask(mask, (block, block))
    keys, _ = lists.process_mask_dkv(mask, (block, block))
    # Separate kernels for dq and for dk, dv: the fused one writes a dq per block of keys.
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = splash.SplashAttentionKernel(
        queries,
        queries,
        keys,
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=mask_function,
        interpret=interpret,
    )
    return lambda q, k, v, segments: kernel(q, k, v, splash.SegmentIds(q=segments, kv=segments))


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
