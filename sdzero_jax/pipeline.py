"""The stages of a run, in order: base, collect, SRT, distillation, evaluation, localisation; then the report.

A stage reads what earlier ones wrote and writes into a folder of its own (see `runs`). Running a
finished stage loads what it recorded.
"""

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from sdzero_jax import objectives, settings, sharding
from sdzero_jax.analysis import localisation_summary, write_report
from sdzero_jax.analysis.token_scores import localisation_records
from sdzero_jax.batches import response_sequence, sequence_batch
from sdzero_jax.checkpoint import Checkpointer, save_params
from sdzero_jax.chunks import ChunkLog
from sdzero_jax.collect import collect
from sdzero_jax.config import OptimizerConfig
from sdzero_jax.data import shuffled_batches
from sdzero_jax.errors import HealthStop, UserError
from sdzero_jax.evaluate import evaluate
from sdzero_jax.examples import RevisionTrace
from sdzero_jax.files import write_json_atomic
from sdzero_jax.health import judge_keep_rate, length_collapse
from sdzero_jax.methods import SRT_STAGES, CorpusSource, DistillSource, SequenceSource, srt_sequences
from sdzero_jax.optimizer import learning_rate_schedule, make_optimizer
from sdzero_jax.problems import demonstration
from sdzero_jax.progress import say
from sdzero_jax.rollouts import RolloutIterator, sample_and_revise, sample_responses
from sdzero_jax.runs import Run
from sdzero_jax.teacher import sync_due
from sdzero_jax.train import Hooks, fit
from sdzero_jax.train_step import init_state, make_train_step, synchronise


def run_stage(run: Run, stage: str) -> dict[str, Any]:
    """Runs a stage to its end, or loads it when it is done; returns what it recorded."""
    result = run.result(stage)
    if result is not None:
        return result
    folder = run.folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    if stage == "base":  # it lies in the cache, which other runs share
        run.lock(folder)
    started = time.perf_counter()
    say(f"== {stage}")
    result = STAGES[stage](run, folder)
    result |= {"key": run.key(stage), "seconds": round(time.perf_counter() - started, 1)}
    write_json_atomic(folder / "done.json", result)
    return result


# ------------------------------------------------------------------------------------------ stages


