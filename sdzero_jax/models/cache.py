"""The cache: keys and values of the tokens seen so far, one sequence per row.

New tokens enter a short tail, which is cheap to write at every step; `commit` moves the tail to where
the sequence lies. Between two commits the long part is only read, so no step copies it. Position p of a
row lies in slot p modulo the number of slots: layers with a sliding window keep a ring of their window,
the others as many slots as the longest sequence. Stored in the compute dtype, a narrower float, or int8 /
float8_e4m3fn with a scale per token and head. Left out: pages shared between rows.
"""

import jax
import jax.numpy as jnp
from flax import struct

from sdzero_jax.ops.attention import Stored
from sdzero_jax.sharding import constrain

QUANTISED = ("int8", "float8_e4m3fn")
# Slots read at once. Small chunks waste little of the longest row's last one, large ones are fewer steps: on a
# CPU, 64 rows of 256 tokens took as long with 32 as with 128. Not measured on other devices.
CHUNKS = {"cpu": 32, "default": 256}


@struct.dataclass
class Cache:
    """See the module. To hand a row to a new sequence, set its `length` to 0 after a commit."""

    stored: dict[str, Stored]  # layer type -> its layers, in order
    tail_k: jax.Array  # [L, B, KV, K, H]
    tail_v: jax.Array  # [L, B, KV, K, H]
    tail_positions: jax.Array  # [B, K] int32, -1 = unused
    tail_used: jax.Array  # int32, columns of the tail in use

    @property
    def length(self) -> jax.Array:
        """[B] int32, committed tokens of each row."""
        return next(iter(self.stored.values())).length

    def with_length(self, length: jax.Array) -> "Cache":
        """The cache with its rows' committed lengths [B] set: 0 empties a row, less than before cuts it."""
        return self.replace(stored={kind: part._replace(length=length) for kind, part in self.stored.items()})


def layers_of(config, layer_type: str) -> int:
    return config.num_groups * config.layer_pattern.count(layer_type)


def empty_cache(config, batch: int, max_len: int, dtype, tail: int) -> Cache:
    """A cache of a decoder with this config; see `LanguageModel.init_cache`."""
    dtype = jnp.dtype(config.compute_dtype if dtype is None else dtype)
    length = jnp.zeros((batch,), jnp.int32)
    most = CHUNKS.get(jax.default_backend(), CHUNKS["default"])

    def store(kind: str) -> Stored:
        slots = min(max_len, config.sliding_window) if kind == "sliding" else max_len
        chunk = min(most, max(slots, 1))
        lead, width = (layers_of(config, kind), -(-slots // chunk), batch, config.num_kv_heads), config.head_dim
        scale = jnp.zeros((*lead, chunk), jnp.float32) if dtype.name in QUANTISED else None
        zeros = lambda *shape: constrain(  # noqa: E731
            jnp.zeros((*lead, *shape), dtype), None, None, "batch", "act_heads", None, None
        )
        return Stored(zeros(width, chunk), zeros(chunk, width), scale, scale, length)

    shape = (config.num_layers, batch, config.num_kv_heads, tail, config.head_dim)
    return Cache(
        stored={kind: store(kind) for kind in dict.fromkeys(config.layer_pattern)},
        tail_k=jnp.zeros(shape, config.compute_dtype),
        tail_v=jnp.zeros(shape, config.compute_dtype),
        tail_positions=jnp.full((batch, tail), -1, jnp.int32),
        tail_used=jnp.int32(0),
    )


def cache_bytes(config, batch: int, max_len: int, dtype, tail: int) -> float:
    """Bytes of such a cache, on one device."""
    shapes = jax.eval_shape(lambda: empty_cache(config, batch, max_len, dtype, tail))
    return float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)))


def extend(cache: Cache, k: jax.Array, v: jax.Array, positions: jax.Array) -> Cache:
    """Adds k, v [L, B, KV, T, H] at positions [B, T] (-1 = padding) to the tail, which must have room."""
    at = cache.tail_used
    put = jax.lax.dynamic_update_slice_in_dim
    return cache.replace(
        tail_k=put(cache.tail_k, k.astype(cache.tail_k.dtype), at, axis=3),
        tail_v=put(cache.tail_v, v.astype(cache.tail_v.dtype), at, axis=3),
        tail_positions=put(cache.tail_positions, positions, at, axis=1),
        tail_used=at + positions.shape[1],
    )


