"""The stages of a run, in order: base, collect, SRT, distillation, evaluation, localisation; then the report.

The stage `train` stands beside them: any method alone, from any of the pipeline's models.

A stage reads what earlier ones wrote and writes into a folder of its own (see `runs`). Running a
finished stage loads what it recorded.
"""

import dataclasses
import functools
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

from sdzero_jax import hosts, ledger, settings, sharding, stores
from sdzero_jax.analysis import localisation_summary, write_report
from sdzero_jax.analysis.token_scores import localisation_records, top_alternatives
from sdzero_jax.checkpoint import save_params
from sdzero_jax.chunks import ChunkLog
from sdzero_jax.collect import collect
from sdzero_jax.errors import UserError
from sdzero_jax.evaluate import evaluate
from sdzero_jax.examples import RevisionTrace
from sdzero_jax.files import write_json_atomic
from sdzero_jax.losses import needs_ids
from sdzero_jax.methods import SRT_STAGES, find_method, srt_sequences
from sdzero_jax.progress import say
from sdzero_jax.rollouts import sample_responses
from sdzero_jax.runs import Run
from sdzero_jax.sources import CorpusSource, SequenceSource
from sdzero_jax.training import (
    held_out_hooks,
    history,
    off_policy,
    on_policy,
    rows_at_once,
    solutions,
    train_cross_entropy,
)


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
    stores.push(folder)
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
        if run.config.problems.train:
            sequences = solutions(run, config.questions, config.max_length)
            source = SequenceSource(sequences, config.batch_size, config.max_length, run.config.seed)
        else:
            source = CorpusSource(run.task.corpus_batch)
        params = train_cross_entropy(run, "base", folder, params, source, config.steps, config)
    save_params(folder / "params", params, run.provenance)
    return {"steps": config.steps}


def random_params(run: Run):
    """Random weights of the seed, made in their shards."""
    places = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_params())
    with sharding.use(run.mesh):
        return jax.jit(run.model.init, out_shardings=places)(jax.random.key(run.config.seed))


