"""One decoder for both families: static dials, scanned layer groups, a cache in and out.

`DecoderConfig` holds the dials (norm position, QK-norm, layer pattern, RoPE per layer type),
`LanguageModel` the pure functions. Parameters are a plain nested dict; every layer parameter is
stacked over the repetitions of the layer pattern. Left out: dropout, mixture of experts.
"""

import dataclasses
import functools
import math
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from sdzero_jax.errors import UserError, nearest
from sdzero_jax.models.cache import Cache, commit, empty_cache, extend
from sdzero_jax.ops.attention import IMPLEMENTATIONS, attention, cached_attention, chunks_needed
from sdzero_jax.sharding import constrain

_CHOICES = {
    "norm_position": ("pre", "post"),
    "qk_norm": ("head", "projection", "none"),
    "remat": ("none", "dots", "full", "offload"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "compute_dtype": ("float32", "bfloat16", "float16"),
    "attention": IMPLEMENTATIONS,
}
_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
LAYER_TYPES = ("full", "sliding")
LORA = "lora"  # where a tree of parameters holds adapters


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Shape and dials of a decoder; raises UserError when they contradict each other."""

    vocab_size: Annotated[int, "rows of the embedding table"]
    hidden_size: Annotated[int, "width of the residual stream"]
    num_layers: Annotated[int, "number of layers, a multiple of the layer pattern's length"]
    num_heads: Annotated[int, "query heads"]
    num_kv_heads: Annotated[int, "key and value heads, a divisor of num_heads"]
    head_dim: Annotated[int, "width of one head, even"]
    intermediate_size: Annotated[int, "width of the SwiGLU layer"]
    rms_norm_eps: Annotated[float, "epsilon of every RMSNorm"] = 1e-6
    norm_position: Annotated[str, "RMSNorm before (pre, Qwen3) or after (post, Olmo-3) attention and MLP"] = "pre"
    qk_norm: Annotated[str, "RMSNorm of queries and keys: per head, whole projection, or none"] = "head"
    layer_pattern: Annotated[tuple[str, ...], "layer types (full, sliding), repeated"] = ("full",)
    sliding_window: Annotated[int, "positions a sliding layer sees, its own included"] = 4096
    rope_theta: Annotated[float, "RoPE base of full layers"] = 10_000.0
    rope_theta_sliding: Annotated[float, "RoPE base of sliding layers, which never use YaRN"] = 10_000.0
    yarn_factor: Annotated[float, "YaRN context extension of full layers; 1 is plain RoPE"] = 1.0
    yarn_original_length: Annotated[int, "context length before YaRN's extension"] = 8192
    yarn_beta_fast: Annotated[float, "YaRN: dimensions turning faster than this are kept"] = 32.0
    yarn_beta_slow: Annotated[float, "YaRN: dimensions turning slower than this are interpolated"] = 1.0
    yarn_attention_factor: Annotated[float, "YaRN: scale of cos and sin; 0 means 0.1 ln(factor) + 1"] = 0.0
    tie_embeddings: Annotated[bool, "use the embedding table as the output matrix"] = False
    attention_bias: Annotated[bool, "biases on the four attention projections"] = False
    max_position: Annotated[int, "longest context, written into an exported config"] = 32_768
    initializer_range: Annotated[float, "standard deviation of random weights"] = 0.02
    param_dtype: Annotated[str, "dtype of random weights: float32, bfloat16 or float16"] = "float32"
    compute_dtype: Annotated[str, "dtype of activations: float32, bfloat16 or float16"] = "float32"
    remat: Annotated[
        str, "recomputed in the backward pass: none, dots (all but matmuls), full, offload (full, inputs on the host)"
    ] = "none"
    attention: Annotated[str, "attention: auto, reference, chunked, cudnn (GPU) or splash (TPU)"] = "auto"

    def __post_init__(self):
        for field, choices in _CHOICES.items():
            value = getattr(self, field)
            if value not in choices:
                raise UserError(f"{field}={value!r} is not known{nearest(str(value), choices)}")
        for field in _SIZES:
            if getattr(self, field) < 1:
                raise UserError(f"{field}={getattr(self, field)}; wanted at least 1")
        object.__setattr__(self, "layer_pattern", tuple(self.layer_pattern))
        unknown = [kind for kind in self.layer_pattern if kind not in LAYER_TYPES]
        if unknown or not self.layer_pattern:
            raise UserError(f"layer_pattern={self.layer_pattern!r} may hold only {', '.join(LAYER_TYPES)}")
        if self.num_layers % len(self.layer_pattern):
            near = max(1, round(self.num_layers / len(self.layer_pattern))) * len(self.layer_pattern)
            raise UserError(
                f"num_layers={self.num_layers} is not a multiple of the layer pattern's length "
                f"{len(self.layer_pattern)}; nearest: {near}"
            )
        if self.num_heads % self.num_kv_heads:
            fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            near = min(fits, key=lambda n: abs(n - self.num_kv_heads))
            raise UserError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; nearest: {near}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} must be even for RoPE; nearest: {self.head_dim + 1}")
        if "sliding" in self.layer_pattern and self.sliding_window < 1:
            raise UserError(f"sliding_window={self.sliding_window} must be at least 1 with sliding layers")

    @property
    def num_groups(self) -> int:
        """How often the layer pattern repeats: the leading axis of every layer parameter."""
        return self.num_layers // len(self.layer_pattern)


# ---------------------------------------------------------------------------------- rotary tables


def rope_frequencies(config: DecoderConfig, layer_type: str) -> tuple[np.ndarray, float]:
    """Angular frequencies float64 [H / 2] of a layer type, and the scale of cos and sin.

    Plain RoPE on sliding layers; on full layers YaRN (Peng et al., arXiv:2309.00071, section 3.2
    and 3.4) when `yarn_factor` is not 1.
    """
    theta = config.rope_theta if layer_type == "full" else config.rope_theta_sliding
    plain = theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    if layer_type != "full":
        return plain, 1.0

    def dimension(turns: float) -> float:
        """The (fractional) dimension that makes this many turns over the original context."""
        length = config.yarn_original_length / (turns * 2 * math.pi)
        return config.head_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(dimension(config.yarn_beta_fast)), 0)
    high = min(math.ceil(dimension(config.yarn_beta_slow)), config.head_dim - 1)
    ramp = np.clip((np.arange(config.head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    frequencies = plain * (1 - ramp) + plain / config.yarn_factor * ramp
    scale = config.yarn_attention_factor or 0.1 * math.log(config.yarn_factor) + 1.0
    return frequencies, scale


def rope_table(config: DecoderConfig, layer_type: str, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, H / 2], of positions [B, T]."""
    frequencies, scale = rope_frequencies(config, layer_type)
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, N, H] by a table; the halves of a head are the two coordinates (as in HF)."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# --------------------------------------------------------------------------------------- modules


