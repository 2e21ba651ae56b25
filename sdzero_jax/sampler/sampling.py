"""From logits to a token: temperature, top-k, top-p, min-p, and per-request random keys.

Everything is row-wise, so that a token depends on its own row only.
"""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np


def request_key_data(seed: int, request_id: str, sample_index: int) -> np.ndarray:
    """Raw threefry key [2] uint32 of one sample: a hash of (seed, request id, sample index)."""
    digest = hashlib.blake2b(f"{seed}/{request_id}/{sample_index}".encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype=np.uint32)


def filter_logits(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array
) -> jax.Array:
    """Logits [B, V] at `temperature` with everything outside top-k, top-p and min-p at -inf.

    The filters apply in this order, each to what the one before left, as in transformers.

    Args:
      logits: [B, V] float32.
      temperature: [B], > 0.
      top_k: [B] int32; 0 keeps all.
      top_p: [B]; the smallest set whose probability reaches top_p stays; 1 keeps all.
      min_p: [B]; tokens below min_p times the largest probability go; 0 keeps all.
    """
    vocabulary = logits.shape[-1]
    logits = logits / temperature[:, None]
    order = jnp.argsort(-logits, axis=-1, stable=True)  # ties: the lower id first
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(vocabulary)[None]
    ranked = jnp.where((top_k[:, None] > 0) & (rank >= top_k[:, None]), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    ranked = jnp.where((top_p[:, None] < 1.0) & (before >= top_p[:, None]), -jnp.inf, ranked)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    ranked = jnp.where(probabilities < min_p[:, None] * probabilities[:, :1], -jnp.inf, ranked)
    inverse = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(ranked, inverse, axis=-1)


def sample_tokens(
    logits: jax.Array,
    key_data: jax.Array,
    position: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    filtered: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws one token per row.

    Args:
      logits: [B, V] float32.
      key_data: [B, 2] uint32, see `request_key_data`.
      position: [B] int32, the index of the token in its response; folded into the key.
      temperature: [B]; 0 is greedy.
      filtered: False when no row uses top-k, top-p or min-p; saves the sort.

    Returns:
      tokens [B] int32, their log-probs at temperature 1 without filters [B] float32, and their
      log-probs under the distribution they were drawn from [B] float32 (0 where greedy).
    """
    greedy = temperature <= 0.0
    safe = jnp.where(greedy, 1.0, temperature)
    plain = jax.nn.log_softmax(logits, axis=-1)
    if filtered:
        drawn_from = jax.nn.log_softmax(filter_logits(logits, safe, top_k, top_p, min_p), axis=-1)
    else:
        drawn_from = jax.nn.log_softmax(logits / safe[:, None], axis=-1)

    def gumbel(data, index):
        key = jax.random.wrap_key_data(data, impl="threefry2x32")
        return jax.random.gumbel(jax.random.fold_in(key, index), (logits.shape[-1],), jnp.float32)

    noise = jax.vmap(gumbel)(key_data, position)
    scores = jnp.where(greedy[:, None], logits, drawn_from + noise)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    pick = lambda values: jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]  # noqa: E731
    return tokens, pick(plain), jnp.where(greedy, 0.0, pick(drawn_from))
