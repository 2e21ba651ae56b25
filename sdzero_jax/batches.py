"""Rollouts and traces -> padded numpy batches with index arrays.

Alignment is data: the model's output at position p predicts the token at p + 1, and the
host writes the positions whose outputs predict each response token. The device gathers
hidden states there and only then goes to the vocabulary. Sequences are joined from pieces
of ids and never re-tokenised (ALGORITHM: token layout).

A "scored sequence" batch, for cross-entropy:
  tokens, positions, segment_ids [B, L]; index, target_ids, weights [B, R]
A distillation batch, for self-distillation and policy gradients:
  gen_* and rev_* [B, L] as above; gen_index, rev_index, target_ids, mask, logprobs, sampling_logprobs [B, R];
  ends [B, R], 1 at an end token; reward [B]; with guidance also opposite_* and opposite_index, the teacher under the
  other phrase
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Literal

import numpy as np

from sdzero_jax.examples import RevisionTrace, Rollout

Batch = dict[str, np.ndarray]
Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class ScoredSequence:
    """One token sequence and the weight of each token as a target; the first token's must be 0."""

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


NOTHING = ScoredSequence((0,), (0.0,))  # fills a batch up to its number of rows


@dataclasses.dataclass(frozen=True)
class SrtTargets:
    """Weights of the two terms of L_SRT = L_revision + L_generation."""

    generation: Annotated[float, "weight of -log pi([y_init, P_r, y_rev] | x)"] = 1.0
    revision: Annotated[float, "weight of -log pi(y_rev | x, y_init, P_r)"] = 1.0


def revision_sequence(trace: RevisionTrace, targets: SrtTargets) -> ScoredSequence:
    """x | y_init | d P_r d | y_rev EOS in one pass (SD-Zero, L_SRT).

    Both terms read the same tokens, so their sum is one forward pass with weight `generation`
    on y_init and P_r and `generation + revision` on y_rev and its end token.
    """
    head = len(trace.init_ids) + len(trace.phrase_ids)
    tokens = (*trace.prompt_ids, *trace.init_ids, *trace.phrase_ids, *trace.revised_ids)
    weights = (
        (0.0,) * len(trace.prompt_ids)
        + (targets.generation,) * head
        + (targets.generation + targets.revision,) * len(trace.revised_ids)
    )
    return ScoredSequence(tokens, weights)


def response_sequence(prompt_ids: Ids, response_ids: Ids) -> ScoredSequence:
    """x | y EOS with weight 1 on every token of y: SFT, RFT, and revisions, whose x is x | y_init | d P_r d."""
    return ScoredSequence((*prompt_ids, *response_ids), (0.0,) * len(prompt_ids) + (1.0,) * len(response_ids))


def sequence_batch(sequences: Sequence[ScoredSequence], length: int) -> Batch:
    """Pads scored sequences to [B, length]; every position but the last may predict a target.

    A sequence longer than `length` is a caller's mistake: over-long samples are dropped and
    counted where they are made, never cut here.
    """
    rows, targets = len(sequences), length - 1
    batch = {
        **_tokens_batch("", [s.tokens for s in sequences], length),
        "index": np.broadcast_to(np.arange(targets, dtype=np.int32), (rows, targets)).copy(),
        "target_ids": np.zeros((rows, targets), np.int32),
        "weights": np.zeros((rows, targets), np.float32),
    }
    for row, sequence in enumerate(sequences):
        if sequence.weights[0] != 0:
            raise ValueError("the first token of a sequence has nothing before it and cannot be a target")
        count = len(sequence.tokens) - 1
        batch["target_ids"][row, :count] = sequence.tokens[1:]
        batch["weights"][row, :count] = sequence.weights[1:]
    return batch


SampleMask = Literal["all", "wrong", "correct", "finished"]


@dataclasses.dataclass(frozen=True)
class DistillLayout:
    """How a rollout becomes a student and a teacher sequence."""

    max_prompt: Annotated[int, "tokens of the longest prompt"] = 16
    max_response: Annotated[int, "tokens of the longest response"] = 64
    sample_mask: Annotated[SampleMask, "which rollouts are trained on"] = "all"
    keep_first_eos: Annotated[bool, "keep the end token of y's first copy (authors' code)"] = False
    max_teacher_tokens: Annotated[int, "longest teacher sequence; longer samples are dropped"] = 32768

    def rev_length(self, phrase_length: int) -> int:
        """Static length of the teacher's rows."""
        return min(self.max_prompt + 2 * self.max_response + phrase_length, self.max_teacher_tokens)


# (rollout, reward that chooses the phrase) -> what the teacher reads before y; None where it has nothing to read
TeacherContext = Callable[[Rollout, float], Ids | None]


def reviser_context(rollout: Rollout, phrase_ids: Ids, stop_ids: Ids, keep_first_eos: bool) -> tuple[int, ...]:
    """x | y | d P_r d: what the teacher reads before the second copy of y.

    The first copy loses its end token (the reviser never saw one before P_r in SRT) unless
    `keep_first_eos`.
    """
    return (*rollout.prompt_ids, *strip_end(rollout, stop_ids, keep_first_eos), *phrase_ids)


def strip_end(rollout: Rollout, stop_ids: Ids, keep: bool = False) -> tuple[int, ...]:
    """The response without its end token, if it has one and `keep` is not set."""
    ended = rollout.finish_reason == "stop" and rollout.response_ids[-1] in stop_ids
    return rollout.response_ids[:-1] if ended and not keep else rollout.response_ids