def commit(cache: Cache, config) -> Cache:
    """Moves the tail to where the sequences lie; the tail is empty again."""
    rows = jnp.arange(cache.tail_positions.shape[0])
    stored = _stored_with(cache.stored, config, rows, cache.tail_k, cache.tail_v, cache.tail_positions)
    return cache.replace(stored=stored, tail_positions=jnp.full_like(cache.tail_positions, -1), tail_used=jnp.int32(0))


def insert(cache: Cache, block: Cache, config, sources: jax.Array, rows: jax.Array) -> Cache:
    """Copies sequences that lie in the tail of `block`, one prefilled from empty, into rows of `cache`.

    Args: sources [M], rows of `block`; rows [M], rows of `cache`, which are overwritten; a number that is
      not a row of `cache` copies nothing.
    """
    take = lambda x, axis: jnp.take(x, sources, axis=axis)  # noqa: E731
    emptied = cache.with_length(cache.length.at[rows].set(0, mode="drop"))
    stored = _stored_with(
        emptied.stored, config, rows, take(block.tail_k, 1), take(block.tail_v, 1), take(block.tail_positions, 0)
    )
    return cache.replace(stored=stored)


def _stored_with(stored: dict[str, Stored], config, rows, k, v, positions) -> dict[str, Stored]:
    """`stored` with k, v [L, M, KV, T, H] at positions [M, T] of rows [M]; -1 and unknown rows are dropped."""
    pattern = config.layer_pattern
    before = next(iter(stored.values())).length
    length = before.at[rows].add(jnp.sum(positions >= 0, axis=1, dtype=jnp.int32), mode="drop")
    out = {}
    for kind, old in stored.items():
        slots, chunk = old.slots, old.v.shape[4]
        own = [i for i in range(config.num_layers) if pattern[i % len(pattern)] == kind]
        own_k, own_v = (k, v) if len(stored) == 1 else (k[jnp.asarray(own)], v[jnp.asarray(own)])
        # Of positions that share a slot of a ring only the last may be written.
        last = jnp.take(length, rows, mode="clip")[:, None]
        kept = (positions >= 0) & (positions >= last - slots)
        slot = jnp.where(kept, positions % slots, slots)  # slot `slots` does not exist
        at = (slice(None), slot // chunk, rows[:, None], slice(None))  # the arrays are [M, T]
        token = slot % chunk
        new_k, k_scale = _encode(own_k, old.k.dtype)
        new_v, v_scale = _encode(own_v, old.v.dtype)
        out[kind] = Stored(
            k=_put(old.k, (*at, slice(None), token), new_k),
            v=_put(old.v, (*at, token), new_v),
            k_scale=None if k_scale is None else _put(old.k_scale, (*at, token), k_scale),
            v_scale=None if v_scale is None else _put(old.v_scale, (*at, token), v_scale),
            length=length,
        )
    return out


def _put(old: jax.Array, at, new: jax.Array) -> jax.Array:
    """new [N, M, KV, T, ...] at places `at` of old, whose indexed axes [M, T] come first in what is set."""
    return old.at[at].set(jnp.moveaxis(new, (1, 3), (0, 1)), mode="drop")


def _encode(x: jax.Array, dtype) -> tuple[jax.Array, jax.Array | None]:
    """x [..., H] in `dtype`, and its scale [...] when that is a quantised one."""
    if dtype.name not in QUANTISED:
        return x.astype(dtype), None
    integer = dtype.name == "int8"
    largest = 127.0 if integer else float(jnp.finfo(dtype).max)
    scale = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1) / largest
    scaled = x.astype(jnp.float32) / jnp.where(scale == 0.0, 1.0, scale)[..., None]
    return (jnp.round(scaled) if integer else scaled).astype(dtype), scale
