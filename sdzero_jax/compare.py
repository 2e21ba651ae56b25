"""Methods side by side at equal numbers of sampled tokens, over several seeds, from one command.

Every (method, seed) is a run whose stages lie under their hashes in one folder: what two methods share
is computed once, a changed setting re-runs what it touches, and a killed comparison goes on. What a gate stops or
has nothing to train on is recorded, and the others go on.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdzero_jax import hosts, settings, statistics, stores
from sdzero_jax.analysis import stopped_label, write_comparison
from sdzero_jax.chunks import ChunkLog
from sdzero_jax.config import Config, load_from, override, validate
from sdzero_jax.errors import HealthStop, UserError, nearest
from sdzero_jax.files import write_json_atomic
from sdzero_jax.ledger import Ledger
from sdzero_jax.locks import exclusive
from sdzero_jax.methods import NothingLeft
from sdzero_jax.pipeline import evaluate_stage, run_stage
from sdzero_jax.progress import say
from sdzero_jax.runs import Run, check_fit

TOLERANCE = 0.05  # a method within this share of the budget counts as having spent it


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method of a comparison.

    Attributes:
      label: what tables call it.
      stage: the stage whose model is evaluated: base, srt, distill or train.
      settings: overrides of the comparison's config.
      fill: gives the stage `train` what earlier stages have left of the budget.
      grid: further settings that `tuned` tries, one after the other.
    """

    label: str
    stage: str = "train"
    settings: tuple[str, ...] = ()
    fill: bool = False
    grid: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, and where it is written."""

    name: str
    config: Config
    entries: Mapping[str, Entry]
    seeds: tuple[int, ...]
    budget: int  # sampled tokens of each method
    reference: str = ""  # the entry that the others are compared with; default the first
    directory: str = "runs"
    tuning_seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def folder(self) -> pathlib.Path:
        return stores.local(self.directory) / self.name


# What every run of a comparison gets from it.
_TAKEN = {
    "seed": "such as 'seeds=[0,1,2]'",
    "task.seed": "such as 'seeds=[0,1,2]'; each seed has its own world",
    "run_dir": "directory=, under which the comparison's name is the folder",
    "train.budget": "budget=",
}


def load_comparison(path: str, overrides: Sequence[str]) -> Comparison:
    """The Comparison of a file with `get_comparison()`; overrides are of its config, or of the comparison itself.

    The latter are seeds=, budget=, directory=, tuning_seeds=, reference= and only=["grpo", "sdzero"], which leaves
    the other entries out.
    """
    comparison = load_from(path, "get_comparison", Comparison)
    own = ("seeds", "budget", "directory", "tuning_seeds", "reference")
    for assignment in overrides:
        name, _, text = assignment.partition("=")
        if name in _TAKEN:
            raise UserError(f"{assignment}: a comparison has its own, {_TAKEN[name]}")
        if name == "only":
            comparison = _only(comparison, settings.parse(tuple[str, ...], text, name))
        elif name in own:
            annotation = settings.field_types(Comparison)[name]
            comparison = dataclasses.replace(comparison, **{name: settings.parse(annotation, text, name)})
        else:
            config = override(comparison.config, [assignment])
            comparison = dataclasses.replace(comparison, config=config)
    return comparison


def _only(comparison: Comparison, names: Sequence[str]) -> Comparison:
    if not names:
        raise UserError(f"only=[] leaves nothing to compare; wanted some of {', '.join(comparison.entries)}")
    for name in names:
        if name not in comparison.entries:
            raise UserError(f"only={list(names)}: no entry {name!r}{nearest(name, comparison.entries)}")
    entries = {name: entry for name, entry in comparison.entries.items() if name in names}
    reference = comparison.reference if comparison.reference in entries else ""
    if reference != comparison.reference:
        say(f"only= leaves out the reference {comparison.reference!r}; differences are to {next(iter(entries))!r}")
    return dataclasses.replace(comparison, entries=entries, reference=reference)


def check_comparison(comparison: Comparison) -> None:
    """Refuses what cannot run, in every entry, before anything is computed."""
    if not comparison.entries:
        raise UserError(f"{comparison.name} has no entries to compare")
    if not comparison.seeds or len(set(comparison.seeds)) < len(comparison.seeds):
        raise UserError(f"seeds={list(comparison.seeds)}; wanted one or more, all different")
    if comparison.budget < 1:
        raise UserError(f"budget={comparison.budget} sampled tokens; wanted at least 1")
    reference = comparison.reference
    if reference and reference not in comparison.entries:
        raise UserError(f"unknown reference {reference!r}{nearest(reference, comparison.entries)}")
    stages = ("base", "srt", "distill", "train")
    for name, entry in comparison.entries.items():
        if entry.stage not in stages:
            raise UserError(f"entry {name}: unknown stage {entry.stage!r}{nearest(entry.stage, stages)}")
        budget = [f"train.budget={comparison.budget}"] if entry.fill else []
        configs = [override(_config(comparison, entry, seed), budget) for seed in comparison.seeds]
        for config in configs:
            validate(config)
        check_fit(Run(configs[0], comparison.folder / "stages"), entry.stage)


def tuning(comparison: Comparison) -> Comparison:
    """The comparison of every entry's grid, on seeds of its own and on validation questions."""
    entries = {}
    for name, entry in comparison.entries.items():
        for number, point in enumerate(entry.grid):
            label = f"{entry.label}: {' '.join(setting.rsplit('.', 1)[-1] for setting in point)}"
            own = dataclasses.replace(entry, label=label, settings=(*entry.settings, *point), grid=())
            entries[f"{name}/{number}"] = own
    if not entries:
        raise UserError(f"no entry of {comparison.name} has a grid to tune")
    return dataclasses.replace(
        comparison,
        name=f"{comparison.name}_tuning",
        entries=entries,
        reference="",
        seeds=comparison.tuning_seeds,
        config=override(comparison.config, ["evaluate.split=validation"]),
    )


