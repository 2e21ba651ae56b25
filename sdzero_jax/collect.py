"""Phase 1, data: sample y_init, grade, append the control phrase, sample y_rev, grade, write.

Every revised attempt is written, with both verdicts; `kept` says which of them enter D_rev.
The file is append-only and a chunk of questions is the unit of restart.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from sdzero_jax.batches import strip_end
from sdzero_jax.chunks import ChunkLog, fill
from sdzero_jax.errors import HealthStop
from sdzero_jax.examples import Question, RevisionTrace, Rollout, kept
from sdzero_jax.rollouts import (
    Domain,
    SamplingConfig,
    rollouts_from_json,
    rollouts_to_json,
    sample_and_revise,
    sample_responses,
)
from sdzero_jax.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """How revision traces are collected."""

    questions: Annotated[int, "training questions to sample"] = 1024
    responses: Annotated[int, "first attempts per question"] = 1
    revisions: Annotated[int, "revisions per first attempt"] = 1
    revise: Annotated[Literal["all", "wrong", "correct"], "which first attempts are revised"] = "all"
    chunk: Annotated[int, "questions sampled between two writes"] = 256
    sampling: Annotated[SamplingConfig, "how first attempts and revisions are drawn"] = SamplingConfig()


def collect(
    path: pathlib.Path,
    config: CollectConfig,
    domain: Domain,
    sampler: Sampler,
    params: Any,
    questions: Sequence[Question],
    *,
    seed: int,
) -> tuple[list[RevisionTrace], dict[str, float]]:
    """Writes the revised attempts of every question to `path` (JSON lines); returns them and a summary.

    Goes on where an earlier call stopped. Raises Stopped between two chunks on a signal.
    """
    log = ChunkLog(path)

    def make(number: int, part: Sequence[Question]):
        traces, counts = _collect_chunk(config, domain, sampler, params, part, f"collect/{number:06d}", seed)
        return [trace.to_json() for trace in traces], counts

    def summary() -> dict[str, float]:
        return collection_summary([RevisionTrace.from_json(record) for record in log.records], log.closings)

    shown = ("init_accuracy", "revised_accuracy", "kept")
    fill(log, "collect", questions, config.chunk, make, lambda: {name: summary()[name] for name in shown})
    return [RevisionTrace.from_json(record) for record in log.records], summary()


def _collect_chunk(config: CollectConfig, domain: Domain, sampler, params, questions, label: str, seed: int):
    """First attempts and their revisions for one chunk of questions: (traces, counts)."""
    attempts, revisions = sample_and_revise(
        domain, sampler, params, questions, config.sampling, label=label, seed=seed,
        n=config.responses, revisions=config.revisions,
        revise={"all": (0.0, 1.0), "wrong": (0.0,), "correct": (1.0,)}[config.revise],
    )  # fmt: skip
    traces = [
        RevisionTrace(
            question_id=attempt.question.id,
            sample_index=attempt.sample_index * config.revisions + revision.sample_index,
            prompt_ids=attempt.prompt_ids,
            init_ids=strip_end(attempt, domain.tokenizer.stop_ids),
            init_verdict=attempt.verdict,
            phrase_ids=tuple(domain.phrase_ids(attempt.verdict.reward)),
            revised_ids=revision.response_ids,
            revised_verdict=revision.verdict,
            revised_finish=revision.finish_reason,
            init_finish=attempt.finish_reason,
        )
        for attempt, own in zip(attempts, revisions)
        for revision in own
    ]
    if all(attempt.verdict.reward is None for attempt in attempts):
        verdict = attempts[0].verdict
        raise HealthStop(
            f"collect: none of {len(attempts)} responses has a verdict ({verdict.outcome}: {verdict.detail}); look at "
            "the questions' answers or tests, and at problems.graders"
        )
    counts = {
        "questions": len(questions),
        "attempts": len(attempts),
        "right": sum(attempt.verdict.reward == 1.0 for attempt in attempts),
        "no_verdict": sum(attempt.verdict.reward is None for attempt in attempts),
        "attempt_tokens": sum(len(attempt.response_ids) for attempt in attempts),
    }
    return traces, counts


def sample(
    path: pathlib.Path,
    config: SamplingConfig,
    domain: Domain,
    sampler: Sampler,
    params: Any,
    questions: Sequence[Question],
    *,
    n: int,
    chunk: int,
    seed: int,
) -> tuple[list[Rollout], dict[str, float]]:
    """Writes n graded responses per question to `path`, without log-probs; returns them and their counts.

    Goes on like `collect`.
    """
    log = ChunkLog(path)

    def make(number: int, part: Sequence[Question]):
        label = f"sample/{number:06d}"
        fresh = sample_responses(domain, sampler, params, part, config, label=label, seed=seed, n=n)
        bare = [dataclasses.replace(rollout, logprobs=(), sampling_logprobs=()) for rollout in fresh]
        return rollouts_to_json(bare), {"questions": len(part)}

    def figures() -> dict[str, float]:
        return {"accuracy": _mean_reward(record["verdict"]["reward"] for record in log.records)}

    fill(log, "sample", questions, chunk, make, figures)
    rollouts = rollouts_from_json(log.records)
    tokens = sum(len(rollout.response_ids) for rollout in rollouts)
    return rollouts, {"questions": len(questions), "generations": len(rollouts), "sampled_tokens": tokens}


def _mean_reward(rewards: Iterable[float | None]) -> float:
    """Over those that have a verdict; 0 when none has."""
    judged = [reward for reward in rewards if reward is not None]
    return sum(judged) / max(len(judged), 1)


def collection_summary(traces: Sequence[RevisionTrace], closings: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Counts and accuracies of a collection, as the report shows them; `closings` end its chunks."""
    names = ("questions", "attempts", "right", "no_verdict", "attempt_tokens")
    total = {name: sum(closing[name] for closing in closings) for name in names}
    good = kept(traces)
    return {
        "questions": total["questions"],
        "generations": total["attempts"] + len(traces),
        "revised": len(traces),
        "kept": len(good),
        "kept_from_wrong": sum(trace.init_verdict.reward == 0.0 for trace in good),
        "no_verdict": total["no_verdict"],
        "init_accuracy": total["right"] / max(total["attempts"] - total["no_verdict"], 1),
        "revised_accuracy": _mean_reward(trace.revised_verdict.reward for trace in traces),
        "sampled_tokens": total["attempt_tokens"] + sum(len(trace.revised_ids) for trace in traces),
    }