def is_trained(rollout: Rollout, sample_mask: SampleMask) -> bool:
    """False for a rollout without a verdict (the grader failed) or outside the sample mask."""
    if rollout.verdict.reward is None:
        return False
    return {
        "all": True,
        "wrong": rollout.verdict.reward == 0.0,
        "correct": rollout.verdict.reward == 1.0,
        "finished": rollout.finish_reason == "stop",
    }[sample_mask]


def distill_batch(
    rollouts: Sequence[Rollout],
    phrase_ids: Callable[[float], Ids],
    stop_ids: Ids,
    layout: DistillLayout,
    *,
    context: TeacherContext | None = None,
    opposite: bool = False,
    teacher: bool = True,
) -> tuple[Batch, dict[str, int]]:
    """Student rows x | y and teacher rows x | y | d P_r d | y, aligned token by token.

    Args:
      rollouts: B of them; those that cannot or may not be trained on keep a row of zero mask,
        so that the batch has one shape.
      phrase_ids: reward -> ids of d P_r d.
      stop_ids: the end tokens.
      context: what the teacher reads before y; default x | y | d P_r d.
      opposite: adds the teacher's rows under the phrase of the other reward, for guidance.
      teacher: False leaves the teacher's rows out, for policy gradients.

    Returns:
      The batch, and counts {"overlong", "no_verdict", "no_context", "masked"} of rows left out.
    """
    if context is None:

        def context(rollout: Rollout, reward: float) -> Ids:
            return reviser_context(rollout, phrase_ids(reward), stop_ids, layout.keep_first_eos)

    longest_phrase = max(len(phrase_ids(0.0)), len(phrase_ids(1.0)))
    rev_limit = layout.rev_length(longest_phrase)
    gen_limit, width = layout.max_prompt + layout.max_response, layout.max_response
    limits = {"gen": gen_limit} | {side: rev_limit for side in ["rev"] * teacher + ["opposite"] * opposite}
    counts = {"overlong": 0, "no_verdict": 0, "no_context": 0, "masked": 0}
    rows: dict[str, list[Ids]] = {side: [] for side in limits}
    indices = [f"{side}_index" for side in limits]
    batch = {name: np.zeros((len(rollouts), width), np.int32) for name in (*indices, "target_ids")}
    floats = ("mask", "ends", "logprobs", "sampling_logprobs")
    batch |= {name: np.zeros((len(rollouts), width), np.float32) for name in floats}
    batch["reward"] = np.zeros(len(rollouts), np.float32)
    for row, rollout in enumerate(rollouts):
        reward = rollout.verdict.reward or 0.0
        response, prompt = rollout.response_ids, rollout.prompt_ids
        before = {"gen": prompt, "rev": context(rollout, reward), "opposite": ()}
        if opposite:
            before["opposite"] = context(rollout, 1.0 - reward)
        blind = any(before[side] is None for side in limits)
        counts["no_context"] += blind
        overlong = len(response) > width or any(len(before[s] or ()) + len(response) > limits[s] for s in limits)
        counts["overlong"] += overlong
        counts["no_verdict"] += rollout.verdict.reward is None
        trained = is_trained(rollout, layout.sample_mask)
        counts["masked"] += not trained and rollout.verdict.reward is not None
        if blind or overlong or not trained:
            for side in limits:
                rows[side].append(prompt[:1])
            continue
        count = len(response)
        for side in limits:
            rows[side].append((*before[side], *response))
            batch[f"{side}_index"][row, :count] = np.arange(len(before[side]) - 1, len(before[side]) - 1 + count)
        batch["target_ids"][row, :count] = response
        batch["mask"][row, :count] = 1.0
        batch["ends"][row, count - 1] = rollout.finish_reason == "stop" and response[-1] in stop_ids
        batch["logprobs"][row, :count] = rollout.logprobs
        batch["sampling_logprobs"][row, :count] = rollout.sampling_logprobs
        batch["reward"][row] = reward
    for side, limit in limits.items():
        batch |= _tokens_batch(f"{side}_", rows[side], limit)
    _check_aligned(batch, limits)
    return batch, counts


def _check_aligned(batch: Batch, sides: Iterable[str]) -> None:
    """Student and teacher must be asked for the same token everywhere, the end token included."""
    valid = batch["mask"] > 0
    for side in sides:
        following = np.take_along_axis(
            batch[f"{side}_tokens"], np.minimum(batch[f"{side}_index"] + 1, batch[f"{side}_tokens"].shape[1] - 1), 1
        )
        if not np.array_equal(following[valid], batch["target_ids"][valid]):
            raise AssertionError(f"{side}_index does not point at the tokens before the response")


def _tokens_batch(prefix: str, rows: Sequence[Ids], length: int) -> Batch:
    """tokens, positions, segment_ids [B, length]: rows right-padded, segment 0 on padding."""
    tokens = np.zeros((len(rows), length), np.int32)
    segments = np.zeros((len(rows), length), np.int32)
    for row, ids in enumerate(rows):
        if len(ids) > length:
            raise ValueError(f"a row of {len(ids)} tokens does not fit in {length}")
        tokens[row, : len(ids)] = ids
        segments[row, : len(ids)] = 1
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape).copy()
    return {f"{prefix}tokens": tokens, f"{prefix}positions": positions, f"{prefix}segment_ids": segments}
