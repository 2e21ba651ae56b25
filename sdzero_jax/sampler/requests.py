"""What the sampler is asked for and what it answers; knows arrays of ids only."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from sdzero_jax.errors import UserError

SampleKey = tuple[str, int]  # request id, sample index


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt, to be completed `n` times. `stop_ids` None means the sampler's own.

    `hold` keeps the slot of a finished sample, with its cache, until a request names it as `prefix` or
    it is released. A request with a prefix continues in that slot where its prompt begins with the same
    tokens: what follows them is fed token by token instead of prefilling the whole.
    """

    id: str
    prompt: Sequence[int]
    max_new_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_ids: Sequence[int] | None = None
    prefix: SampleKey | None = None
    hold: bool = False


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


def check_request(request: Request, max_len: int, vocabulary: int) -> None:
    """UserError for a request that cannot be sampled."""
    if request.n < 1 or request.max_new_tokens < 1:
        raise UserError(
            f"request {request.id!r} has n={request.n}, max_new_tokens={request.max_new_tokens}; "
            "both must be at least 1"
        )
    length = len(request.prompt)
    if length < 1 or length + request.max_new_tokens > max_len:
        raise UserError(
            f"request {request.id!r}: prompt of {length} tokens + {request.max_new_tokens} new ones; "
            f"wanted 1 to {max_len} together (raise max_len or lower max_new_tokens)"
        )
    if request.temperature < 0 or not 0 < request.top_p <= 1 or request.top_k < 0 or not 0 <= request.min_p < 1:
        raise UserError(
            f"request {request.id!r} has temperature={request.temperature}, top_p={request.top_p}, "
            f"top_k={request.top_k}, min_p={request.min_p}; wanted temperature >= 0, 0 < top_p <= 1, "
            "top_k >= 0, 0 <= min_p < 1"
        )
    for token in request.stop_ids or ():
        check_id("stop id", token, vocabulary)


def check_id(what: str, token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        raise UserError(f"{what} {token} is not in the vocabulary; wanted 0 to {vocabulary - 1}")
