"""The sampler: requests of token ids in, completions with log-probs out, slots refilled as they end.

A session keeps a fixed number of slots busy with the programs of `programs`: it prefills waiting prompts
in length buckets, places them into free slots, decodes a block of steps, reads what was drawn, and begins
again. The n samples of a prompt share its prefill; a held slot can be continued. What a request's tokens
depend on is the request alone: it always goes through programs of the same shapes. Knows no tokenizer and
keeps no parameters between calls.
Left out: prompts longer than one prefill's memory allows, slots of different lengths.
"""

import collections
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import jax
import numpy as np

from sdzero_jax import hosts, sharding
from sdzero_jax.errors import UserError
from sdzero_jax.models import LanguageModel, cache_bytes
from sdzero_jax.sampler import programs
from sdzero_jax.sampler.requests import Completion, Request, SampleKey, check_id, check_request
from sdzero_jax.sampler.sampling import request_key_data

_LOG = logging.getLogger(__name__)
# Most tokens that a continued slot reads one by one; a longer remainder is prefilled with all before it.
FORCED = 64
_STOP_IDS = 8  # stop ids per request


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Size of the sampler."""

    slots: Annotated[int, "sequences decoded at once"] = 64
    block: Annotated[int, "steps between two looks at which sequences have ended"] = 16
    prefill_tokens: Annotated[int, "prompt tokens read at once, padding included"] = 2048
    prompt_multiple: Annotated[int, "length of the shortest prompt bucket"] = 16
    weights: Annotated[
        Literal["gathered", "tensor"], "cut as for training and gathered at every step, or recut once: tensor-parallel"
    ] = "tensor"
    cache_dtype: Annotated[
        Literal["", "float32", "bfloat16", "int8", "float8_e4m3fn"], "of the stored keys and values; '' as computed"
    ] = ""


@dataclasses.dataclass
class Statistics:
    """What a session did, in tokens unless noted."""

    prefilled: int = 0  # prompt tokens, without padding
    reused: int = 0  # prompt tokens that did not have to be prefilled: shared by samples, or continued
    decoded: int = 0
    steps: int = 0  # decode steps of all slots together
    slot_steps: int = 0  # slots times steps while requests were waiting
    live_slot_steps: int = 0  # of which a live sequence used

    @property
    def utilisation(self) -> float:
        """Share of the slots that were live while requests were waiting."""
        return self.live_slot_steps / max(self.slot_steps, 1)


class Sampler:
    """Continuous-batching sampler of a language model; see `generate` and `session`."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        slots: int,
        max_len: int,
        stop_ids: Sequence[int],
        block: int = 16,
        prefill_tokens: int = 2048,
        prompt_multiple: int = 16,
        cache_dtype=None,
        mesh=None,
    ):
        """Args: slots, rows decoded at once; max_len, most tokens of prompt + response together."""
        if slots < 1 or max_len < 2 or block < 1 or prompt_multiple < 1:
            raise UserError(
                f"a sampler needs slots, block and prompt_multiple >= 1 and max_len >= 2; "
                f"got {slots}, {block}, {prompt_multiple} and {max_len}"
            )
        for stop in stop_ids:
            check_id("stop id", stop, model.config.vocab_size)
        parts = 1 if mesh is None else sharding.batch_devices(mesh)
        if slots % parts:
            raise UserError(
                f"slots={slots} cannot be divided over {parts} devices; "
                f"the nearest that can is {-(-slots // parts) * parts}"
            )
        self.model, self.slots, self.max_len, self.block = model, slots, max_len, block
        self.stop_ids, self.cache_dtype, self.mesh = tuple(stop_ids), cache_dtype, mesh
        self.parts, self._prefill_tokens = parts, prefill_tokens
        self.buckets = prompt_buckets(prompt_multiple, max_len)

    def generate(self, params, requests: Sequence[Request], *, seed: int) -> Iterator[Completion]:
        """Yields the completions of `requests` as they end.

        A token depends only on (seed, request id, sample index, its position) and the parameters.
        Every request is checked before anything is sampled.
        """
        session = self.session(params, seed=seed)
        session.submit(requests)
        return _drain(session)

    def session(self, params, *, seed: int) -> "Session":
        """A session, to which requests may be added while others run."""
        return Session(self, params, seed)

    def bucket(self, length: int) -> int:
        """Length that a prompt is padded to."""
        return next(size for size in self.buckets if size >= length)

    def prefill_rows(self, bucket: int) -> int:
        """Prompts read at once: as many as make `prefill_tokens`, at most one per slot."""
        rows = max(1, min(self._prefill_tokens // bucket, self.slots))
        return -(-rows // self.parts) * self.parts


def prompt_buckets(multiple: int, max_len: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to: multiple times 1, 2, 3, 4, 6, 8, 12, 16, ...; at most a third is lost."""
    sizes, size = [], multiple
    while not sizes or sizes[-1] < max_len - 1:
        sizes.append(size)
        power = size // multiple
        size += multiple * max(1, (1 << (power.bit_length() - 1)) // 2)
    return tuple(sizes)


def _drain(session: "Session") -> Iterator[Completion]:
    while session.busy:
        yield from session.step()


@dataclasses.dataclass
class _Sample:
    """A sample on its way through a slot."""

    request: Request
    index: int
    forced: tuple[int, ...] = ()  # still to be read before anything is drawn
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    sampling_logprobs: list[float] = dataclasses.field(default_factory=list)
    length: int = 0  # tokens in the cache

    @property
    def key(self) -> SampleKey:
        return self.request.id, self.index


@dataclasses.dataclass
class _Prefilled:
    """A prefilled block of prompts and the samples that wait for its rows."""

    bucket: int
    block: object
    hidden: object
    waiting: collections.deque  # of (row, _Sample)


class Session:
    """One run of a sampler: `submit` requests and call `step` while it is `busy`."""

    def __init__(self, sampler: Sampler, params, seed: int):
        _check_room(sampler)
        self._sampler, self._params, self._seed = sampler, params, seed
        self._queue: collections.deque[Request] = collections.deque()
        self._prefilled: _Prefilled | None = None
        self._slots: list[_Sample | None] = [None] * sampler.slots
        self._held: dict[SampleKey, int] = {}
        self._cache = self._hidden = self._decode_params = None
        self._programs: set[tuple[str, int]] = set()
        self.statistics = Statistics()
        if hosts.count() > 1:  # moving parameters takes all hosts, also one that gets no request
            self._prepare()

    # ---- what the caller does

    def submit(self, requests: Sequence[Request]) -> None:
        """Adds requests; those that continue a held sample go on in its slot, the others wait their turn."""
        sampler = self._sampler
        for request in requests:
            check_request(request, sampler.max_len, sampler.model.config.vocab_size)
            if len(self._stops(request)) > _STOP_IDS:
                raise UserError(f"request {request.id!r} has {len(self._stops(request))} stop ids; at most {_STOP_IDS}")
        for request in requests:
            if request.prefix is None or not self._continue(request):
                self._queue.append(request)

    def release(self, key: SampleKey) -> None:
        """Gives up the slot of a held sample."""
        slot = self._held.pop(key, None)
        if slot is not None:
            self._slots[slot] = None

    @property
    def live(self) -> int:
        """Slots that hold an unfinished sequence."""
        return sum(sample is not None for sample in self._slots) - len(self._held)

    @property
    def busy(self) -> bool:
        """Whether a step would do something: with all slots held, something must be continued or released."""
        return self.live > 0 or ((self._queue or self._prefilled) and None in self._slots)

    @property
    def pending(self) -> int:
        """Samples that have not ended."""
        waiting = len(self._prefilled.waiting) if self._prefilled else 0
        return self.live + waiting + sum(request.n for request in self._queue)

    def step(self) -> list[Completion]:
        """Fills free slots, decodes a block of steps and returns the samples that ended in it."""
        try:
            with sharding.use(self._sampler.mesh):
                self._fill()
                return self._decode() if self.live else []
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
                raise
            raise UserError(
                f"out of device memory while sampling with sampler.slots={self._sampler.slots} of "
                f"{self._sampler.max_len} tokens; lower sampler.slots, or set sampler.cache_dtype=int8"
            ) from None

    # ---- filling slots

    def _continue(self, request: Request) -> bool:
        """Lets a held slot go on with this request if its prompt allows it; else releases the slot."""
        slot = self._held.get(request.prefix)
        if slot is None:
            return False
        before = self._slots[slot]
        seen = (*before.request.prompt, *before.ids)
        common = next(
            (i for i, pair in enumerate(zip(seen, request.prompt)) if pair[0] != pair[1]),
            min(len(seen), len(request.prompt)),
        )
        forced = tuple(request.prompt[common:])
        # A ring of the window's length has overwritten what a longer cut would need.
        fits = len(seen) - common <= 1 and 1 <= len(forced) <= FORCED and request.n == 1
        self.release(request.prefix)
        if not fits:
            return False
        self._slots[slot] = _Sample(request, 0, forced=forced, length=common)
        self.statistics.reused += common
        return True

    def _fill(self) -> None:
        """Places waiting samples into free slots, prefilling as needed."""
        free = [slot for slot, sample in enumerate(self._slots) if sample is None]
        while free and (self._prefilled or self._queue):
            if self._prefilled is None:
                self._prefill()
            waiting, bucket = self._prefilled.waiting, self._prefilled.bucket
            rows = self._sampler.prefill_rows(bucket)
            sources, targets = np.zeros(rows, np.int32), np.full(rows, self._sampler.slots, np.int32)
            for i in range(min(rows, len(free), len(waiting))):
                row, sample = waiting.popleft()
                slot = free.pop(0)
                sources[i], targets[i], self._slots[slot] = row, slot, sample
            self._note("place", bucket)
            self._cache, self._hidden = programs.place(
                self._sampler.model,
                self._cache,
                self._hidden,
                self._prefilled.block,
                self._prefilled.hidden,
                sources,
                targets,
            )
            if not waiting:
                self._prefilled = None

    def _prepare(self) -> None:
        """Makes the cache and moves the parameters to where sampling reads them."""
        sampler = self._sampler
        with sharding.use(sampler.mesh):
            self._cache, self._hidden = programs.empty(
                sampler.model,
                slots=sampler.slots,
                max_len=sampler.max_len,
                dtype=sampler.cache_dtype,
                block=sampler.block,
            )
        self._params = programs.for_sampling(sampler.model, self._params, sampler.mesh)
        self._decode_params = programs.for_decoding(sampler.model, self._params)

    def _prefill(self) -> None:
        """Reads the prompts of waiting requests that share the bucket of the first."""
        sampler = self._sampler
        if self._cache is None:
            self._prepare()
        bucket = sampler.bucket(len(self._queue[0].prompt))
        rows = sampler.prefill_rows(bucket)
        taken, left = [], collections.deque()
        while self._queue and len(taken) < rows:
            request = self._queue.popleft()
            (taken if sampler.bucket(len(request.prompt)) == bucket else left).append(request)
        self._queue.extendleft(reversed(left))
        tokens, counts = np.zeros((rows, bucket), np.int32), np.zeros(rows, np.int32)
        waiting: collections.deque = collections.deque()
        for row, request in enumerate(taken):
            length = len(request.prompt)
            tokens[row, :length], counts[row] = request.prompt, length
            waiting.extend((row, _Sample(request, index, length=length)) for index in range(request.n))
            self.statistics.prefilled += length
            self.statistics.reused += length * (request.n - 1)
        batch = {"tokens": tokens, "counts": counts}
        if sampler.mesh is not None:
            batch = sharding.shard_batch(sampler.mesh, batch)
        self._note("prefill", bucket)
        block, hidden = programs.prefill(sampler.model, self._params, **batch)
        self._prefilled = _Prefilled(bucket, block, hidden, waiting)

    # ---- decoding

    def _decode(self) -> list[Completion]:
        sampler, queue = self._sampler, bool(self._queue or self._prefilled)
        live = [(slot, s) for slot, s in enumerate(self._slots) if s is not None and not self._is_held(slot)]
        fields = self._fields(live)
        self._note("decode", sampler.block)
        state = (self._cache, self._hidden)
        self._cache, self._hidden, out = programs.decode(sampler.model, self._decode_params, *state, fields)
        out = jax.device_get(out)
        ended, used = [], 0
        for slot, sample in live:
            drew = np.flatnonzero(out.drew[slot])
            read = min(len(sample.forced), int(out.steps)) + len(drew)
            sample.forced = sample.forced[int(out.steps) :]
            sample.length += read
            used += read
            sample.ids += out.ids[slot, drew].tolist()
            sample.logprobs += out.logprobs[slot, drew].tolist()
            sample.sampling_logprobs += out.sampling_logprobs[slot, drew].tolist()
            self.statistics.decoded += len(drew)
            if out.stopped[slot] or len(sample.ids) == sample.request.max_new_tokens:
                ended.append(_completion(sample, bool(out.stopped[slot])))
                if sample.request.hold:
                    self._held[sample.key] = slot
                else:
                    self._slots[slot] = None
        self.statistics.steps += int(out.steps)
        if queue:
            self.statistics.slot_steps += int(out.steps) * sampler.slots
            self.statistics.live_slot_steps += used
        return ended

    def _is_held(self, slot: int) -> bool:
        sample = self._slots[slot]
        return sample is not None and self._held.get(sample.key) == slot

    def _fields(self, live) -> programs.Fields:
        """What the device is told about every slot; slots without a live sample rest."""
        slots = self._sampler.slots
        fields = programs.Fields(
            live=np.zeros(slots, bool),
            length=np.zeros(slots, np.int32),
            drawn=np.zeros(slots, np.int32),
            limit=np.ones(slots, np.int32),
            forced=np.zeros((slots, FORCED), np.int32),
            forced_count=np.zeros(slots, np.int32),
            key_data=np.zeros((slots, 2), np.uint32),
            temperature=np.ones(slots, np.float32),
            top_k=np.zeros(slots, np.int32),
            top_p=np.ones(slots, np.float32),
            min_p=np.zeros(slots, np.float32),
            stop_ids=np.full((slots, _STOP_IDS), -1, np.int32),
        )
        for slot, sample in live:
            request = sample.request
            fields.live[slot] = True
            fields.length[slot] = sample.length
            fields.drawn[slot] = len(sample.ids)
            fields.limit[slot] = request.max_new_tokens
            fields.forced[slot, : len(sample.forced)] = sample.forced
            fields.forced_count[slot] = len(sample.forced)
            fields.key_data[slot] = request_key_data(self._seed, *sample.key)
            for name in ("temperature", "top_k", "top_p", "min_p"):
                getattr(fields, name)[slot] = getattr(request, name)
            stops = self._stops(request)
            fields.stop_ids[slot, : len(stops)] = stops
        for slot in self._held.values():  # a held row keeps its length
            fields.length[slot] = self._slots[slot].length
        return fields if self._sampler.mesh is None else sharding.shard_batch(self._sampler.mesh, fields)

    def _stops(self, request: Request) -> tuple[int, ...]:
        return self._sampler.stop_ids if request.stop_ids is None else tuple(request.stop_ids)

    def _note(self, program: str, size: int) -> None:
        """Logs a program of this session when it is used first."""
        if (program, size) not in self._programs:
            self._programs.add((program, size))
            _LOG.info("sampler program %d: %s %d", len(self._programs), program, size)


def _check_room(sampler: Sampler) -> None:
    """UserError when the cache cannot fit the device, before anything is sampled."""
    devices = [jax.devices()[0]] if sampler.mesh is None else list(sampler.mesh.devices.flat)
    stats = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    free = (
        stats["bytes_limit"] - stats["bytes_in_use"]
        if stats
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    whole = cache_bytes(sampler.model.config, sampler.slots, sampler.max_len, sampler.cache_dtype, sampler.block)
    needed = whole / (len(devices) if stats else 1)  # fake devices share the host's memory
    if needed > free:
        fits = int(sampler.slots * free / needed) // sampler.parts * sampler.parts
        raise UserError(
            f"sampler.slots={sampler.slots} of {sampler.max_len} tokens need {needed / 2**30:.1f} GiB of cache, and "
            f"{free / 2**30:.1f} GiB are free; the nearest that fits: {max(fits, sampler.parts)}, or set "
            "sampler.cache_dtype=int8"
        )


def _completion(sample: _Sample, stopped: bool) -> Completion:
    return Completion(
        request_id=sample.request.id,
        sample_index=sample.index,
        ids=tuple(sample.ids),
        logprobs=tuple(sample.logprobs),
        sampling_logprobs=tuple(sample.sampling_logprobs),
        finish_reason="stop" if stopped else "length",
    )