@struct.dataclass
class _Where:
    """What every layer needs to know about the tokens; built once, outside the scan."""

    positions: jax.Array  # [B, T]
    segments: jax.Array  # [B, T]
    tables: dict[str, tuple[jax.Array, jax.Array]]  # layer type -> cos, sin
    cache: Cache | None
    chunks: dict[str, jax.Array]  # layer type -> how much of the cache is read
    layout: str = struct.field(pytree_node=False)  # of the rows, as `ops.attention` names them


def _norm(x: jax.Array, scale: jax.Array, eps: float, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """RMSNorm over `axes` with float32 statistics; result in x's dtype."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(x32 * x32, axis=axes, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps) * scale.astype(jnp.float32)).astype(x.dtype)


def _matmul(x: jax.Array, w: jax.Array, contracted: int = 1) -> jax.Array:
    """x [..., C] times w [C, ...] over the last `contracted` axes of x, as a product of two matrices.

    In the gradient of w a batch and a length would both be summed over, for which XLA writes down a
    transposed copy of the cotangent; on a CPU that took longer than the product.
    """
    depth = math.prod(w.shape[:contracted])
    out = x.reshape(-1, depth) @ w.reshape(depth, -1)
    return out.reshape(*x.shape[: x.ndim - contracted], *w.shape[contracted:])


class _Weights(nn.Module):
    """Base of the modules below: parameters declared with their shape and logical axes in one line."""

    config: DecoderConfig

    def matrix(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        init = nn.initializers.normal(self.config.initializer_range)
        weight = self._declare(name, init, shape, axes)
        return weight.astype(self.config.compute_dtype)

    def project(self, x: jax.Array, name: str, weight: jax.Array, contracted: int = 1) -> jax.Array:
        """x times the matrix `name` over its first `contracted` axes, and times its adapter where there is one.

        The adapter (`models.lora`) is not added to the matrix first: so its gradient is that of two narrow
        products, and no gradient of the matrix is ever made.
        """
        out = _matmul(x, weight, contracted)
        if self.has_variable(LORA, name):
            adapter = {side: leaf.astype(x.dtype) for side, leaf in self.get_variable(LORA, name).items()}
            out = out + _matmul(_matmul(x, adapter["a"], contracted), adapter["b"])
        return out

    def scale(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self._declare(name, nn.initializers.ones, shape, axes)

    def bias(self, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self._declare(name, nn.initializers.zeros, shape, axes).astype(self.config.compute_dtype)

    def _declare(self, name, init, shape, axes):
        dtype = jnp.dtype(self.config.param_dtype)
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, dtype)


class _Attention(_Weights):
    block: int  # place in the layer pattern

    @property
    def layer_type(self) -> str:
        return self.config.layer_pattern[self.block]

    @nn.compact
    def __call__(self, x, group, where: _Where):
        c = self.config
        hidden, heads, kv_heads, width = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim
        # Random weights depend on the order of declaration, so it stays as it is.
        w_q = self.matrix("query", (hidden, heads, width), ("embed", "heads", "head_dim"))
        w_k = self.matrix("key", (hidden, kv_heads, width), ("embed", "kv_heads", "head_dim"))
        w_v = self.matrix("value", (hidden, kv_heads, width), ("embed", "kv_heads", "head_dim"))
        w_out = self.matrix("out", (heads, width, hidden), ("heads", "head_dim", "embed"))
        q, k, v = (self.project(x, name, w) for name, w in (("query", w_q), ("key", w_k), ("value", w_v)))
        if c.attention_bias:
            q = q + self.bias("query_bias", (heads, width), ("heads", "head_dim"))
            k = k + self.bias("key_bias", (kv_heads, width), ("kv_heads", "head_dim"))
            v = v + self.bias("value_bias", (kv_heads, width), ("kv_heads", "head_dim"))
        if c.qk_norm == "head":
            q = _norm(q, self.scale("query_norm", (width,), ("norm",)), c.rms_norm_eps)
            k = _norm(k, self.scale("key_norm", (width,), ("norm",)), c.rms_norm_eps)
        elif c.qk_norm == "projection":
            q_scale = self.scale("query_norm", (heads, width), ("heads", "norm"))
            k_scale = self.scale("key_norm", (kv_heads, width), ("kv_heads", "norm"))
            q = _norm(q, q_scale, c.rms_norm_eps, (-2, -1))
            k = _norm(k, k_scale, c.rms_norm_eps, (-2, -1))
        q = constrain(_rotate(q, where.tables[self.layer_type]), "batch", "length", "act_heads", None)
        k = constrain(_rotate(k, where.tables[self.layer_type]), "batch", "length", "act_heads", None)
        window = c.sliding_window if self.layer_type == "sliding" else None
        cache = where.cache
        if cache is not None and where.layout == "any":
            pattern = c.layer_pattern
            order = pattern[: self.block].count(self.layer_type)  # among the pattern's layers of this type
            tail = group * len(pattern) + self.block
            tail = (cache.tail_k[tail], cache.tail_v[tail], cache.tail_positions)
            stored, layer = cache.stored[self.layer_type], group * pattern.count(self.layer_type) + order
            chunks = where.chunks[self.layer_type]
            k, v = (x.swapaxes(1, 2) for x in (k, v))  # [B, KV, T, H]
            out = cached_attention(q, (k, v), tail, stored, layer, chunks, where.positions, window)
        else:
            out = attention(
                q,
                k,
                v,
                q_positions=where.positions,
                kv_positions=where.positions,
                q_segments=where.segments,
                kv_segments=where.segments,
                window=window,
                layout=where.layout,
                implementation=c.attention,
            )  # [B, T, N, H]
            k, v = (x.swapaxes(1, 2) for x in (k, v))
        out = self.project(out, "out", w_out, contracted=2)
        if c.attention_bias:
            out = out + self.bias("out_bias", (hidden,), ("norm",))
        return out, None if cache is None else (k, v)


class _Mlp(_Weights):
    @nn.compact
    def __call__(self, x):
        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        gate = self.project(x, "gate", self.matrix("gate", (hidden, wide), ("embed", "mlp")))
        up = self.project(x, "up", self.matrix("up", (hidden, wide), ("embed", "mlp")))
        wide_out = constrain(jax.nn.silu(gate) * up, "batch", "length", "act_mlp")
        return self.project(wide_out, "down", self.matrix("down", (wide, hidden), ("mlp", "embed")))


class _Block(_Weights):
    block: int  # place in the layer pattern

    @nn.compact
    def __call__(self, x, group, where: _Where):
        c = self.config
        x = checkpoint_name(x, _BLOCK_INPUT)
        before = c.norm_position == "pre"
        attention_norm = self.scale("attention_norm", (c.hidden_size,), ("norm",))
        mlp_norm = self.scale("mlp_norm", (c.hidden_size,), ("norm",))
        y = _norm(x, attention_norm, c.rms_norm_eps) if before else x
        y, kv = _Attention(c, self.block, name="attention")(y, group, where)
        x = x + (y if before else _norm(y, attention_norm, c.rms_norm_eps))
        x = constrain(x, "batch", "length", "act_embed")
        y = _norm(x, mlp_norm, c.rms_norm_eps) if before else x
        y = _Mlp(c, name="mlp")(y)
        x = x + (y if before else _norm(y, mlp_norm, c.rms_norm_eps))
        return constrain(x, "batch", "length", "act_embed"), kv


_BLOCK_INPUT = "block_input"
# What a block keeps for its backward pass. Its inputs are kept in any case, unless the policy keeps
# something that everything else follows from: for offload, the input's copy in the host's memory.
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class _Group(nn.Module):
    """The layer pattern once."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, group, where: _Where):
        block = _Block
        if self.config.remat != "none":
            # The scan around us is what keeps the compiler from undoing the recomputation.
            block = nn.remat(_Block, policy=_REMAT_POLICIES[self.config.remat], prevent_cse=False)
        fresh = []
        for i in range(len(self.config.layer_pattern)):
            x, kv = block(self.config, i, name=f"block_{i}")(x, group, where)
            fresh.append(kv)
        if where.cache is None:
            return x, None
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *fresh)  # [pattern, B, KV, T, H]


