"""How a run trains a model: cross-entropy on sequences, and any method on the student's own samples.

Puts a run's parts together with a config's settings and hands them to the loop (`train`). Which stage
trains what, from which model, is in `pipeline`.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sdzero_jax import hosts, ledger, masked, objectives, sharding
from sdzero_jax.batches import NOTHING, ScoredSequence, TeacherContext, response_sequence, sequence_batch
from sdzero_jax.checkpoint import Checkpointer, save_params
from sdzero_jax.chunks import ChunkLog
from sdzero_jax.collect import sample
from sdzero_jax.config import DistillConfig, OptimizerConfig, SrtConfig, TrainConfig
from sdzero_jax.data import shuffled_batches
from sdzero_jax.errors import HealthStop, UserError
from sdzero_jax.examples import Question, RevisionTrace, Rollout
from sdzero_jax.health import judge_keep_rate, length_collapse
from sdzero_jax.methods import Method, NothingLeft, find_method, loss_terms, right_sequences
from sdzero_jax.metrics import FILE_NAME as METRICS
from sdzero_jax.metrics import read_metrics
from sdzero_jax.models import lora
from sdzero_jax.models.lora import LoraConfig
from sdzero_jax.optimizer import learning_rate_schedule, make_optimizer
from sdzero_jax.progress import say
from sdzero_jax.rollouts import RolloutIterator, sample_and_revise, sample_responses
from sdzero_jax.runs import Run
from sdzero_jax.sources import OnPolicySource, SequenceSource, demonstration_context
from sdzero_jax.teacher import sync_due
from sdzero_jax.train import Hooks, fit
from sdzero_jax.train_step import (
    NO_LORA,
    TrainStep,
    in_parts,
    init_state,
    make_train_step,
    synchronise,
    trained_shardings,
)

# ---------------------------------------------------------------------------------- fixed sequences


def train_cross_entropy(
    run: Run, name, folder, params, source, steps: int, config, hooks: Hooks = Hooks(), *,
    adapters: LoraConfig = NO_LORA, microbatches: int = 1,
):  # fmt: skip
    """The trained parameters, by the loop with the cross-entropy objective; `params` are used up.

    `config` owns objective, optimizer and checkpoint.
    """
    terms = (objectives.Term(1.0, "sequences", objectives.cross_entropy, config.objective),)
    optimizer, schedule = _optimizer(config.optimizer, steps)
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint)
    trained, frozen = _trained(run, params, adapters)
    step_fn = make_train_step(
        functools.partial(objectives.combined, terms, run.model), run.model, optimizer, run.mesh, schedule=schedule,
        differentiate=in_parts(microbatches, terms), adapters=adapters, frozen=frozen,
    )  # fmt: skip
    start = functools.partial(init_state, run.model, trained, optimizer, run.mesh, adapters=adapters)
    try:
        state = fit(
            name, folder, start, step_fn, source, steps, checkpointer, config.checkpoint.every, run.provenance,
            hooks, given=trained,
        )  # fmt: skip
    finally:
        checkpointer.close()
    return step_fn.parameters(state.params)


def _trained(run: Run, params, adapters: LoraConfig) -> tuple[Any, Any]:
    """(what is trained, the parameters that stay as they are): all and None, or fresh adapters and all."""
    if not adapters.rank:
        return params, None
    places = trained_shardings(run.model, run.mesh, adapters)
    shapes = run.model.param_shapes()
    fresh = jax.jit(lambda key: lora.init(key, shapes, adapters), out_shardings=places)
    return fresh(jax.random.key(run.config.seed)), params


def rows_at_once(run: Run, rows: int, microbatches: int) -> int:
    """As many rows as a train step's forward pass holds, divisible over the devices."""
    devices = sharding.batch_devices(run.mesh)
    return max(rows // microbatches // devices, 1) * devices


def held_out_hooks(run: Run, sequences, config) -> Hooks:
    """Reports the loss on held-out traces at every save; nothing when there are none."""
    if not sequences:
        return Hooks()
    rows = rows_at_once(run, config.batch_size, config.microbatches)
    batches = [
        sequence_batch([*part, *[NOTHING] * (rows - len(part))], config.data.max_length)
        for part in (sequences[start : start + rows] for start in range(0, len(sequences), rows))
    ]
    mode = config.objective.length_mode
    parts = [masked.length_denominator(batch["weights"], mode) for batch in batches]
    whole = {"denominator": float(parts[0] if mode == "sum" else sum(parts))}

    @jax.jit
    def loss(params, batch):
        return objectives.cross_entropy(config.objective, run.model, params, None, batch | whole)[0]

    def validate(params, step):
        with sharding.use(run.mesh):
            return {"loss": sum(float(loss(params, sharding.shard_batch(run.mesh, batch))) for batch in batches)}

    return Hooks(validate=validate, validate_every=config.checkpoint.every)


def off_policy(run: Run, folder: pathlib.Path, config: TrainConfig, method: Method, params) -> dict[str, Any]:
    """Cross-entropy on demonstrations, or on the start model's own right samples."""
    overlong = 0
    if method.sequences == "demonstrations":
        sequences, spent = solutions(run, config.questions, config.max_length), ledger.Ledger()
    else:
        questions, _ = run.training_questions("train")
        rollouts, summary = sample(
            folder / "samples.jsonl", config.sampling, run.domain, run.sampler(), params, questions,
            n=config.samples, chunk=config.chunk, seed=run.config.seed,
        )  # fmt: skip
        (sequences, overlong), spent = right_sequences(rollouts, config.max_length), ledger.of_sampling(summary)
        if not sequences:
            longer = f", but {overlong} that are longer than train.max_length={config.max_length}" if overlong else ""
            raise HealthStop(f"none of {summary['generations']} samples is right{longer}: nothing to train on")
    steps = max(config.epochs * len(sequences) // config.batch_size, 1)
    source = SequenceSource(sequences, config.batch_size, config.max_length, run.config.seed)
    training = SrtConfig(objective=config.cross_entropy, optimizer=config.optimizer, checkpoint=config.checkpoint)
    params = train_cross_entropy(
        run, config.method, folder, params, source, steps, training,
        adapters=config.lora, microbatches=config.microbatches,
    )  # fmt: skip
    save_params(folder / "params", params, run.provenance)
    spent += ledger.of_training(history(folder))
    return {"sequences": len(sequences), "overlong": overlong, "ledger": dataclasses.asdict(spent)}


def solutions(run: Run, questions: int, max_length: int) -> list[ScoredSequence]:
    """Reference solutions of the training questions, for supervised fine-tuning (SFT)."""
    tokenizer, sequences = run.problems.tokenizer, []
    for question in run.problems.questions("train", questions):
        if solution := run.problems.demonstration(question):
            response = [*tokenizer.encode(solution), tokenizer.end_id]
            sequences.append(response_sequence(tokenizer.encode_prompt(question.prompt), response))
    fitting = [sequence for sequence in sequences if len(sequence.tokens) <= max_length]
    if not fitting:
        raise UserError(
            f"none of {questions} training questions has a reference solution within max_length={max_length} "
            "tokens; raise max_length; a base needs none with base.pretrained, or base.steps=0 for random weights"
        )
    return fitting


# ---------------------------------------------------------------------------------- on-policy


def on_policy(run: Run, stage: str, folder: pathlib.Path, config: DistillConfig, params) -> dict[str, Any]:
    """Rounds of on-policy training; between two of them the teacher becomes the student.

    A reviser below the keep-rate gate stops the first round and refuses a later synchronisation.
    """
    method = find_method(config.method, config.weights)
    revises = method.uses("self_distillation") and method.context == "revision"
    questions, collected = run.training_questions(stage)
    outcome: dict[str, Any] = {"rounds": 0, "keep_rates": [], "refused": None, "questions_collected_too": collected}
    spent = ledger.Ledger()
    for number in range(1, config.rounds + 1):
        where = folder / f"round_{number}"
        if revises:
            keep_rate = measure_keep_rate(run, params, f"{stage}/{number}/gate")
            verdict, line = judge_keep_rate(run.config.health, keep_rate)
            outcome["keep_rates"].append(keep_rate)
            if verdict != "ok":
                say(f"{stage} round {number}: {line}")
            if verdict == "stop" and number == 1:
                raise HealthStop(f"{stage} not started: {line}; such a teacher would endorse errors")
            if verdict == "stop":
                outcome["refused"] = f"synchronisation before round {number} refused: {line}"
                break
        params = on_policy_round(run, stage, where, config, method, questions, params, number)
        save_params(where / "params", params, run.provenance)
        spent += ledger.of_training(history(where))
        outcome["rounds"] = number
    return outcome | {"ledger": dataclasses.asdict(spent)}


def on_policy_round(run: Run, stage: str, folder, config: DistillConfig, method: Method, questions, start, number: int):
    """One round from a model that is the first student and, where there is one, the teacher; returns the student.

    `start` is used up.
    """
    optimizer_config = dataclasses.replace(
        config.optimizer, learning_rate=config.optimizer.learning_rate * config.round_scale ** (number - 1)
    )
    steps = planned_steps(config)
    source = on_policy_source(run, stage, config, method, questions, number)
    terms = loss_terms(method, config.objective, config.policy, config.cross_entropy, config.sampling.temperature)
    optimizer, schedule = _optimizer(optimizer_config, steps)
    taught = method.uses("self_distillation") or (method.uses("policy_gradient") and config.policy.kl_weight > 0)
    teacher = config.teacher if taught else None
    trained, frozen = _trained(run, start, config.lora)
    step_fn = make_train_step(
        functools.partial(objectives.combined, terms, run.model), run.model, optimizer, run.mesh,
        teacher_config=teacher, schedule=schedule, differentiate=in_parts(config.microbatches, terms),
        adapters=config.lora, frozen=frozen,
    )  # fmt: skip
    start = functools.partial(
        init_state, run.model, trained, optimizer, run.mesh,
        teacher_config=teacher, reviser_params=trained, adapters=config.lora,
    )  # fmt: skip
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint, best_metric="validation_accuracy")
    most = steps + steps // 2 if config.budget else steps  # a budget ends by itself, near the steps planned
    try:
        state = fit(
            f"{stage} {number}", folder, start, step_fn, source, most, checkpointer,
            config.checkpoint.every, run.provenance,
            on_policy_hooks(run, stage, folder, config, method, number, step_fn), given=trained,
        )  # fmt: skip
    finally:
        checkpointer.close()
    return step_fn.parameters(state.params)


def planned_steps(config: DistillConfig) -> int:
    """Steps of a round: by its passes over the questions, or by its budget of tokens."""
    if config.budget:
        batches = config.budget / (config.batch_size * config.samples * config.expected_tokens)
        return max(math.ceil(batches), 1) * config.updates
    return max(config.passes * config.questions // config.batch_size, 1) * config.updates


def on_policy_source(
    run: Run, stage: str, config: DistillConfig, method: Method, questions: Sequence[Question], number: int
) -> OnPolicySource:
    """Rollouts of the student as the batches that the method's terms read."""
    context = teacher_context(run, stage, method, questions)
    rollouts = RolloutIterator(
        shuffled_batches(questions, config.batch_size, seed=run.config.seed * 1000 + number),
        run.domain, run.sampler(min(config.batch_size * config.samples, run.config.sampler.slots)), config.sampling,
        label=f"{stage}/{number}", seed=run.config.seed, n=config.samples, prefetch=config.prefetch,
    )  # fmt: skip
    advantage = dataclasses.replace(config.advantage, baseline=config.advantage.baseline or method.baseline)
    replays = method.uses("replay")
    replayed = config.replay.max_length or config.layout.rev_length(run.domain.longest_phrase)
    return OnPolicySource(
        rollouts, run.domain, config.layout,
        context=context,
        opposite=config.objective.guidance > 0 and method.uses("self_distillation"),
        teacher=method.uses("self_distillation"),
        reference=method.uses("policy_gradient") and config.policy.kl_weight > 0,
        advantage=advantage,
        replay=dataclasses.replace(config.replay, max_length=replayed) if replays else None,
        remembered=collected_attempts(run) if replays and "collect" in run.chain(stage) else (),
        updates=config.updates, budget=config.budget, seed=run.config.seed,
    )  # fmt: skip


def teacher_context(run: Run, stage: str, method: Method, questions: Sequence[Question]) -> TeacherContext | None:
    """What the teacher reads before y, None for a revision; NothingLeft when no question has it."""
    if method.context == "revision":
        return None
    text_of = {"demonstration": run.problems.demonstration, "answer": run.problems.answer}[method.context]
    if not any(text_of(question) for question in questions):
        raise NothingLeft(
            f"{stage}.method: none of {len(questions)} training questions has the {method.context} that the teacher "
            "of this method reads; wanted questions with solutions, or another method"
        )
    return demonstration_context(text_of, run.domain)


def collected_attempts(run: Run) -> list[Rollout]:
    """The first attempts and revisions of phase 1 as answers to their questions, for hindsight replay."""
    questions = {q.id: q for q in run.problems.questions("train", run.config.collect.questions)}
    end = run.domain.tokenizer.end_id
    attempts = []
    for record in ChunkLog(run.folder("collect") / "traces.jsonl").records:
        trace = RevisionTrace.from_json(record)
        question = questions[trace.question_id]
        pairs = [((*trace.init_ids, end), trace.init_verdict)] if trace.init_finish == "stop" else []
        if trace.revised_finish == "stop":
            pairs.append((trace.revised_ids, trace.revised_verdict))
        attempts += [Rollout(question, trace.prompt_ids, ids, (), "stop", verdict) for ids, verdict in pairs]
    return attempts


def on_policy_hooks(run: Run, stage: str, folder, config, method: Method, number: int, step_fn: TrainStep) -> Hooks:
    """Accuracy on validation questions, gated teacher synchronisation, and the length gate."""
    questions = run.problems.questions("validation", config.validation_questions)

    @functools.cache
    def rows() -> list[dict[str, Any]]:
        """What was logged, step by step; read within the loop, which first drops what follows its checkpoint."""
        return history(folder)

    def validate(params, step):
        rollouts = sample_responses(
            run.domain, run.sampler(), params, questions, run.config.evaluate.sampling,
            label=f"{stage}/{number}/validate/{step}", seed=run.config.seed,
        )  # fmt: skip
        judged = [r.verdict.reward for r in rollouts if r.verdict.reward is not None]
        return {"accuracy": _mean(judged)} if judged else {}

    def after_step(step, state, figures):
        rows().append(dict(figures))
        accuracies = _since_synchronisation(rows()) if "validation_accuracy" in figures else ()
        if not sync_due(config.teacher, step, accuracies):
            return state, {}
        keep_rate = measure_keep_rate(run, step_fn.parameters(state.params), f"{stage}/{number}/sync/{step}")
        verdict, line = judge_keep_rate(run.config.health, keep_rate)
        if verdict != "ok":
            say(f"{stage}: synchronisation at step {step}: {line}")
        extra = {"synchronised": 0.0 if verdict == "stop" else 1.0}
        extra |= {} if keep_rate is None else {"keep_rate": keep_rate}
        rows()[-1] |= extra
        return (state if verdict == "stop" else synchronise(state)), extra

    taught = method.uses("self_distillation")
    return Hooks(
        after_step=after_step if taught else None,
        validate=validate,
        validate_every=config.validate_every,
        check=functools.partial(length_collapse, run.config.health),
    )


def _since_synchronisation(rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Validation accuracies since the teacher was last synchronised."""
    accuracies: list[float] = []
    for row in rows:
        accuracies += [row["validation_accuracy"]] if "validation_accuracy" in row else []
        accuracies = [] if row.get("synchronised") == 1.0 else accuracies
    return accuracies


def measure_keep_rate(run: Run, params, label: str) -> float | None:
    """Share of the model's own right answers on validation questions that its revision keeps right.

    Revisions without a verdict are left out; None when nothing is left.
    """
    questions = run.problems.questions("validation", run.config.health.questions)
    _, revisions = sample_and_revise(
        run.domain, run.sampler(), params, questions, run.config.evaluate.sampling,
        label=label, seed=run.config.seed, revise=(1.0,),
    )  # fmt: skip
    rewards = [revision.verdict.reward for own in revisions for revision in own]
    judged = [reward for reward in rewards if reward is not None]
    return _mean(judged) if judged else None


def history(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The metrics that were written in a folder, on all hosts; none where there is no file yet."""
    path = folder / METRICS
    return hosts.from_first(lambda: read_metrics(path) if path.exists() else [])


def _optimizer(config: OptimizerConfig, steps: int):
    return make_optimizer(config, steps), learning_rate_schedule(config, steps)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
