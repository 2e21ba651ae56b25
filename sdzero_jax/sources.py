"""Where a training loop's batches come from: fixed sequences, an embedded corpus, on-policy rollouts.

A source draws a batch with the current parameters (or without them), reports figures of its own, and
restores its exact position. Which loss reads the batches is in `methods`.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import grain
import numpy as np

from sdzero_jax.batches import (
    NOTHING,
    Batch,
    DistillLayout,
    ScoredSequence,
    TeacherContext,
    distill_batch,
    response_sequence,
    sequence_batch,
)
from sdzero_jax.data import shuffled_batches
from sdzero_jax.examples import Rollout
from sdzero_jax.rollouts import Domain, RolloutIterator, rollouts_from_json, rollouts_to_json

Baseline = Literal["batch", "group", "none", ""]


class SequenceSource:
    """Shuffled batches of scored sequences, padded to one length. Ignores the parameters."""

    def __init__(self, sequences: Sequence[ScoredSequence], batch_size: int, length: int, seed: int):
        self._batches: grain.DatasetIterator = shuffled_batches(sequences, batch_size, seed)
        self._length = length

    def next(self, params: Any):
        batch = sequence_batch(next(self._batches), self._length)
        return {"sequences": batch}, {"student_tokens": float(np.sum(batch["segment_ids"] > 0))}

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
        return {"sequences": batch}, {}

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]


# ------------------------------------------------------------------------------------------- on-policy


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages."""

    baseline: Annotated[
        Baseline,
        "group: the question's own samples, normalised by their deviation (GRPO); batch: a moving mean of the "
        "reward, normalised by its deviation (REINFORCE); none: the reward itself; empty: the method's own",
    ] = ""
    decay: Annotated[float, "decay of the moving mean, from one batch to the next"] = 0.9
    drop_uniform: Annotated[
        bool, "leave out questions whose samples all have one reward; no others take their place"
    ] = False


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Hindsight replay: revisions made of what was sampled anyway."""

    pairs: Annotated[int, "sequences per step, half of them wrong -> right, half right -> right"] = 16
    capacity: Annotated[int, "questions whose latest wrong and right responses are remembered"] = 1024
    max_length: Annotated[int, "longest sequence in tokens; longer ones are not remembered; 0: the teacher's"] = 0


class OnPolicySource:
    """Rollouts of the current parameters as the named batches of a method.

    Batches: "rollouts" (student and teacher rows, rewards, advantages) and, with `replay`, "replay" (scored
    sequences x | y_init | d P_r d -> y made of wrong and right responses to one question). A batch of rollouts
    is handed out `updates` times. With a `budget` the source ends (StopIteration) when the number of sampled
    tokens is as near to it as whole batches allow. State holds everything: position, counts, baseline, memory,
    rollouts not yet used up.
    """

    def __init__(
        self,
        rollouts: RolloutIterator,
        domain: Domain,
        layout: DistillLayout,
        *,
        context: TeacherContext | None = None,
        opposite: bool = False,
        teacher: bool = True,
        reference: bool = False,
        advantage: AdvantageConfig = AdvantageConfig(),
        replay: ReplayConfig | None = None,
        remembered: Sequence[Rollout] = (),
        updates: int = 1,
        budget: int = 0,
        seed: int = 0,
    ):
        self._rollouts, self._domain, self._layout = rollouts, domain, layout
        self._context, self._opposite, self._teacher, self._advantage = context, opposite, teacher, advantage
        self._reference = reference  # a teacher reads the student's rows too, for a policy gradient's KL
        self._memory = Hindsight(replay, domain, seed) if replay else None
        self._updates, self._budget = updates, budget
        self._mean: float | None = None  # moving mean of the reward
        self._sampled = self._draws = self._used = 0
        self._current: list[Rollout] | None = None  # what is handed out again
        if self._memory:
            self._memory.remember(remembered)

    def next(self, params: Any) -> tuple[dict[str, Batch], dict[str, float]]:
        """The next batches; StopIteration when the budget is spent."""
        figures: dict[str, float] = {}
        if self._current is None or self._used == self._updates:
            if self._budget and self._spent():
                raise StopIteration
            self._current, self._used = self._rollouts.next(params), 0
            figures = self._take(self._current)
        self._used += 1
        batches, counts = self._batches(self._current)
        tokens = {
            "student_tokens": batches["rollouts"]["gen_segment_ids"].sum(),
            "teacher_tokens": sum(batches["rollouts"].get(f"{s}_segment_ids", np.zeros(1)).sum() for s in _TEACHERS),
        }
        if self._reference:
            tokens["teacher_tokens"] += tokens["student_tokens"]
        if "replay" in batches:
            tokens["student_tokens"] += batches["replay"]["segment_ids"].sum()
        return batches, figures | {name: float(value) for name, value in (counts | tokens).items()}

    def _spent(self) -> bool:
        """Whether one more batch would end further from the budget than none."""
        return self._draws > 0 and self._sampled + self._sampled / (2 * self._draws) >= self._budget

    def _take(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Learns from fresh rollouts what later batches need; their figures."""
        rewards = [r.verdict.reward for r in rollouts if r.verdict.reward is not None]
        lengths = [len(r.response_ids) for r in rollouts]
        self._sampled += sum(lengths)
        self._draws += 1
        figures = {"reward": float(np.mean(rewards))} if rewards else {}
        if rewards:  # a batch without any verdict says nothing
            before = figures["reward"] if self._mean is None else self._mean
            self._mean = self._advantage.decay * before + (1.0 - self._advantage.decay) * figures["reward"]
        if self._memory:
            self._memory.remember(rollouts)
        return figures | {
            "mean_tokens": float(np.mean(lengths)),
            "truncated": float(np.mean([r.finish_reason == "length" for r in rollouts])),
            "sampled_tokens": float(np.sum(lengths)),
            "generations": float(len(rollouts)),
            "questions": float(len({r.question.id for r in rollouts})),
        }

    def _batches(self, rollouts: Sequence[Rollout]) -> tuple[dict[str, Batch], dict[str, int]]:
        batch, counts = distill_batch(
            rollouts, self._domain.phrase_ids, self._domain.tokenizer.stop_ids, self._layout,
            context=self._context, opposite=self._opposite, teacher=self._teacher,
        )  # fmt: skip
        batch["advantage"] = advantages(rollouts, self._advantage, self._mean)
        if self._advantage.drop_uniform:
            batch["policy_mask"] = batch["mask"] * _mixed_groups(rollouts)[:, None]
        batches = {"rollouts": batch}
        if self._memory:
            batches["replay"] = self._memory.batch((self._draws - 1) * self._updates + self._used)
            counts["replayed"] = int(np.sum(batches["replay"]["weights"].any(axis=1)))
        return batches, counts

    def get_state(self) -> dict[str, Any]:
        pending = self._current if self._used < self._updates else None
        return {
            "rollouts": self._rollouts.get_state(),
            "mean": self._mean,
            "sampled": self._sampled,
            "draws": self._draws,
            "used": self._used,
            "current": None if pending is None else rollouts_to_json(pending),
            "memory": self._memory.get_state() if self._memory else None,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._rollouts.set_state(state["rollouts"])
        self._mean, self._sampled = state["mean"], state["sampled"]
        self._draws, self._used = state["draws"], state["used"]
        self._current = None if state["current"] is None else rollouts_from_json(state["current"])
        if self._memory:
            self._memory.set_state(state["memory"])


_TEACHERS = ("rev", "opposite")


def advantages(rollouts: Sequence[Rollout], config: AdvantageConfig, mean: float | None) -> np.ndarray:
    """The advantage of each rollout, [B] float32; 0 without a verdict.

    group (GRPO, arXiv:2402.03300): (r - mean) / (std + 1e-6) over the samples of its question.
    batch: (r - b) / sqrt(max(b (1 - b), 0.05)), with b = `mean`, a moving mean of the reward.
    """
    values = np.array([np.nan if r.verdict.reward is None else r.verdict.reward for r in rollouts], np.float64)
    if config.baseline == "batch":
        baseline = 0.0 if mean is None else mean
        values = (values - baseline) / np.sqrt(max(baseline * (1.0 - baseline), 0.05))
    elif config.baseline == "group":
        for members in _groups(rollouts):
            own = values[members]
            judged = own[~np.isnan(own)]
            if judged.size:
                values[members] = (own - judged.mean()) / (judged.std() + 1e-6)
    return np.nan_to_num(values, nan=0.0).astype(np.float32)


def _groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Rows of each question's samples."""
    groups = collections.defaultdict(list)
    for row, rollout in enumerate(rollouts):
        groups[rollout.question.id].append(row)
    return list(groups.values())


def _mixed_groups(rollouts: Sequence[Rollout]) -> np.ndarray:
    """1 for rows of questions with both right and wrong samples, [B] float32."""
    mixed = np.zeros(len(rollouts), np.float32)
    for members in _groups(rollouts):
        mixed[members] = len({rollouts[row].verdict.reward for row in members} & {0.0, 1.0}) == 2
    return mixed


class Hindsight:
    """The latest wrong and right response to each question, and revision sequences made of them.

    Sampled anyway, so they cost no budget: (x, y-, P_0) -> y+ for questions with both, and (x, y+, P_1) -> y+,
    which is what revising should do and what a teacher that is synchronised must not forget.
    """

    def __init__(self, config: ReplayConfig, domain: Domain, seed: int):
        self._config, self._domain, self._seed = config, domain, seed
        # question -> {"prompt": ids, "right": ids or None, "wrong": ids or None}, least recently seen first
        self._seen: dict[str, dict[str, Any]] = {}

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        """Notes finished responses with a verdict; the oldest questions beyond the capacity are forgotten."""
        for rollout in rollouts:
            reward, end = rollout.verdict.reward, rollout.finish_reason == "stop"
            if reward is None or not end or self._length(rollout) > self._config.max_length:
                continue
            key = rollout.question.id
            entry = self._seen.pop(key, {"right": None, "wrong": None})
            entry["prompt"] = list(rollout.prompt_ids)
            entry["right" if reward == 1.0 else "wrong"] = list(rollout.response_ids)
            self._seen[key] = entry
        while len(self._seen) > self._config.capacity:
            del self._seen[next(iter(self._seen))]

    def _length(self, rollout: Rollout) -> int:
        return len(rollout.prompt_ids) + 2 * len(rollout.response_ids) + self._domain.longest_phrase

    def batch(self, step: int) -> Batch:
        """`pairs` sequences drawn by the seed and the step; rows that cannot be filled weigh 0."""
        draw = np.random.default_rng((self._seed, step))
        wrong = [entry for entry in self._seen.values() if entry["right"] and entry["wrong"]]
        right = [entry for entry in self._seen.values() if entry["right"]]
        half = self._config.pairs // 2
        rows = [self._sequence(e, "wrong", 0.0) for e in _choose(draw, wrong, half)]
        rows += [self._sequence(e, "right", 1.0) for e in _choose(draw, right, self._config.pairs - half)]
        rows = [row for row in rows if len(row.tokens) <= self._config.max_length]
        return sequence_batch(rows + [NOTHING] * (self._config.pairs - len(rows)), self._config.max_length)

    def _sequence(self, entry: Mapping[str, Any], first: str, reward: float) -> ScoredSequence:
        stops = self._domain.tokenizer.stop_ids
        attempt = entry[first][:-1] if entry[first][-1] in stops else entry[first]
        return response_sequence((*entry["prompt"], *attempt, *self._domain.phrase_ids(reward)), entry["right"])

    def get_state(self) -> list[Any]:
        return [[key, entry["prompt"], entry["right"], entry["wrong"]] for key, entry in self._seen.items()]

    def set_state(self, state: Sequence[Any]) -> None:
        self._seen = {key: {"prompt": p, "right": right, "wrong": wrong} for key, p, right, wrong in state}


def _choose(draw: np.random.Generator, items: Sequence[Any], count: int) -> list[Any]:
    return [items[i] for i in draw.integers(0, len(items), count)] if items else []


def demonstration_context(text_of: Callable[[Any], str | None], domain: Domain) -> TeacherContext:
    """What SDFT's teacher reads (self-distillation fine-tuning): x | demonstration | d P_1 d, for any sample.

    None for a question without one: a teacher that reads x alone would teach the student to stay what it is.
    """

    def context(rollout: Rollout, reward: float) -> tuple[int, ...] | None:
        text = text_of(rollout.question)
        if not text:
            return None
        return (*rollout.prompt_ids, *domain.tokenizer.encode(text), *domain.phrase_ids(1.0))

    return context
