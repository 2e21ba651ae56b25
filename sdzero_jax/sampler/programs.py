"""The jitted programs of the sampler: prefill, place, and decode a block of steps.

Their shapes come from fixed lists, so their number is bounded: one prefill and one place per prompt
bucket, one decode. A row's result depends on that row alone. Parameters are arguments; the cache is
donated and written in place.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sdzero_jax.models import Cache, LanguageModel, insert
from sdzero_jax.sampler.sampling import sample_tokens
from sdzero_jax.sharding import constrain, move, shardings_for


class Fields(NamedTuple):
    """What the host says about each slot before a block, arrays [B] unless noted."""

    live: jax.Array  # bool
    length: jax.Array  # tokens in the cache
    drawn: jax.Array  # tokens of the response so far
    limit: jax.Array  # most tokens of the response
    forced: jax.Array  # [B, F] tokens to be read before any is drawn
    forced_count: jax.Array
    key_data: jax.Array  # [B, 2] uint32
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    stop_ids: jax.Array  # [B, W], -1 = none


class Drawn(NamedTuple):
    """What a block of K steps drew."""

    ids: jax.Array  # [B, K] int32
    logprobs: jax.Array  # [B, K] float32, at temperature 1 over the whole vocabulary
    sampling_logprobs: jax.Array  # [B, K] float32, under the distribution that was drawn from
    drew: jax.Array  # [B, K] bool, which of them count
    stopped: jax.Array  # [B] bool, drew a stop id
    steps: jax.Array  # int32, how many of the K steps were done


@functools.partial(jax.jit, static_argnames=("model", "slots", "max_len", "dtype", "block"))
def empty(model: LanguageModel, *, slots: int, max_len: int, dtype, block: int) -> tuple[Cache, jax.Array]:
    """An empty cache whose tail has room for a block of steps, and hidden states [slots, D] of no tokens."""
    hidden = jnp.zeros((slots, model.config.hidden_size), model.config.compute_dtype)
    return model.init_cache(slots, max_len, dtype, tail=block), constrain(hidden, "batch", None)


def for_sampling(model: LanguageModel, params, mesh: Mesh | None):
    """The parameters on `mesh`, in the compute dtype, as `prefill` reads them; cast and moved once per session."""
    if mesh is None:
        return _cast(model, params)
    places = shardings_for(mesh, model.param_axes(), model.param_shapes())
    # Cast where they lie: what moves is then in the compute dtype.
    return move(_cast(model, params), places)


@functools.partial(jax.jit, static_argnames=("model",))
def _cast(model: LanguageModel, params):
    def cast(path, leaf):  # as the model would at every use; norms it reads in float32
        return leaf if "norm" in path[-1].key else leaf.astype(model.config.compute_dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def for_decoding(model: LanguageModel, params):
    """The same as `decode` reads them fastest: on a CPU a copy with the layers' stacks taken apart."""
    return _unrolled(model, params) if jax.default_backend() == "cpu" else params


@functools.partial(jax.jit, static_argnames=("model",))
def _unrolled(model: LanguageModel, params):
    return model.unrolled(params)


@functools.partial(jax.jit, static_argnames=("model",))
def prefill(model: LanguageModel, params, tokens: jax.Array, counts: jax.Array) -> tuple[Cache, jax.Array]:
    """Reads prompts, tokens [R, P] of which the first counts [R] are real.

    Returns their keys and values, as the tail of an otherwise empty cache, and the hidden state [R, D] of
    each prompt's last token. Only that one is ever projected to the vocabulary.
    """
    rows, length = tokens.shape
    segments = (jnp.arange(length)[None] < counts[:, None]).astype(jnp.int32)
    cache = model.init_cache(rows, 0, tail=length)
    hidden, cache = model.apply(params, tokens, segment_ids=segments, cache=cache, row_layout="padded")
    last = jnp.maximum(counts - 1, 0)
    return cache, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache", "hidden"))
def place(model, cache: Cache, hidden, block: Cache, block_hidden, sources, rows) -> tuple[Cache, jax.Array]:
    """Copies prefilled rows `sources` [M] into slots `rows` [M]; a slot that does not exist takes nothing."""
    cache = insert(cache, block, model.config, sources, rows)
    return cache, hidden.at[rows].set(block_hidden[sources], mode="drop")


@functools.partial(jax.jit, static_argnames=("model",), donate_argnames=("cache", "hidden"))
def decode(model: LanguageModel, params, cache: Cache, hidden, fields: Fields) -> tuple[Cache, jax.Array, Drawn]:
    """Draws tokens in all live slots, as many steps as the cache's tail is long or until none is live.

    A step draws from the last token's hidden state [B, D] and reads the token drawn; the last token of a
    response is read as well, so that another request can continue after it.
    """
    cache = cache.with_length(fields.length)
    slots, steps = cache.tail_positions.shape

    def step(carry):
        at, cache, hidden, live, drawn, forced_used, out = carry
        with jax.named_scope("draw"):
            logits = model.unembed(params, hidden)  # [B, V]
            token, logprob, sampling_logprob = sample_tokens(
                logits, fields.key_data, drawn, fields.temperature, fields.top_k, fields.top_p, fields.min_p, live
            )
        forced = forced_used < fields.forced_count
        column = jnp.minimum(forced_used, fields.forced.shape[1] - 1)
        token = jnp.where(forced, jnp.take_along_axis(fields.forced, column[:, None], axis=1)[:, 0], token)
        drew = live & ~forced
        put = lambda buffer, value: jax.lax.dynamic_update_slice_in_dim(buffer, value[:, None], at, axis=1)  # noqa: E731
        drawn = drawn + drew
        stopped = drew & jnp.any(token[:, None] == fields.stop_ids, axis=-1)
        out = Drawn(
            put(out.ids, token), put(out.logprobs, logprob), put(out.sampling_logprobs, sampling_logprob),
            put(out.drew, drew), out.stopped | stopped, at + 1,
        )  # fmt: skip
        read, cache = model.apply(params, token[:, None], segment_ids=live[:, None].astype(jnp.int32), cache=cache)
        live = live & ~stopped & (drawn < fields.limit)
        return at + 1, cache, read[:, 0], live, drawn, forced_used + forced, out

    out = Drawn(
        ids=jnp.zeros((slots, steps), jnp.int32),
        logprobs=jnp.zeros((slots, steps), jnp.float32),
        sampling_logprobs=jnp.zeros((slots, steps), jnp.float32),
        drew=jnp.zeros((slots, steps), bool),
        stopped=jnp.zeros(slots, bool),
        steps=jnp.int32(0),
    )
    carry = (jnp.int32(0), cache, hidden, fields.live, fields.drawn, jnp.zeros_like(fields.drawn), out)
    carry = jax.lax.while_loop(lambda c: (c[0] < steps) & jnp.any(c[3]), step, carry)
    _, cache, hidden, *_, out = carry
    return model.commit(cache), hidden, out