def tuned(comparison: Comparison, summary: Mapping[str, Any]) -> str:
    """What `tuning` found: the best point of each entry's grid, by mean accuracy, and all that was tried.

    A point that was stopped on any seed counts as the worst.
    """
    metric, lines = f"avg@{summary['k']}", []
    for name, entry in comparison.entries.items():
        tried = []
        for method in (summary["methods"][f"{name}/{number}"] for number in range(len(entry.grid))):
            stopped = any("stopped" in run for run in method["seeds"].values())
            tried.append(float("-inf") if stopped else method["mean"][metric])
        if tried:
            best = int(np.argmax(tried))
            shown = ", ".join(f"{value:.3f}" for value in tried)
            lines.append(f"{entry.label:<32} {' '.join(entry.grid[best])}    (of {shown})")
    return "\n".join(lines)


def compare(comparison: Comparison) -> dict[str, Any]:
    """Runs every method on every seed, then writes comparison.json and the report; returns the results."""
    check_comparison(comparison)
    folder = comparison.folder
    with exclusive(folder, setting="directory"):
        results: dict[str, dict[str, Any]] = {name: {} for name in comparison.entries}
        total = len(comparison.seeds) * len(comparison.entries)
        for seed in comparison.seeds:
            for name, entry in comparison.entries.items():
                done = sum(map(len, results.values()))
                say(f"== {entry.label}, seed {seed} ({done + 1} of {total})")
                results[name][str(seed)] = run_entry(comparison, entry, seed)
        summary = summarise(comparison, results)
        write_json_atomic(folder / "comparison.json", summary)
        if hosts.is_first():
            write_comparison(folder)
        stores.push(folder)
    return summary


def run_entry(comparison: Comparison, entry: Entry, seed: int) -> dict[str, Any]:
    """One method on one seed: its metrics, ledger, seconds; "stopped" says why a gate or a lack of data ended it."""
    shared = comparison.folder / "stages"
    config = _config(comparison, entry, seed)
    try:
        return _run_entry(comparison, entry, config, shared)
    except (HealthStop, NothingLeft) as stop:
        say(f"{entry.label}, seed {seed}: {stop}")
        return {"stopped": str(stop)}


def _run_entry(comparison: Comparison, entry: Entry, config: Config, shared: pathlib.Path) -> dict[str, Any]:
    with Run(config, shared) as run:
        for stage in run.chain(entry.stage)[:-1]:
            run_stage(run, stage)
        before = spent(run, run.chain(entry.stage)[:-1])
    if entry.fill:
        left = comparison.budget - before.sampled_tokens
        if left <= 0:
            raise NothingLeft(
                f"{entry.label}: {before.sampled_tokens} tokens are sampled before its last stage, of a budget of "
                f"{comparison.budget}; raise budget, or lower collect.questions"
            )
        config = override(config, [f"train.budget={max(left // config.train.rounds, 1)}"])  # it is a round's
    with Run(config, shared) as run:
        run_stage(run, entry.stage)
        chain = run.chain(entry.stage)
        ledger = spent(run, chain)
        seconds = sum(run.need(stage)["seconds"] for stage in chain if stage != "base")
        metrics = evaluate_stage(run, entry.stage)
        if metrics[f"avg@{config.evaluate.k}"] is None:
            raise NothingLeft(f"{entry.label}: no response of its evaluation has a verdict")
        record = dataclasses.asdict(ledger) | {"flops": ledger.flops(run.config.model)}
        return {"metrics": metrics, "ledger": record, "seconds": round(seconds, 1)}


def spent(run: Run, stages: Sequence[str]) -> Ledger:
    """The ledger of finished stages together."""
    total = Ledger()
    for stage in stages:
        total += Ledger(**run.need(stage).get("ledger", {}))
    return total


