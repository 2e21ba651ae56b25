"""The records that travel between stages: Question, Verdict, Rollout, RevisionTrace.

Host-side, frozen, numpy- and jax-free, so that a verifier process can load them quickly.
JSON forms are what the trace and response files hold, one record a line.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Outcome = Literal["correct", "wrong", "unparseable", "timeout", "error", "gold_unparseable"]
REWARDS: Mapping[str, float | None] = {
    "correct": 1.0,
    "wrong": 0.0,
    "unparseable": 0.0,
    "timeout": None,
    "error": None,
    "gold_unparseable": None,
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A verifiable problem. `gold` holds every accepted answer; `kind` names its verifier."""

    id: str
    prompt: str
    gold: tuple[str, ...]
    kind: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A grader's word. `reward` is None when the grader itself failed: such a sample is masked."""

    outcome: Outcome
    reward: float | None
    detail: str = ""

    @classmethod
    def of(cls, outcome: Outcome, detail: str = "") -> "Verdict":
        return cls(outcome, REWARDS[outcome], detail)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One sampled response with its verdict.

    `response_ids` are the ids as sampled, the end token included when it ended
    (`finish_reason` "stop"); `logprobs` are at temperature 1, one per response id, `sampling_logprobs`
    under the distribution that was drawn from.
    """

    question: Question
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    verdict: Verdict
    sample_index: int = 0
    sampling_logprobs: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class RevisionTrace:
    """x, y_init, r, P_r, y_rev (ALGORITHM: collection). Ids end to end; nothing is re-tokenised.

    `init_ids` carries no end token (SRT never shows one before the control phrase), whether y_init ended by
    itself or was cut off, which `init_finish` says; `phrase_ids` are d + P_r + d; `revised_ids` ends with the
    end token.
    """

    question_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    init_ids: tuple[int, ...]
    init_verdict: Verdict
    phrase_ids: tuple[int, ...]
    revised_ids: tuple[int, ...]
    revised_verdict: Verdict
    revised_finish: Literal["stop", "length"]
    init_finish: Literal["stop", "length"] = "stop"  # files of older versions do not have it

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "RevisionTrace":
        fields = dict(record)
        for name in ("prompt_ids", "init_ids", "phrase_ids", "revised_ids"):
            fields[name] = tuple(fields[name])
        for name in ("init_verdict", "revised_verdict"):
            fields[name] = Verdict(**fields[name])
        return cls(**fields)


def kept(traces: Sequence[RevisionTrace], only_right: bool = True) -> list[RevisionTrace]:
    """D_rev: revisions that are right and ended by themselves, each (x, y_init, y_rev) once.

    Without `only_right` wrong revisions stay too (an ablation); those without a verdict never do.
    """
    unique: dict[tuple, RevisionTrace] = {}
    wanted = (1.0,) if only_right else (0.0, 1.0)
    for trace in traces:
        if trace.revised_verdict.reward in wanted and trace.revised_finish == "stop":
            unique.setdefault((trace.prompt_ids, trace.init_ids, trace.revised_ids), trace)
    return list(unique.values())
