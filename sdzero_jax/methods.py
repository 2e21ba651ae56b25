"""Methods as data: which sequences are trained on, with which weights, in which order.

A stage is a `BatchSource` (records -> batches, resumable) and an objective. Base training,
SRT and its two-stage form share cross-entropy; SD-Zero and phase 2 alone share
self-distillation and differ in the reviser they start from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import grain
import numpy as np

from sdzero_jax.batches import (
    DistillLayout,
    ScoredSequence,
    SrtTargets,
    distill_batch,
    revision_sequence,
    sequence_batch,
)
from sdzero_jax.data import shuffled_batches
from sdzero_jax.errors import UserError
from sdzero_jax.examples import RevisionTrace, kept
from sdzero_jax.rollouts import Domain, RolloutIterator


@dataclasses.dataclass(frozen=True)
class SrtData:
    """Which traces self-revision training reads, and which terms of its loss."""

    mode: Annotated[
        Literal["joint", "two_stage"],
        "joint: L_revision + L_generation in one pass (paper); two_stage: generation loss on traces "
        "with a wrong y_init, then revision loss (authors' code)",
    ] = "joint"
    balance: Annotated[bool, "repeat the rarer of (wrong -> right, right -> right) to equal shares"] = True
    held_out: Annotated[float, "share of the traces kept for the held-out loss"] = 0.05
    max_length: Annotated[int, "longest trace in tokens; longer ones are dropped and counted"] = 256


@dataclasses.dataclass(frozen=True)
class SrtStage:
    """One run of cross-entropy on revision traces."""

    name: str
    targets: SrtTargets
    traces: Literal["all", "wrong"]


SRT_STAGES: dict[str, tuple[SrtStage, ...]] = {
    "joint": (SrtStage("joint", SrtTargets(1.0, 1.0), "all"),),
    "two_stage": (
        SrtStage("generation", SrtTargets(1.0, 0.0), "wrong"),
        SrtStage("revision", SrtTargets(0.0, 1.0), "all"),
    ),
}


def srt_sequences(
    traces: Sequence[RevisionTrace], stage: SrtStage, data: SrtData
) -> tuple[list[ScoredSequence], list[ScoredSequence], dict[str, int]]:
    """(training sequences, held-out sequences, counts) of one SRT stage.

    Held-out traces are a fixed share of the questions; balancing repeats training traces only.
    Raises UserError when nothing is left to train on.
    """
    usable = [t for t in kept(traces) if stage.traces == "all" or t.init_verdict.reward == 0.0]
    fitting = [t for t in usable if trace_length(t) <= data.max_length]
    order = np.random.default_rng(0).permutation(len(fitting))
    held = set(order[: round(data.held_out * len(fitting))].tolist())
    training = [trace for i, trace in enumerate(fitting) if i not in held]
    if not training:
        raise UserError(
            f"no revision trace to train on ({len(traces)} collected, {len(usable)} usable, {len(fitting)} within "
            f"{data.max_length} tokens); collect more questions or raise srt.data.max_length"
        )
    counts = {"traces": len(training), "held_out": len(held), "overlong": len(usable) - len(fitting)}
    if data.balance:
        training = balanced(training)
    to_sequences = lambda items: [revision_sequence(trace, stage.targets) for trace in items]  # noqa: E731
    return to_sequences(training), to_sequences([fitting[i] for i in sorted(held)]), counts


def balanced(traces: Sequence[RevisionTrace]) -> list[RevisionTrace]:
    """Repeats the rarer of (y_init wrong, y_init right) until both are equally many."""
    wrong = [trace for trace in traces if trace.init_verdict.reward == 0.0]
    right = [trace for trace in traces if trace.init_verdict.reward == 1.0]
    if not wrong or not right:
        return list(traces)
    size = max(len(wrong), len(right))
    repeat = lambda items: [items[i % len(items)] for i in range(size)]  # noqa: E731
    return repeat(wrong) + repeat(right)


def trace_length(trace: RevisionTrace) -> int:
    """Tokens of x | y_init | d P_r d | y_rev."""
    return sum(map(len, (trace.prompt_ids, trace.init_ids, trace.phrase_ids, trace.revised_ids)))


class SequenceSource:
    """Shuffled batches of scored sequences, padded to one length. Ignores the parameters."""

    def __init__(self, sequences: Sequence[ScoredSequence], batch_size: int, length: int, seed: int):
        self._batches: grain.DatasetIterator = shuffled_batches(sequences, batch_size, seed)
        self._length = length

    def next(self, params: Any):
        return sequence_batch(next(self._batches), self._length), {}

    def get_state(self) -> dict[str, Any]:
        return {"sequences": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["sequences"])


class CorpusSource:
    """Batches of an embedded task's corpus: a pure function of the step."""

    def __init__(self, corpus_batch: Callable[[int], dict[str, np.ndarray]]):
        self._corpus_batch, self._step = corpus_batch, 0

    def next(self, params: Any):
        batch = self._corpus_batch(self._step)
        self._step += 1
        return batch, {}

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


class DistillSource:
    """On-policy rollouts as distillation batches, with reward, length and counts as figures."""

    def __init__(self, rollouts: RolloutIterator, domain: Domain, layout: DistillLayout):
        self._rollouts, self._domain, self._layout = rollouts, domain, layout

    def next(self, params: Any):
        rollouts = self._rollouts.next(params)
        batch, counts = distill_batch(rollouts, self._domain.phrase_ids, self._domain.tokenizer.stop_ids, self._layout)
        rewards = [r.verdict.reward for r in rollouts if r.verdict.reward is not None]
        lengths = [len(r.response_ids) for r in rollouts]
        figures = {
            "reward": float(np.mean(rewards)) if rewards else 0.0,
            "mean_tokens": float(np.mean(lengths)),
            "truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
            "sampled_tokens": float(np.sum(lengths)),
            **{name: float(value) for name, value in counts.items()},
        }
        return batch, figures

    def get_state(self) -> dict[str, Any]:
        return self._rollouts.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._rollouts.set_state(state)