def _unrolled_name(group: int) -> str:
    return f"layers_{group}"


class _Decoder(_Weights):
    """tokens [B, T] -> hidden states after the final norm [B, T, D], and with a cache their (k, v).

    k and v are [L, B, KV, T, H]. The cache is only read: carried through the scan it would be copied.
    """

    @nn.compact
    def __call__(self, tokens, where: _Where):
        c = self.config
        # The embedding is read in the parameters' dtype: its gradient sums over many tokens.
        init = nn.initializers.normal(c.initializer_range)
        table = self._declare("embedding", init, (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        if not c.tie_embeddings:
            self._declare("unembedding", init, (c.vocab_size, c.hidden_size), ("vocab", "embed"))
        # The table stays cut along its width: every device looks its columns up for all rows that share
        # them, and one exchange of activations follows. Gathering the table, and summing its gradient
        # from every device, would each hold a whole [V, D] in float32.
        tokens = constrain(tokens, "lookup_batch", "length")
        x = jnp.take(constrain(table, "vocab", "embed"), tokens, axis=0).astype(c.compute_dtype)
        x = constrain(x, "lookup_batch", "length", "embed")
        x = constrain(x, "batch", "length", "act_embed")
        if self.has_variable("params", _unrolled_name(0)):
            groups = []
            for group in range(c.num_groups):
                x, kv = _Group(c, name=_unrolled_name(group))(x, group, where)
                groups.append(kv)
            kv = jax.tree.map(lambda *groups: jnp.stack(groups), *groups)
        else:
            scanned = nn.scan(
                _Group,
                variable_axes={"params": 0, LORA: 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),
                length=c.num_groups,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, kv = scanned(c, name="layers")(x, jnp.arange(c.num_groups), where)
        kv = jax.tree.map(lambda x: x.reshape(c.num_layers, *x.shape[2:]), kv)
        return _norm(x, self.scale("final_norm", (c.hidden_size,), ("norm",)), c.rms_norm_eps), kv


# ------------------------------------------------------------------------------------------ model


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """The pure functions of one decoder. Hashable, so it may be a static argument of jit.

    `hf_config` is the text of the config.json that the model came from ("" when it came from
    none); it takes no part in comparison and is written back on export.
    """

    config: DecoderConfig
    hf_config: str = dataclasses.field(default="", compare=False, repr=False)

    @functools.partial(jax.jit, static_argnums=0)
    def init(self, key: jax.Array) -> dict[str, Any]:
        """Random parameters: normal(initializer_range) matrices, ones for norms, zeros for biases."""
        return jax.tree.map(_unbox, self._boxed(key), is_leaf=_is_boxed)

    def param_shapes(self) -> dict[str, Any]:
        """The parameters as ShapeDtypeStructs; nothing is computed."""
        return jax.tree.map(_unbox, self._abstract(), is_leaf=_is_boxed)

    def param_axes(self) -> dict[str, Any]:
        """The logical axes of every parameter, a tuple of names per leaf."""
        return jax.tree.map(lambda leaf: leaf.names, self._abstract(), is_leaf=_is_boxed)

    def _boxed(self, key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        config = dataclasses.replace(self.config, attention="reference")  # a kernel's device may be elsewhere
        return _Decoder(config).init(key, tokens, self._where(tokens, tokens, None, "any"))["params"]

    @functools.lru_cache(maxsize=64)  # noqa: B019 - tracing takes 0.1 s and samplers ask at every session
    def _abstract(self):
        return jax.eval_shape(self._boxed, jax.random.key(0))

    def init_cache(self, batch: int, max_len: int, dtype: Any = None, tail: int = 1) -> Cache:
        """An empty cache of `max_len` tokens per row, of which `tail` may wait for a commit.

        `dtype` (default: the compute dtype) is what it is stored in: a float, or int8 or float8_e4m3fn
        with a scale per token and head.
        """
        return empty_cache(self.config, batch, max_len, dtype, tail)

    def commit(self, cache: Cache) -> Cache:
        """Empties the cache's tail into its long part."""
        return commit(cache, self.config)

    def apply(
        self,
        params: dict[str, Any],
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        row_layout: str | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """tokens [B, T] -> (hidden [B, T, D] after the final norm, cache).

        params may hold adapters as well (`lora.attach`), which are then applied.
        segment_ids [B, T] (default all 1): a token attends within its segment only, 0 is padding.
        positions [B, T] (default: counted from 0 in every run of equal segment ids). Hidden states of
        padding are meaningless.

        With a cache, the tokens of row b that are not padding continue its sequence, and are added to
        the cache's tail, which must have room for T; segments and positions are its own affair then.

        row_layout (static) is what the caller promises about positions and segments, as in
        `ops.attention`: "any" (the default, unless both are left out), "packed" or "padded"; the fused
        attention kernels need one of the last two. With a cache these also promise that it is empty:
        the tokens then attend to each other and nothing is read back.
        """
        if row_layout is None:
            row_layout = "padded" if segment_ids is None and positions is None and cache is None else "any"
        if self.config.remat == "offload":
            _need_host_memory()
        if segment_ids is None:
            segment_ids = jnp.ones(tokens.shape, jnp.int32)
        if cache is not None:
            if positions is not None:
                raise ValueError("with a cache, positions follow from the tokens before; wanted positions=None")
            real = segment_ids != 0
            before = cache.length + jnp.sum(cache.tail_positions >= 0, axis=1)
            positions = jnp.where(real, before[:, None] + jnp.cumsum(real, axis=1) - 1, -1).astype(jnp.int32)
        elif positions is None:
            positions = _positions_in_runs(segment_ids)
        own = {name: leaf for name, leaf in params.items() if name != LORA}
        hidden, kv = _Decoder(self.config).apply(
            {"params": own, LORA: params.get(LORA, {})},
            tokens,
            self._where(positions, segment_ids, cache, row_layout),
        )
        return hidden, None if cache is None else extend(cache, *kv, positions)

    def _where(self, positions, segment_ids, cache, layout):
        kinds = dict.fromkeys(self.config.layer_pattern)
        chunks = {}
        if cache is not None:
            live = jnp.where(jnp.max(positions, axis=1) >= 0, cache.length, 0)  # rows of padding read nothing
            chunks = {kind: chunks_needed(part, live) for kind, part in cache.stored.items()}
        return _Where(
            positions=positions,
            segments=segment_ids,
            tables={kind: rope_table(self.config, kind, positions) for kind in kinds},
            cache=cache,
            chunks=chunks,
            layout=layout,
        )

    def unrolled(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters with the layers' stacks taken apart, which `apply` takes as well.

        A scan copies each layer's weights out of the stack, on a CPU for a fifth of the time of a decode
        step; what decodes many steps takes them apart once.
        """
        rest = {name: leaf for name, leaf in params.items() if name != "layers"}
        take = lambda group: jax.tree.map(lambda leaf: leaf[group], params["layers"])  # noqa: E731
        return rest | {_unrolled_name(group): take(group) for group in range(self.config.num_groups)}

    def unembedding(self, params: dict[str, Any]) -> jax.Array:
        """The output matrix [V, D] in the parameters' dtype: the embedding table when tied."""
        # The constraint is for its gradient: each device keeps its part of the sum, not the whole matrix.
        return constrain(params["embedding" if self.config.tie_embeddings else "unembedding"], "vocab", "embed")

    def unembed(self, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> logits [..., V] float32, accumulated in float32."""
        weight = self.unembedding(params).astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


def _need_host_memory() -> None:
    """Refuses remat="offload" on devices without a pinned host memory; those of a slice to come are trusted."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform != jax.default_backend():
        return
    kinds = [memory.kind for memory in jax.local_devices()[0].addressable_memories()]
    if "pinned_host" not in kinds:
        raise UserError(
            f"remat='offload' needs devices with a pinned_host memory, and {jax.default_backend()} has "
            f"{', '.join(kinds)}; the nearest that needs none: full"
        )


def _is_boxed(node: Any) -> bool:
    return isinstance(node, nn.meta.AxisMetadata)


def _unbox(leaf: Any) -> Any:
    return leaf.value


def _positions_in_runs(segment_ids: jax.Array) -> jax.Array:
    """[B, T] segment ids -> how far each token stands from the first of its run of equal ids."""
    index = jnp.arange(segment_ids.shape[1])[None]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