def collect_traces(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Samples first attempts and revisions from the base model and grades them."""
    config = run.config.collect
    params, _ = run.params("base")
    questions = run.problems.questions("train", config.questions)
    _, summary = collect(
        folder / "traces.jsonl", config, run.domain, run.sampler(), params, questions, seed=run.config.seed
    )
    write_json_atomic(folder / "summary.json", summary)
    return {"summary": summary, "ledger": dataclasses.asdict(ledger.of_sampling(summary))}


def srt(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Trains the base model to revise: one run of cross-entropy per SRT stage."""
    run.need("collect")
    config = run.config.srt
    records = ChunkLog(run.folder("collect") / "traces.jsonl").records
    traces = [RevisionTrace.from_json(record) for record in records]
    params, _ = run.params("base")
    stages = SRT_STAGES[config.data.mode]
    counts, spent = {}, ledger.Ledger()
    for number, stage in enumerate(stages):
        training, held_out, counts[stage.name] = srt_sequences(traces, stage, config.data, run.domain.tokenizer.end_id)
        steps = max(config.epochs * len(training) // config.batch_size, 1)
        source = SequenceSource(training, config.batch_size, config.data.max_length, run.config.seed + number)
        hooks = held_out_hooks(run, held_out, config)
        where = folder if len(stages) == 1 else folder / f"round_{number + 1}"
        params = train_cross_entropy(
            run, f"srt {stage.name}", where, params, source, steps, config, hooks,
            adapters=config.lora, microbatches=config.microbatches,
        )  # fmt: skip
        spent += ledger.of_training(history(where))
    save_params(folder / "params", params, run.provenance)
    return {"counts": counts, "ledger": dataclasses.asdict(spent)}


def distill(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Phase 2 from the self-revision model."""
    params, metadata = run.params("srt")
    check_provenance(metadata, run.provenance)
    return on_policy(run, "distill", folder, run.config.distill, params)


def train(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Any method alone."""
    config = run.config.train
    params, metadata = run.params(config.start)
    if config.start != "base":  # which runs of other phrases share, and which was trained to read none
        check_provenance(metadata, run.provenance)
    method = find_method(config.method, config.weights)
    if method.on_policy:
        return on_policy(run, "train", folder, config, params)
    return off_policy(run, folder, config, method, params)


def check_provenance(trained: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuses to distil from a reviser that was trained to read something else."""
    changed = settings.differences(trained, current)
    if changed:
        raise UserError("the reviser was trained with other phrases or another tokenizer: " + "; ".join(changed))


def evaluate_models(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Evaluates every model of the run on the test questions."""
    config = run.config.evaluate
    questions = run.problems.questions(config.split, config.questions)
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


def evaluate_stage(run: Run, stage: str) -> dict[str, Any]:
    """One stage's model on the test questions, in a folder beside the stage; the base is evaluated first.

    `responses` says where every response was written.
    """
    base_records = None if stage == "base" else _evaluated(run, "base", None)[0]
    return _evaluated(run, stage, base_records)[1]


def _evaluated(run: Run, stage: str, base_records):
    config = run.config.evaluate
    folder = (run.shared or run.directory) / f"evaluate-{run.evaluation_key(stage)}"
    # With its metrics every response is there too, and no model is needed.
    whole = hosts.from_first(lambda: (folder / "metrics.json").exists())
    records, metrics = evaluate(
        folder / "responses.jsonl", config, run.domain, run.sampler(), None if whole else run.params(stage)[0],
        run.problems.questions(config.split, config.questions), base_records, name=stage, seed=run.config.seed,
    )  # fmt: skip
    if not whole:
        write_json_atomic(folder / "metrics.json", metrics)
        stores.push(folder)
    return records, metrics | {"responses": str(folder / "responses.jsonl")}


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
    distill = run.config.distill
    layout = dataclasses.replace(distill.layout, sample_mask="all")  # wrong answers are what is looked at
    rows = rows_at_once(run, distill.batch_size * distill.samples, distill.microbatches)
    records = localisation_records(
        run.model, params, params, rollouts, run.domain, layout, run.problems.first_error,
        # The one-sample estimate is made for its gradient; its values say nothing about a token.
        divergence="reverse_kl" if needs_ids(distill.objective.divergence) else distill.objective.divergence,
        batch_size=rows, mesh=run.mesh,
    )  # fmt: skip
    summary = localisation_summary(records)
    wrong_first = sorted(records, key=lambda record: record["first_error"] is None)
    examples = wrong_first[: config.examples]
    tops = top_alternatives(
        run.model, params, params, [rollouts[e["rollout"]] for e in examples], run.domain, layout,
        batch_size=rows, mesh=run.mesh,
    )  # fmt: skip
    examples = [example | top for example, top in zip(examples, tops)]
    write_json_atomic(folder / "localisation.json", {"summary": summary, "examples": examples})
    return {"summary": summary}


STAGES: dict[str, Callable[[Run, pathlib.Path], dict[str, Any]]] = {
    "base": base,
    "collect": collect_traces,
    "srt": srt,
    "distill": distill,
    "train": train,
    "evaluate": evaluate_models,
    "localise": localise,
}


# ------------------------------------------------------------------------------------ whole runs


PIPELINE = tuple(stage for stage in STAGES if stage != "train")


def run_all(run: Run) -> dict[str, Any]:
    """The whole pipeline, then summary.json and the report; returns the summary."""
    for stage in PIPELINE:
        run_stage(run, stage)
    return finish(run)


def finish(run: Run) -> dict[str, Any]:
    """Writes summary.json and the report from the finished stages."""
    _copy_base_metrics(run)
    summary = summarise(run)
    write_json_atomic(run.directory / "summary.json", summary)
    if hosts.is_first():
        write_report(run.directory)
    stores.push(run.directory)
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
    summary["seconds"] = {stage: run.need(stage)["seconds"] for stage in PIPELINE}
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


def localised(summary: Mapping[str, Any]) -> str:
    """A localisation's summary as text: how well two scores of a token find the first error."""
    lines = [f"{summary['localised']} of {summary['wrong']} wrong responses have a known first error"]
    for name in ("kl", "entropy", "chance"):
        auroc = 0.5 if name == "chance" else summary[f"auroc_{name}"]
        figures = {"AUROC": auroc, "top-1": summary[f"top1_{name}"], "top-3": summary[f"top3_{name}"]}
        cells = (f"{figure} {'-' if value is None else f'{value:.3f}'}" for figure, value in figures.items())
        lines.append(f"{name:<10}" + "  ".join(cells))
    return "\n".join(lines)


def _copy_base_metrics(run: Run) -> None:
    """The base's curves lie in the cache; the report reads the run directory only."""
    if not hosts.is_first():
        return
    target = run.directory / "base"
    target.mkdir(parents=True, exist_ok=True)
    metrics = run.folder("base") / "metrics.jsonl"
    if metrics.exists():  # a base that was trained here
        shutil.copyfile(metrics, target / "metrics.jsonl")
