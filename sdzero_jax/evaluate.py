"""Evaluation: avg@k, pass@k, greedy, and generate-then-revise with correction and keep rates.

Every response is written so that it can be graded again; a chunk of questions is the unit of
restart. Two definitions of the revision rates are reported: `correction_rate` / `keep_rate` on
the model's own wrong / right first attempts (the paper's), `fix` / `keep` on the base model's,
which compares revisers on equal ground.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from sdzero_jax import statistics
from sdzero_jax.chunks import ChunkLog, fill
from sdzero_jax.examples import Question, Rollout, Verdict
from sdzero_jax.prompts import revision_words
from sdzero_jax.rollouts import Domain, SamplingConfig, sample_and_revise, sample_responses, sample_revisions
from sdzero_jax.sampler import Sampler


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is evaluated, and how."""

    questions: Annotated[int, "questions asked"] = 512
    split: Annotated[Literal["test", "validation"], "of which questions; tuning must not see the test"] = "test"
    k: Annotated[int, "first attempts per question, for avg@k and pass@k"] = 4
    chunk: Annotated[int, "questions sampled between two writes"] = 128
    sampling: Annotated[SamplingConfig, "how attempts and revisions are drawn"] = SamplingConfig()


def evaluate(
    path: pathlib.Path,
    config: EvaluateConfig,
    domain: Domain,
    sampler: Sampler,
    params: Any,
    questions: Sequence[Question],
    base_records: Sequence[Mapping[str, Any]] | None = None,
    *,
    name: str,
    seed: int,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Writes one record per first attempt to `path`; returns the records and their metrics, with the model's name.

    Args:
      base_records: records of the base model on the same questions, whose attempts are revised
        for `fix` and `keep`; None when this is the base model.
    """
    log = ChunkLog(path)
    base: dict[str, list] = {}
    for record in base_records or ():
        base.setdefault(record["question_id"], []).append(record)

    def make(number: int, part: Sequence[Question]):
        return _evaluate_chunk(config, domain, sampler, params, part, base, number, seed), {}

    def figures() -> dict[str, float]:
        accuracy = evaluation_metrics(log.records, config.k)[f"avg@{config.k}"]
        return {} if accuracy is None else {"accuracy": accuracy}

    fill(log, f"eval {name}", questions, config.chunk, make, figures)
    return log.records, {"model": name} | evaluation_metrics(log.records, config.k)


def _evaluate_chunk(config, domain: Domain, sampler, params, questions, base, number: int, seed: int):
    """Records of one chunk: attempts, a greedy one, revisions of own attempts and of the base's."""
    label = f"evaluate/{number:06d}"
    ask = functools.partial(sample_responses, domain, sampler, params, questions, seed=seed)
    attempts, revisions = sample_and_revise(
        domain, sampler, params, questions, config.sampling, label=label, seed=seed, n=config.k
    )
    greedy = ask(dataclasses.replace(config.sampling, temperature=0.0), label=f"{label}/greedy")
    theirs = [_as_rollout(record, domain, question) for question in questions for record in base.get(question.id, ())]
    on_base = _revise(config, domain, sampler, params, theirs, f"{label}/base_revision", seed)
    records = []
    for row, (attempt, own) in enumerate(zip(attempts, revisions)):
        record = {
            "question_id": attempt.question.id,
            "prompt": attempt.question.prompt,
            "gold": list(attempt.question.gold),
            "sample_index": attempt.sample_index,
            **_response(domain, attempt, ""),
            **_stated(domain, attempt),
            **_response(domain, own[0] if own else None, "revised_"),
        }
        if theirs:
            record |= {"base_reward": theirs[row].verdict.reward}
            record |= _response(domain, on_base[row], "base_revised_")
        if attempt.sample_index == 0:
            record |= _response(domain, greedy[row // config.k], "greedy_")
        records.append(record)
    return records


def _revise(config, domain, sampler, params, attempts: Sequence[Rollout], label: str, seed: int):
    """One revision per attempt, None where the attempt has no verdict."""
    graded = [attempt for attempt in attempts if attempt.verdict.reward is not None]
    revisions = iter(sample_revisions(domain, sampler, params, graded, config.sampling, label=label, seed=seed))
    return [None if attempt.verdict.reward is None else next(revisions) for attempt in attempts]


def _response(domain: Domain, rollout: Rollout | None, prefix: str) -> dict[str, Any]:
    """A rollout as record fields; nothing for a revision that was not made."""
    if rollout is None:
        return {}
    return {
        f"{prefix}response": domain.tokenizer.decode(rollout.response_ids),
        f"{prefix}ids": list(rollout.response_ids),
        f"{prefix}finish": rollout.finish_reason,
        f"{prefix}reward": rollout.verdict.reward,
        f"{prefix}outcome": rollout.verdict.outcome,
        f"{prefix}tokens": len(rollout.response_ids),
    }


def _stated(domain: Domain, rollout: Rollout) -> dict[str, Any]:
    """The answer of a first attempt, for the majority vote, where a domain has answers."""
    if domain.stated is None:
        return {}
    return {"answer": domain.stated(rollout.question, domain.tokenizer.decode(rollout.response_ids))}


def _as_rollout(record: Mapping[str, Any], domain: Domain, question: Question) -> Rollout:
    """A recorded attempt as a rollout, to be revised by another model."""
    return Rollout(
        question=question,
        prompt_ids=tuple(domain.tokenizer.encode_prompt(question.prompt)),
        response_ids=tuple(record["ids"]),
        logprobs=(),
        finish_reason=record["finish"],
        verdict=Verdict(record["outcome"], record["reward"]),
        sample_index=record["sample_index"],
    )


def evaluation_metrics(records: Sequence[Mapping[str, Any]], k: int) -> dict[str, Any]:
    """All figures of an evaluation, from its records; attempts without a verdict are left out and counted.

    pass@k is over the questions with at least k verdicts: of fewer attempts it would be pass@(fewer). Intervals
    are 95% bootstrap intervals over questions; tokens_* is the distribution of the attempts' lengths.
    """
    graded = [record for record in records if record["reward"] is not None]
    questions: dict[str, list[float]] = {}
    for record in graded:
        questions.setdefault(record["question_id"], []).append(record["reward"])
    averages = np.array([np.mean(rewards) for rewards in questions.values()])
    solved = [statistics.pass_at_k(len(r), int(sum(r)), k) for r in questions.values() if len(r) >= k]
    lengths = [record["tokens"] for record in records]
    own_right, own_wrong = _split(graded, "reward", "revised_reward")
    metrics: dict[str, Any] = {
        **_with_interval(f"avg@{k}", averages),
        **_with_interval(f"pass@{k}", solved),
        f"pass@{k}_left_out": len({record["question_id"] for record in records}) - len(solved),
        **_with_interval(f"maj@{k}", _majority(graded)),
        "greedy": _mean([r["greedy_reward"] for r in records if r.get("greedy_reward") is not None]),
        "mean_tokens": _mean(lengths),
        **{f"tokens_p{share}": float(np.percentile(lengths, share)) if lengths else None for share in (10, 50, 90)},
        "tokens_max": max(lengths, default=None),
        "revision_words": _mean([revision_words(r["response"]) for r in records]),
        "truncated": _mean([r["finish"] == "length" for r in records]),
        "revised_accuracy": _mean(own_right + own_wrong),
        "revised_tokens": _mean([r["revised_tokens"] for r in records if "revised_tokens" in r]),
        "correction_rate": _mean(own_wrong),
        "keep_rate": _mean(own_right),
        "no_verdict": len(records) - len(graded),
    }
    base_right, base_wrong = _split(records, "base_reward", "base_revised_reward")
    if not base_right and not base_wrong:  # the base model itself
        base_right, base_wrong = own_right, own_wrong
    return metrics | {"fix": _mean(base_wrong), "keep": _mean(base_right)}


def _with_interval(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The mean of one value per question and its interval; None without any question."""
    interval = list(statistics.bootstrap_interval(values, seed=0)) if len(values) else None
    return {name: _mean(values), f"{name}_interval": interval}


def _majority(graded: Sequence[Mapping[str, Any]]) -> list[float]:
    """Per question whether its most frequent answer is right; empty where no response states any, as programs."""
    if not any(record.get("answer") is not None for record in graded):
        return []
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in graded:
        rows.setdefault(record["question_id"], []).append(record)
    return [
        statistics.majority_at_k([[r["answer"] for r in own]], [[r["reward"] for r in own]]) for own in rows.values()
    ]


def _split(records, first: str, second: str) -> tuple[list[float], list[float]]:
    """Rewards of revisions of (right, wrong) first attempts."""
    pairs = [(r.get(first), r.get(second)) for r in records]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    return [b for a, b in pairs if a == 1.0], [b for a, b in pairs if a == 0.0]


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None
