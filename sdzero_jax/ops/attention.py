"""Causal grouped-query attention with segments, positions and a sliding window.

Four implementations under one signature. "reference" writes the [T, S] scores down; "chunked" visits
blocks with an online softmax; "cudnn" and "splash" are the fused kernels of GPUs and TPUs. "auto" takes
a kernel where one can do the job, else chunked when T * S is large, else the reference.

The fused kernels know indices, not positions, and cuDNN (as jax.nn offers it) knows no segments. What
segments and positions hold is known only when the program runs, so the caller promises a layout:

  any     nothing: caches, decoding, positions chosen by hand. Never reaches a fused kernel.
  packed  queries and keys are the same tokens, every segment is one run of neighbours and positions rise
          by one along it. Then causal by index within a segment is causal by position, and so is the window.
  padded  packed, and a row holds at most one segment, which starts at index 0; padding follows.

A layout that the rows do not have gives wrong results, silently. Neither kernel has been run here on the
device that it is for: splash was compiled for TPUs that were not attached and compared with the reference
in Pallas' interpreter; of cuDNN the arguments were tested. Left out: dropout, biases, attention sinks.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels.attention_cached import Stored, cached_attention, chunks_needed
from kernels.attention_chunked import MASKED, chunked_attention, scores, visible
from kernels.attention_splash import splash_attention
from sdzero_jax.errors import UserError, nearest

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "LAYOUTS",
    "Stored",
    "attention",
    "cached_attention",
    "chunks_needed",
]

KERNELS = ("cudnn", "splash")
IMPLEMENTATIONS = ("auto", "reference", "chunked", *KERNELS)
LAYOUTS = ("any", "packed", "padded")
BATCH_AXES = ("data", "fsdp")  # mesh axes that split rows
HEAD_AXIS = "tensor"  # mesh axis that splits heads
# Above this many scores per head and row, blocks are cheaper than a written-down matrix. Measured on CPU,
# forward + gradient, chunked over reference: 0.98 at 128 x 128, 0.75 at 256, 0.65 at 512, 0.30 at 1024.
_AUTO_CHUNKED_SCORES = 1 << 16


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    window: int | None = None,
    layout: str = "any",
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention of q over the keys of its own segment at or before its position.

    Args:
      q: [B, T, H, D]. k, v: [B, S, KV, D] with H a multiple of KV. Scores are scaled by D ** -0.5; softmax
        is float32.
      q_positions, q_segments: int32 [B, T]; kv_positions, kv_segments: int32 [B, S]. Segment 0 is padding:
        it sees nothing and is seen by nothing.
      window: a query sees the `window` latest positions, its own included; None sees all.
      layout: what the caller promises about the rows, see above: any, packed or padded.
      implementation: auto, reference, chunked, cudnn or splash.
    Returns: [B, T, H, D] in q's dtype; a query that sees no key gets zeros.
    Raises: UserError for an unknown name; NotImplementedError when the kernel asked for cannot do this, with
      the reason.
    """
    for what, name, names in (
        ("attention implementation", implementation, IMPLEMENTATIONS),
        ("row layout", layout, LAYOUTS),
    ):
        if name not in names:
            raise UserError(f"unknown {what} {name!r}{nearest(name, names)}")
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
    implementation = _choose(implementation, q, k, layout)
    if implementation == "cudnn":
        return _on_mesh(_cudnn, q, k, v, q_segments, window)
    if implementation == "splash":
        return _on_mesh(splash_attention, q, k, v, q_segments, window)
    run = chunked_attention if implementation == "chunked" else _reference
    # [B, T, KV, G, D]: query heads grouped by the key head they share, so that k is not repeated.
    grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, q.shape[3])
    return run(grouped, k, v, q_positions, kv_positions, q_segments, kv_segments, window).reshape(q.shape)


# ---- the choice ----------------------------------------------------------------------------------


def _choose(implementation: str, q: jax.Array, k: jax.Array, layout: str) -> str:
    """The implementation that runs: `implementation` itself unless it is auto."""
    if implementation in KERNELS:
        reason = _unfit(implementation, q, k, layout)
        if reason:
            raise NotImplementedError(f"attention {implementation!r} {reason}; auto takes what fits")
    if implementation != "auto":
        return implementation
    for kernel in KERNELS:
        if not _unfit(kernel, q, k, layout):
            return kernel
    return "chunked" if q.shape[1] * k.shape[1] > _AUTO_CHUNKED_SCORES else "reference"