def _config(comparison: Comparison, entry: Entry, seed: int) -> Config:
    return override(comparison.config, [*entry.settings, f"seed={seed}", f"task.seed={seed}"])


# ---------------------------------------------------------------------------------------- the table


def summarise(comparison: Comparison, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, 95% t-intervals over seeds, and differences to the reference paired by seed."""
    k = comparison.config.evaluate.k
    reference = comparison.reference or next(iter(comparison.entries))
    methods = {}
    for name, entry in comparison.entries.items():
        runs = {seed: r for seed, r in results[name].items() if "metrics" in r}
        shares = [r["ledger"]["sampled_tokens"] / comparison.budget for r in runs.values()]
        share = float(np.mean(shares)) if shares else 0.0
        methods[name] = {
            "label": entry.label,
            "settings": list(entry.settings),
            "seeds": dict(results[name]),
            "budget_share": share,
            "at_budget": bool(shares) and all(abs(s - 1.0) <= TOLERANCE for s in shares),
            "mean": _means([r["metrics"] for r in runs.values()]),
            "interval": statistics.t_interval([r["metrics"][f"avg@{k}"] for r in runs.values()]),
            "ledger": _means([r["ledger"] for r in runs.values()]),
            "difference": _difference(
                results[name], results[reference], f"avg@{k}", same_questions=bool(comparison.config.problems.train)
            ),
        }
    return {
        "name": comparison.name,
        "budget": comparison.budget,
        "seeds": list(comparison.seeds),
        "k": k,
        "reference": reference,
        "config": dataclasses.asdict(comparison.config),
        "methods": methods,
    }


def _means(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of every number that all records hold."""
    if not records:
        return {}
    numeric = [name for name in records[0] if all(isinstance(r.get(name), int | float) for r in records)]
    return {name: float(np.mean([r[name] for r in records])) for name in numeric}


def _difference(
    own: Mapping[str, Any], other: Mapping[str, Any], metric: str, same_questions: bool
) -> dict[str, Any] | None:
    """own - other by seed: mean, t-interval over seeds, and the bootstrap interval over questions.

    The latter are those of all seeds, whose worlds differ; real questions are the same for every seed (and
    `same_questions` true), and count once each, with their mean over seeds.
    """
    seeds = [seed for seed in own if "metrics" in own[seed] and "metrics" in other.get(seed, {})]
    if not seeds:
        return None
    pairs = [(own[seed]["metrics"], other[seed]["metrics"]) for seed in seeds]
    values = [a[metric] - b[metric] for a, b in pairs]
    sides = [[np.array(list(_per_question(metrics).values())) for metrics in side] for side in zip(*pairs)]
    together = functools.partial(np.mean, axis=0) if same_questions else np.concatenate
    by_question = statistics.paired_difference(*(together(side) for side in sides))
    return {
        "mean": float(np.mean(values)),
        "seeds": dict(zip(seeds, values)),
        "interval": statistics.t_interval(values),
        "question_interval": [by_question.low, by_question.high],
    }


def _per_question(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Question -> mean reward of its first attempts, from the recorded responses; in the order of the file."""
    rewards: dict[str, list[float]] = {}
    for record in ChunkLog(pathlib.Path(metrics["responses"])).records:
        own = rewards.setdefault(record["question_id"], [])
        own += [record["reward"]] if record["reward"] is not None else []
    return {question: float(np.mean(own)) if own else float("nan") for question, own in rewards.items()}


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as a text table."""
    k = summary["k"]
    names = {f"avg@{k}": f"avg@{k}", "greedy": "greedy", f"pass@{k}": f"pass@{k}", f"maj@{k}": f"maj@{k}"}
    names |= {"mean_tokens": "tokens", "correction_rate": "correct", "keep_rate": "keep", "fix": "fix"}
    labels = [stopped_label(method) for method in summary["methods"].values()]
    width = max(28, *(len(label) + 2 for label in labels))
    lines = [f"{'method':<{width}}" + "".join(f"{text:>9}" for text in names.values()) + f"{'vs ref':>24}{'budget':>9}"]
    for label, method in zip(labels, summary["methods"].values()):
        cells = [method["mean"].get(name) for name in names]
        text = "".join(f"{'-' if cell is None else f'{cell:.3f}':>9}" for cell in cells)
        gap = method["difference"]
        shown = "-"
        if gap:
            shown = f"{gap['mean']:+.3f}"
            if len(gap["seeds"]) > 1:  # one seed says nothing about their spread
                shown += f" [{gap['interval'][0]:+.3f}, {gap['interval'][1]:+.3f}]"
        mark = "1" if method["at_budget"] else f"x {method['budget_share']:.2f}"
        lines.append(f"{label:<{width}}{text}{shown:>24}{mark:>9}")
    return "\n".join(lines)
