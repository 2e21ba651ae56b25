"""Methods as data: each is a list of terms (weight, batch, objective) over what a source hands out.

SRT and its other forms, SFT and RFT are cross-entropy on sequences; SD-Zero, phase 2 alone and SDFT are
self-distillation and differ in what the teacher reads; GRPO and REINFORCE are policy gradients and differ
in the baseline. Where batches come from is in `sources`, what an objective computes in `objectives`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from sdzero_jax import objectives
from sdzero_jax.batches import ScoredSequence, SrtTargets, response_sequence, revision_sequence
from sdzero_jax.errors import UserError, nearest
from sdzero_jax.examples import RevisionTrace, Rollout, kept
from sdzero_jax.objectives import CrossEntropy, PolicyGradient, SelfDistillation, Term
from sdzero_jax.sources import Baseline


class NothingLeft(UserError):
    """An earlier stage left this one nothing to work with: no sequence to train on, no token of a budget.

    Only the data show it, so a comparison goes on with its other entries.
    """


@dataclasses.dataclass(frozen=True)
class SrtData:
    """Which traces self-revision training reads, and which terms of its loss."""

    mode: Annotated[
        Literal["joint", "two_stage", "compact", "generation", "revision"],
        "joint: L_revision + L_generation in one pass (paper); two_stage: generation loss on traces "
        "with a wrong y_init, then revision loss (authors' code); compact: revision loss, and every right "
        "response as an answer of its own; generation, revision: one of the two terms (ablations)",
    ] = "joint"
    balance: Annotated[bool, "repeat the rarer of (wrong -> right, right -> right) to equal shares"] = True
    only_right: Annotated[bool, "train on right revisions only; false keeps all (an ablation)"] = True
    held_out: Annotated[float, "share of the traces kept for the held-out loss"] = 0.05
    max_length: Annotated[int, "longest trace in tokens; longer ones are dropped and counted"] = 256


@dataclasses.dataclass(frozen=True)
class SrtStage:
    """One run of cross-entropy on revision traces."""

    name: str
    targets: SrtTargets
    traces: Literal["all", "wrong"]
    answers: bool = False  # also x -> y for every distinct right response of the traces


SRT_STAGES: dict[str, tuple[SrtStage, ...]] = {
    "joint": (SrtStage("joint", SrtTargets(1.0, 1.0), "all"),),
    "compact": (SrtStage("compact", SrtTargets(0.0, 1.0), "all", answers=True),),
    "generation": (SrtStage("generation", SrtTargets(1.0, 0.0), "all"),),
    "revision": (SrtStage("revision", SrtTargets(0.0, 1.0), "all"),),
    "two_stage": (
        SrtStage("generation", SrtTargets(1.0, 0.0), "wrong"),
        SrtStage("revision", SrtTargets(0.0, 1.0), "all"),
    ),
}


def srt_sequences(
    traces: Sequence[RevisionTrace], stage: SrtStage, data: SrtData, end_id: int
) -> tuple[list[ScoredSequence], list[ScoredSequence], dict[str, int]]:
    """(training sequences, held-out sequences, counts) of one SRT stage.

    Held-out traces are a fixed share; balancing repeats training traces only. `end_id` ends first attempts,
    which are recorded without their end token, where a stage trains on them as answers.
    Raises NothingLeft when there is nothing to train on.
    """
    usable = [t for t in kept(traces, data.only_right) if stage.traces == "all" or t.init_verdict.reward == 0.0]
    fitting = [t for t in usable if trace_length(t) <= data.max_length]
    order = np.random.default_rng(0).permutation(len(fitting))
    held = set(order[: round(data.held_out * len(fitting))].tolist())
    training = [trace for i, trace in enumerate(fitting) if i not in held]
    if not training:
        mend = "no revision was right: raise collect.questions or revisions"
        if not traces:
            mend = "no first attempt that collect.revise takes had a verdict"
        if usable:
            mend = "raise srt.data.max_length"
        raise NothingLeft(
            f"no revision trace to train on ({len(traces)} collected, {len(usable)} usable, {len(fitting)} within "
            f"{data.max_length} tokens); {mend}"
        )
    counts = {"traces": len(training), "held_out": len(held), "overlong": len(usable) - len(fitting)}
    if data.balance:
        training = balanced(training)
    to_sequences = lambda items: [revision_sequence(trace, stage.targets) for trace in items]  # noqa: E731
    sequences = to_sequences(training)
    if stage.answers:
        answers = right_answers([trace for i, trace in enumerate(fitting) if i not in held], end_id)
        counts["answers"] = len(answers)
        sequences += answers
    return sequences, to_sequences([fitting[i] for i in sorted(held)]), counts


def right_answers(traces: Sequence[RevisionTrace], end_id: int) -> list[ScoredSequence]:
    """x | y EOS of every distinct right, finished response in the traces, first attempts and revisions.

    One that was cut off never chose to end, and must not be taught to.
    """
    pairs: dict[tuple, None] = {}
    for trace in traces:
        if trace.init_verdict.reward == 1.0 and trace.init_finish == "stop":
            pairs[trace.prompt_ids, (*trace.init_ids, end_id)] = None
        if trace.revised_verdict.reward == 1.0 and trace.revised_finish == "stop":
            pairs[trace.prompt_ids, trace.revised_ids] = None
    return [response_sequence(prompt, response) for prompt, response in pairs]


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


def right_sequences(rollouts: Sequence[Rollout], max_length: int) -> tuple[list[ScoredSequence], int]:
    """x | y EOS of every distinct right, finished response (rejection sampling fine-tuning, RFT).

    Returns: those of at most `max_length` tokens, and the number of longer ones.
    """
    pairs = {
        (rollout.prompt_ids, rollout.response_ids): None
        for rollout in rollouts
        if rollout.verdict.reward == 1.0 and rollout.finish_reason == "stop"
    }
    sequences = [response_sequence(prompt, response) for prompt, response in pairs]
    fitting = [sequence for sequence in sequences if len(sequence.tokens) <= max_length]
    return fitting, len(sequences) - len(fitting)


# -------------------------------------------------------------------------------- methods of one loop

Context = Literal["revision", "demonstration", "answer"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method by its terms: (weight, batch, objective), and what its source has to hand out.

    sequences: what cross-entropy reads when nothing is sampled on-policy; context: what the teacher reads
    before y; baseline: of the policy gradient.
    """

    text: str
    terms: tuple[tuple[float, str, str], ...]
    sequences: Literal["", "demonstrations", "right_samples"] = ""
    context: Context = "revision"
    baseline: Baseline = "group"

    @property
    def on_policy(self) -> bool:
        return not self.sequences

    def uses(self, name: str) -> bool:
        """Whether a term reads this batch or has this objective."""
        return any(name in (batch, objective) for _, batch, objective in self.terms)