def base(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """The model to start from: checked when it is pretrained, else trained from random weights."""
    config = run.config.base
    if config.pretrained:
        run.pretrained()
        return {"pretrained": config.pretrained}
    params = random_params(run)
    if config.steps:
        source = CorpusSource(run.task.corpus_batch) if not run.config.problems.train else solutions(run)
        params = train_cross_entropy(run, "base", folder, params, source, config.steps, config).params
    save_params(folder / "params", params, run.provenance)
    return {"steps": config.steps}


def random_params(run: Run):
    """Random weights of the seed, made in their shards."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_params())
    with sharding.use(run.mesh):
        return jax.jit(run.model.init, out_shardings=places)(jax.random.key(run.config.seed))


def solutions(run: Run) -> SequenceSource:
    """Reference solutions of the training questions, for supervised fine-tuning (SFT)."""
    config, tokenizer = run.config.base, run.problems.tokenizer
    sequences = []
    for question in run.problems.questions("train", config.questions):
        if solution := demonstration(question):
            response = [*tokenizer.encode(solution), tokenizer.end_id]
            sequences.append(response_sequence(tokenizer.encode_prompt(question.prompt), response))
    fitting = [sequence for sequence in sequences if len(sequence.tokens) <= config.max_length]
    if not fitting:
        raise UserError(
            f"none of {config.questions} training questions has a reference solution within base.max_length="
            f"{config.max_length} tokens; set base.pretrained, or base.steps=0 for random weights"
        )
    return SequenceSource(fitting, config.batch_size, config.max_length, run.config.seed)


def collect_traces(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Samples first attempts and revisions from the base model and grades them."""
    config = run.config.collect
    params, _ = run.params("base")
    questions = run.problems.questions("train", config.questions)
    _, summary = collect(
        folder / "traces.jsonl", config, run.domain, run.sampler(), params, questions, seed=run.config.seed
    )
    write_json_atomic(folder / "summary.json", summary)
    return {"summary": summary}


def srt(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Trains the base model to revise: one run of cross-entropy per SRT stage."""
    run.need("collect")
    config = run.config.srt
    records = ChunkLog(run.folder("collect") / "traces.jsonl").records
    traces = [RevisionTrace.from_json(record) for record in records]
    params, _ = run.params("base")
    stages = SRT_STAGES[config.data.mode]
    counts = {}
    for number, stage in enumerate(stages):
        training, held_out, counts[stage.name] = srt_sequences(traces, stage, config.data)
        steps = max(config.epochs * len(training) // config.batch_size, 1)
        source = SequenceSource(training, config.batch_size, config.data.max_length, run.config.seed + number)
        hooks = held_out_hooks(run, held_out, config)
        where = folder if len(stages) == 1 else folder / f"round_{number + 1}"
        params = train_cross_entropy(run, f"srt {stage.name}", where, params, source, steps, config, hooks).params
    save_params(folder / "params", params, run.provenance)
    return {"counts": counts}


def train_cross_entropy(run: Run, name, folder, params, source, steps: int, config, hooks: Hooks = Hooks()):
    """The loop with the cross-entropy objective; `config` owns objective, optimizer and checkpoint."""
    loss_fn = functools.partial(objectives.cross_entropy, config.objective, run.model)
    optimizer, schedule = _optimizer(config.optimizer, steps)
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint)
    step_fn = make_train_step(loss_fn, run.model, optimizer, run.mesh, schedule=schedule)
    state = init_state(run.model, params, optimizer, run.mesh)
    try:
        return fit(
            name, folder, state, step_fn, source, steps, checkpointer, config.checkpoint.every, run.provenance, hooks
        )
    finally:
        checkpointer.close()


def held_out_hooks(run: Run, sequences, config) -> Hooks:
    """Reports the loss on held-out traces at every save; nothing when there are none."""
    if not sequences:
        return Hooks()
    parts = sharding.batch_devices(run.mesh)
    rows = sequences[: len(sequences) // parts * parts] or sequences[:1] * parts  # divides over the devices
    batch = sequence_batch(rows, config.data.max_length)
    loss = jax.jit(functools.partial(objectives.cross_entropy, config.objective, run.model))

    def validate(params, step):
        with sharding.use(run.mesh):
            return {"loss": float(loss(params, None, sharding.shard_batch(run.mesh, batch))[0])}

    return Hooks(validate=validate, validate_every=config.checkpoint.every)


def distill(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Rounds of on-policy self-distillation; between two of them the teacher becomes the student.

    A reviser below the keep-rate gate stops the first round and refuses a later synchronisation.
    """
    config = run.config.distill
    params, metadata = run.params("srt")
    check_provenance(metadata, run.provenance)
    outcome: dict[str, Any] = {"rounds": 0, "keep_rates": [], "refused": None}
    for number in range(1, config.rounds + 1):
        where = folder / f"round_{number}"
        keep_rate = measure_keep_rate(run, params, f"distill/{number}/gate")
        verdict, line = judge_keep_rate(run.config.health, keep_rate)
        outcome["keep_rates"].append(keep_rate)
        if verdict != "ok":
            say(f"distill round {number}: {line}")
        if verdict == "stop" and number == 1:
            raise HealthStop(f"distillation not started: {line}; the teacher would endorse errors")
        if verdict == "stop":
            outcome["refused"] = f"synchronisation before round {number} refused: {line}"
            break
        params = distill_round(run, where, params, number)
        save_params(where / "params", params, run.provenance)
        outcome["rounds"] = number
    return outcome


def distill_round(run: Run, folder: pathlib.Path, reviser_params, number: int):
    """One round from a reviser that is both the first student and the teacher; returns the student."""
    config = run.config.distill
    optimizer_config = dataclasses.replace(
        config.optimizer, learning_rate=config.optimizer.learning_rate * config.round_scale ** (number - 1)
    )
    steps = max(config.passes * config.questions // config.batch_size, 1)
    questions = run.problems.questions("train", config.questions)
    order = shuffled_batches(questions, config.batch_size, seed=run.config.seed * 1000 + number)
    rollouts = RolloutIterator(
        order, run.domain, run.sampler(config.batch_size), config.sampling,
        label=f"distill/{number}", seed=run.config.seed, prefetch=config.prefetch,
    )  # fmt: skip
    loss_fn = functools.partial(objectives.self_distillation, config.objective, run.model)
    optimizer, schedule = _optimizer(optimizer_config, steps)
    step_fn = make_train_step(loss_fn, run.model, optimizer, run.mesh, teacher_config=config.teacher, schedule=schedule)
    state = init_state(
        run.model, reviser_params, optimizer, run.mesh,
        teacher_config=config.teacher, reviser_params=reviser_params,
    )  # fmt: skip
    checkpointer = Checkpointer(folder / "checkpoints", config.checkpoint, best_metric="validation_accuracy")
    try:
        state = fit(
            f"distill {number}", folder, state, step_fn, DistillSource(rollouts, run.domain, config.layout),
            steps, checkpointer, config.checkpoint.every, run.provenance, distill_hooks(run, number),
        )  # fmt: skip
    finally:
        checkpointer.close()
    return state.params


def distill_hooks(run: Run, number: int) -> Hooks:
    """Accuracy on validation questions, gated teacher synchronisation, and the length gate."""
    config = run.config.distill
    questions = run.problems.questions("validation", config.validation_questions)

    def validate(params, step):
        rollouts = sample_responses(
            run.domain, run.sampler(), params, questions, run.config.evaluate.sampling,
            label=f"distill/{number}/validate/{step}", seed=run.config.seed,
        )  # fmt: skip
        return {"accuracy": _mean([r.verdict.reward for r in rollouts if r.verdict.reward is not None])}

    def after_step(step, state):
        if not sync_due(config.teacher, step):
            return state, {}
        keep_rate = measure_keep_rate(run, state.params, f"distill/{number}/sync/{step}")
        verdict, line = judge_keep_rate(run.config.health, keep_rate)
        if verdict != "ok":
            say(f"distill: synchronisation at step {step}: {line}")
        if verdict == "stop":
            return state, {"keep_rate": keep_rate, "synchronised": 0.0}
        return synchronise(state), {"keep_rate": keep_rate, "synchronised": 1.0}

    return Hooks(
        after_step=after_step,
        validate=validate,
        validate_every=config.validate_every,
        check=functools.partial(length_collapse, run.config.health),
    )


def measure_keep_rate(run: Run, params, label: str) -> float:
    """Share of the model's own right answers on validation questions that its revision keeps right."""
    questions = run.problems.questions("validation", run.config.health.questions)
    _, revisions = sample_and_revise(
        run.domain, run.sampler(), params, questions, run.config.evaluate.sampling,
        label=label, seed=run.config.seed, revise=(1.0,),
    )  # fmt: skip
    return _mean([revision.verdict.reward or 0.0 for own in revisions for revision in own])


def check_provenance(trained: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to distil from a reviser that was trained to read something else."""
    changed = settings.differences(trained, current)
    if changed:
        raise UserError("the reviser was trained with other phrases or another tokenizer: " + "; ".join(changed))


def evaluate_models(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Evaluates every model of the run on the test questions."""
    config = run.config.evaluate
    questions = run.problems.questions("test", config.questions)
    results: dict[str, Any] = {}
    base_records = None
    for name, load in models_of(run).items():
        records, metrics = evaluate(
            folder / f"{name}.jsonl", config, run.domain, run.sampler(), load(), questions, base_records,
            name=name, seed=run.config.seed,
        )  # fmt: skip
        base_records = base_records or records
        write_json_atomic(folder / f"{name}.json", metrics)
        results[name] = metrics
    return {"models": results}


def models_of(run: Run) -> dict[str, Callable[[], Any]]:
    """Name -> loader of each model that the run has made, base first."""
    outcome = run.need("distill")
    models = {
        "base": lambda: run.params("base")[0],
        "srt": lambda: run.params("srt")[0],
        "sdzero": lambda: run.params("distill", "round_1/params")[0],
    }
    for number in range(2, outcome["rounds"] + 1):
        name = "sdzero_sync" if number == 2 else f"sdzero_sync_{number - 1}"
        models[name] = functools.partial(lambda n: run.params("distill", f"round_{n}/params")[0], number)
    return models


def localise(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Scores the tokens of the reviser's own responses: does the divergence find the first error?"""
    config = run.config.localisation
    params, _ = run.params("srt")
    questions = run.problems.questions("validation", config.questions)
    rollouts = sample_responses(
        run.domain, run.sampler(), params, questions, run.config.distill.sampling,
        label="localise", seed=run.config.seed,
    )  # fmt: skip
    records = localisation_records(
        run.model, params, params, rollouts, run.domain, run.config.distill.layout,
        run.problems.first_error,
        divergence=run.config.distill.objective.divergence,
        batch_size=sharding.batch_devices(run.mesh) * 64, mesh=run.mesh,
    )  # fmt: skip
    summary = localisation_summary(records)
    wrong_first = sorted(records, key=lambda record: record["first_error"] is None)
    write_json_atomic(folder / "localisation.json", {"summary": summary, "examples": wrong_first[: config.examples]})
    return {"summary": summary}


STAGES: dict[str, Callable[[Run, pathlib.Path], dict[str, Any]]] = {
    "base": base,
    "collect": collect_traces,
    "srt": srt,
    "distill": distill,
    "evaluate": evaluate_models,
    "localise": localise,
}


# ------------------------------------------------------------------------------------ whole runs


def run_all(run: Run) -> dict[str, Any]:
    """Every stage, then summary.json and the report; returns the summary."""
    for stage in STAGES:
        run_stage(run, stage)
    return finish(run)


def finish(run: Run) -> dict[str, Any]:
    """Writes summary.json and the report from the finished stages."""
    _copy_base_metrics(run)
    summary = summarise(run)
    write_json_atomic(run.directory / "summary.json", summary)
    write_report(run.directory)
    return summary


def summarise(run: Run) -> dict[str, Any]:
    """The run in figures: one entry per model, localisation, seconds per stage, seed."""
    models = run.need("evaluate")["models"]
    summary: dict[str, Any] = {name: dict(metrics) for name, metrics in models.items()}
    if "sdzero_sync" not in summary:
        refused = run.need("distill")["refused"]
        summary["sdzero_sync"] = None
        summary["sdzero_sync_reason"] = refused or "the config asks for one round"
    summary["localisation"] = run.need("localise")["summary"]
    summary["seconds"] = {stage: run.need(stage)["seconds"] for stage in STAGES}
    summary["seed"] = run.config.seed
    return summary


def table(summary: dict[str, Any]) -> str:
    """The models of a summary as a text table."""
    models = {name: value for name, value in summary.items() if isinstance(value, dict) and "mean_tokens" in value}
    average = next(name for name in next(iter(models.values())) if name.startswith("avg@") and "_" not in name)
    solved = average.replace("avg", "pass")
    columns = (average, solved, "greedy", "mean_tokens", "correction_rate", "keep_rate", "fix", "keep")
    lines = [f"{'model':<14}" + "".join(f"{column:>17}" for column in columns)]
    for name, metrics in models.items():
        cells = (metrics[column] for column in columns)
        lines.append(f"{name:<14}" + "".join(f"{'-' if cell is None else f'{cell:.3f}':>17}" for cell in cells))
    if summary.get("sdzero_sync_reason"):
        lines.append(f"sdzero_sync: {summary['sdzero_sync_reason']}")
    return "\n".join(lines)


def _copy_base_metrics(run: Run) -> None:
    """The base's curves lie in the cache; the report reads the run directory only."""
    target = run.directory / "base"
    target.mkdir(parents=True, exist_ok=True)
    metrics = run.folder("base") / "metrics.jsonl"
    if metrics.exists():  # a base that was trained here
        shutil.copyfile(metrics, target / "metrics.jsonl")


def _optimizer(config: OptimizerConfig, steps: int):
    return make_optimizer(config, steps), learning_rate_schedule(config, steps)


def _mean(values: Sequence[float]) -> float:
    return float(sum(values) / len(values)) if values else 0.0
