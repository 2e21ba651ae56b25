"""The sampler: requests of token ids in, completions with log-probs out.

Requests are grouped by the shape they need (prompt bucket, new tokens), padded to a fixed
number of slots, prefilled and decoded in one jitted program that stops when every row has
ended. The shape of a request depends on that request alone, so its tokens do not change with
its neighbours. Knows no tokenizer and keeps no parameters between calls.
Leaves out refilling a slot before its group ends.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sdzero_jax import sharding
from sdzero_jax.errors import UserError
from sdzero_jax.models import LanguageModel
from sdzero_jax.sampler.sampling import request_key_data, sample_tokens


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Size of the sampler."""

    slots: Annotated[int, "sequences decoded at once"] = 64
    prompt_multiple: Annotated[int, "prompt lengths are rounded up to a multiple of this"] = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, to be completed `n` times. `stop_ids` None means the sampler's own."""

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled response: ids with the end token if it ended, one log-prob per id.

    `logprobs` are at temperature 1 over the whole vocabulary, `sampling_logprobs` under the
    distribution that was sampled.
    """

    request_id: str
    sample_index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class Sampler:
    """Batched sampling from a language model; see `generate`."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        max_len: int,
        stop_ids: Sequence[int],
        prompt_multiple: int = 16,
        cache_dtype=None,
        mesh=None,
    ):
        """Args: slots, rows decoded at once; max_len, most tokens of prompt + response together."""
        if slots < 1 or max_len < 2:
            raise UserError(f"a sampler needs slots >= 1 and max_len >= 2; got {slots} and {max_len}")
        for stop in stop_ids:
            _check_id("stop id", stop, model.config.vocab_size)
        if mesh is not None and slots % sharding.batch_devices(mesh):
            raise UserError(
                f"slots={slots} cannot be divided over {sharding.batch_devices(mesh)} devices; "
                f"the nearest that can is {_round_up(slots, sharding.batch_devices(mesh))}"
            )
        self.model, self.slots, self.max_len = model, slots, max_len
        self.stop_ids, self.prompt_multiple = tuple(stop_ids), prompt_multiple
        self.cache_dtype, self.mesh = cache_dtype, mesh

    def generate(self, params, requests: Sequence[Request], *, seed: int) -> Iterator[Completion]:
        """Yields the completions of `requests`, group by group.

        A token depends only on (seed, request id, sample index, its position) and the parameters.
        Every request is checked before anything is sampled.
        """
        for request in requests:
            self._check(request)
        groups: dict[tuple[int, int], list[tuple[Request, int]]] = {}
        for request in requests:
            shape = (self._prompt_bucket(len(request.prompt)), request.max_new_tokens)
            groups.setdefault(shape, []).extend((request, index) for index in range(request.n))
        return self._run(params, groups, seed)

    def _run(self, params, groups, seed: int) -> Iterator[Completion]:
        for (prompt_length, new_tokens), samples in groups.items():
            for start in range(0, len(samples), self.slots):
                yield from self._group(params, samples[start : start + self.slots], prompt_length, new_tokens, seed)

    def _check(self, request: Request) -> None:
        if request.n < 1 or request.max_new_tokens < 1:
            raise UserError(
                f"request {request.id!r} has n={request.n}, max_new_tokens={request.max_new_tokens}; "
                "both must be at least 1"
            )
        length = len(request.prompt)
        if length < 1 or length + request.max_new_tokens > self.max_len:
            raise UserError(
                f"request {request.id!r}: prompt of {length} tokens + {request.max_new_tokens} new ones; "
                f"wanted 1 to {self.max_len} together (raise max_len or lower max_new_tokens)"
            )
        if request.temperature < 0 or not 0 < request.top_p <= 1 or request.top_k < 0 or not 0 <= request.min_p < 1:
            raise UserError(
                f"request {request.id!r} has temperature={request.temperature}, top_p={request.top_p}, "
                f"top_k={request.top_k}, min_p={request.min_p}; wanted temperature >= 0, 0 < top_p <= 1, "
                "top_k >= 0, 0 <= min_p < 1"
            )
        for token in request.stop_ids or ():
            _check_id("stop id", token, self.model.config.vocab_size)

    def _prompt_bucket(self, length: int) -> int:
        """Prompt lengths share programs: a multiple up to 256 tokens, a power of two beyond."""
        if length <= 256:
            return _round_up(length, self.prompt_multiple)
        return 1 << (length - 1).bit_length()

    def _group(self, params, samples, prompt_length: int, new_tokens: int, seed: int) -> Iterator[Completion]:
        """Samples up to `slots` (request, sample index) pairs in one call of the program."""
        rows = self._rows(samples, prompt_length, seed)
        if self.mesh is not None:
            rows = sharding.shard_batch(self.mesh, rows)
        filtered = any(r.top_k > 0 or r.top_p < 1.0 or r.min_p > 0.0 for r, _ in samples)
        with sharding.use(self.mesh):
            out = _generate(
                self.model, params, rows, new_tokens=new_tokens, filtered=filtered, cache_dtype=self.cache_dtype
            )
        ids, logprobs, sampling_logprobs, lengths, stopped = jax.device_get(out)
        for row, (request, index) in enumerate(samples):
            length = int(lengths[row])
            yield Completion(
                request_id=request.id,
                sample_index=index,
                ids=tuple(ids[row, :length].tolist()),
                logprobs=tuple(logprobs[row, :length].tolist()),
                sampling_logprobs=tuple(sampling_logprobs[row, :length].tolist()),
                finish_reason="stop" if stopped[row] else "length",
            )

    def _rows(self, samples, prompt_length: int, seed: int) -> dict[str, np.ndarray]:
        """Request fields as arrays [slots, ...]; unused slots hold an empty prompt and end at once."""
        slots = self.slots
        stop_lists = [self.stop_ids if r.stop_ids is None else tuple(r.stop_ids) for r, _ in samples]
        width = max(len(self.stop_ids), 4, *(len(stops) for stops in stop_lists))
        rows = {
            "prompt": np.zeros((slots, prompt_length), np.int32),
            "prompt_length": np.zeros(slots, np.int32),
            "key_data": np.zeros((slots, 2), np.uint32),
            "live": np.zeros(slots, bool),
            "temperature": np.ones(slots, np.float32),
            "top_p": np.ones(slots, np.float32),
            "top_k": np.zeros(slots, np.int32),
            "min_p": np.zeros(slots, np.float32),
            "stop_ids": np.full((slots, width), -1, np.int32),
        }
        for row, ((request, index), stops) in enumerate(zip(samples, stop_lists)):
            rows["prompt"][row, : len(request.prompt)] = request.prompt
            rows["prompt_length"][row] = len(request.prompt)
            rows["key_data"][row] = request_key_data(seed, request.id, index)
            rows["live"][row] = True
            rows["stop_ids"][row, : len(stops)] = stops
            for name in ("temperature", "top_p", "top_k", "min_p"):
                rows[name][row] = getattr(request, name)
        return rows


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check_id(what: str, token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        raise UserError(f"{what} {token} is not in the vocabulary; wanted 0 to {vocabulary - 1}")


@functools.partial(jax.jit, static_argnames=("model", "new_tokens", "filtered", "cache_dtype"))
def _generate(model: LanguageModel, params, rows, *, new_tokens: int, filtered: bool, cache_dtype):
    """Prefill and decode until every row has ended.

    Returns ids, logprobs, sampling_logprobs [B, new_tokens], lengths [B], stopped [B].
    """
    batch, prompt_length = rows["prompt"].shape
    column = jnp.arange(prompt_length)[None]
    segments = (column < rows["prompt_length"][:, None]).astype(jnp.int32)
    positions = jnp.broadcast_to(column, segments.shape)
    cache = model.init_cache(batch, prompt_length + new_tokens, dtype=cache_dtype)
    hidden, cache = model.apply(params, rows["prompt"], positions=positions, segment_ids=segments, cache=cache)
    # Only the last prompt position is projected to the vocabulary.
    last = jnp.maximum(rows["prompt_length"] - 1, 0)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)  # [B, 1, D]

    def draw(hidden, lengths):
        logits = model.unembed(params, hidden)[:, 0]  # [B, V]
        return sample_tokens(
            logits, rows["key_data"], lengths, rows["temperature"], rows["top_k"], rows["top_p"],
            rows["min_p"], filtered=filtered,
        )  # fmt: skip

    def record(step, token, logprob, sampling_logprob, live, outputs):
        """Writes column `step` of the outputs; finished rows keep zeros."""
        ids, logprobs, sampling_logprobs, lengths, stopped = outputs
        put = lambda buffer, value: jax.lax.dynamic_update_slice_in_dim(  # noqa: E731
            buffer, jnp.where(live, value, 0).astype(buffer.dtype)[:, None], step, axis=1
        )
        ended = live & jnp.any(token[:, None] == rows["stop_ids"], axis=-1)
        outputs = (
            put(ids, token), put(logprobs, logprob), put(sampling_logprobs, sampling_logprob),
            lengths + live, stopped | ended,
        )  # fmt: skip
        return live & ~ended, outputs

    def step_fn(carry):
        step, token, live, cache, outputs = carry
        position = (rows["prompt_length"] + step - 1)[:, None]
        hidden, cache = model.apply(
            params, token[:, None], positions=position, segment_ids=live[:, None].astype(jnp.int32), cache=cache
        )
        token, *logprobs = draw(hidden, outputs[3])
        live, outputs = record(step, token, *logprobs, live, outputs)
        return step + 1, token, live, cache, outputs

    outputs = (
        jnp.zeros((batch, new_tokens), jnp.int32),
        jnp.zeros((batch, new_tokens), jnp.float32),
        jnp.zeros((batch, new_tokens), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
    )
    token, *logprobs = draw(hidden, outputs[3])
    live, outputs = record(0, token, *logprobs, rows["live"], outputs)
    carry = (jnp.int32(1), token, live, cache, outputs)
    carry = jax.lax.while_loop(lambda c: (c[0] < new_tokens) & jnp.any(c[2]), step_fn, carry)
    return carry[4]