_SELF = (1.0, "rollouts", "self_distillation")
_POLICY = (1.0, "rollouts", "policy_gradient")
_SEQUENCES = (1.0, "sequences", "cross_entropy")
_REPLAY = (0.3, "replay", "cross_entropy")

METHODS: dict[str, Method] = {
    "sft": Method("supervised fine-tuning on demonstrations", (_SEQUENCES,), sequences="demonstrations"),
    "rft": Method("rejection sampling fine-tuning: right samples", (_SEQUENCES,), sequences="right_samples"),
    "sdzero": Method("the reviser's distributions on the student's samples (SD-Zero, phase 2)", (_SELF,)),
    "sdft": Method("the same with a demonstration as the teacher's context", (_SELF,), context="demonstration"),
    "sdft_answer": Method("the same with the final answer as the teacher's context", (_SELF,), context="answer"),
    "grpo": Method("clipped policy gradient, the group of a question's samples as baseline", (_POLICY,)),
    "reinforce": Method("policy gradient, a moving mean reward as baseline", (_POLICY,), baseline="batch"),
    "sdzero_replay": Method("SD-Zero with hindsight replay of revisions", (_SELF, _REPLAY)),
    "sdzero_hybrid": Method(
        "SD-Zero, hindsight replay and a policy gradient",
        ((0.3, *_SELF[1:]), _REPLAY, _POLICY),
        baseline="batch",
    ),
}


def find_method(name: str, weights: Sequence[float] = ()) -> Method:
    """The method of this name, its terms' weights replaced by `weights` where they are given."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{nearest(name, METHODS)}")
    method = METHODS[name]
    if not weights:
        return method
    if len(weights) != len(method.terms):
        raise UserError(f"method {name} has {len(method.terms)} terms, but {len(weights)} weights are given")
    terms = tuple((float(weight), *term[1:]) for weight, term in zip(weights, method.terms))
    return dataclasses.replace(method, terms=terms)


def loss_terms(
    method: Method,
    distillation: SelfDistillation,
    policy: PolicyGradient,
    cross_entropy: CrossEntropy,
    temperature: float = 1.0,
) -> tuple[Term, ...]:
    """The method's terms with the settings of their objectives, for `objectives.combined`.

    temperature: that of sampling, at which a policy gradient is taken.
    """
    at_temperature = functools.partial(objectives.policy_gradient, temperature=temperature)
    known = {
        "self_distillation": (objectives.self_distillation, distillation),
        "policy_gradient": (at_temperature, policy),
        "cross_entropy": (objectives.cross_entropy, cross_entropy),
    }
    return tuple(Term(weight, batch, *known[objective]) for weight, batch, objective in method.terms)