def _unfit(kernel: str, q: jax.Array, k: jax.Array, layout: str) -> str | None:
    """Why a kernel cannot do this, None when it can."""
    platform, head_dim = _platform(), q.shape[3]
    if layout == "any":
        return "needs rows of layout packed or padded, and these may have any positions and segments"
    if q.shape[1] != k.shape[1]:
        return f"needs queries and keys of the same tokens, not {q.shape[1]} queries and {k.shape[1]} keys"
    if kernel == "splash":
        if platform != "tpu":
            return f"needs a TPU, and this is a {platform}"
        if q.dtype not in (jnp.float32, jnp.bfloat16):
            return f"needs float32 or bfloat16, not {q.dtype}"
        if head_dim % 64:
            return f"needs a head_dim that is a multiple of 64, not {head_dim}"
        return None
    if platform != "gpu":
        return f"needs an NVIDIA GPU, and this is a {platform}"
    if layout != "padded":
        return "sees across segments, and these rows may hold several (layout packed)"
    if q.dtype not in (jnp.float16, jnp.bfloat16):
        return f"needs float16 or bfloat16, not {q.dtype}"
    capability = _compute_capability()
    if capability < 8.0:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, not {capability}"
    widest = 256 if capability >= 9.0 else 128
    if head_dim % 8 or head_dim > widest:
        return f"needs a head_dim that is a multiple of 8 up to {widest}, not {head_dim}"
    return None


def _platform() -> str:
    """cpu, gpu or tpu: of the mesh that is set (it may be of devices not attached), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def _compute_capability() -> float:
    """Of the first GPU, such as 9.0; 0.0 where there is none or it is not NVIDIA's."""
    try:
        return float(jax.local_devices(backend="gpu")[0].compute_capability)
    except (RuntimeError, AttributeError, ValueError):
        return 0.0


# ---- implementations -----------------------------------------------------------------------------


def _reference(q, k, v, q_positions, kv_positions, q_segments, kv_segments, window):
    mask = visible(q_positions, kv_positions, q_segments, kv_segments, window)
    mask = mask[:, None, None]  # [B, 1, 1, T, S]
    masked = jnp.where(mask, scores(q, k), MASKED)
    top = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(masked - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0.0, 1.0, total)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)


def _cudnn(q, k, v, segments, window):
    """Rows of layout padded, [B, T, H, D] and [B, T, KV, D], through cuDNN's fused attention."""
    real = (segments != 0)[:, :, None, None]
    # What cuDNN writes into padding is its own affair: it is kept out of the result, and out of the
    # gradients by the selection on the way in. A row of padding alone counts as one token.
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    lengths = jnp.maximum(jnp.sum(segments != 0, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        # Also with a window: without it cuDNN would let a query see the future.
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return jnp.where(real, out, 0)


def _on_mesh(kernel: Callable, q, k, v, segments, window) -> jax.Array:
    """kernel(q, k, v, segments, window) on each device's rows and heads, if a mesh is set.

    Rows or heads that do not divide over their axes stay whole: then every device computes all of them.
    Key heads fewer than the devices along the head axis are repeated, so that each has those it needs.
    """

    def run(q, k, v, segments):
        return kernel(q, k, v, segments, window)

    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    # A kernel must be manual over every axis, those of one device included.
    sizes = {name: size for name, size, kind in axes if kind == AxisType.Auto}
    if not sizes:
        return run(q, k, v, segments)
    rows = tuple(name for name in BATCH_AXES if name in sizes)
    rows = rows if q.shape[0] % math.prod(sizes[name] for name in rows) == 0 else ()
    tensor = sizes.get(HEAD_AXIS, 1)
    heads = HEAD_AXIS if tensor > 1 and q.shape[2] % tensor == 0 else None
    if heads:
        repeats = _key_repeats(q.shape[2], k.shape[2], tensor)
        k, v = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k, v))
    spec = P(rows or None, None, heads, None)
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    split = jax.shard_map(
        run, in_specs=(spec, spec, spec, P(rows or None)), out_specs=spec, axis_names=set(sizes), check_vma=False
    )
    return split(q, k, v, segments)


def _key_repeats(heads: int, kv_heads: int, parts: int) -> int:
    """How often each key head must be repeated for `parts` equal shares of the heads to have theirs."""
    repeats = math.lcm(kv_heads, parts) // kv_heads
    return repeats if heads % (kv_heads * repeats) == 0 else heads // kv_heads
