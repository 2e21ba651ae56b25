"""Reads what a run left in its directory, tolerating every stage that was not run.

Leaves out drawing and wording; `RunData` is plain values.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdzero_jax.analysis.plots import is_number
from sdzero_jax.errors import UserError
from sdzero_jax.files import read_json
from sdzero_jax.ledger import Ledger
from sdzero_jax.metrics import FILE_NAME, read_metrics
from sdzero_jax.models import DecoderConfig

MODELS = {"base": "base", "srt": "SRT", "sdzero": "SD-Zero", "sdzero_sync": "SD-Zero + sync"}
PHASES = {
    "base": "Base model",
    "srt": "Self-Revision Training (SRT)",
    "distill": "Self-distillation (phase 2)",
    "train": "One method alone (train)",
}
STAGES = ("base", "collect", "srt", "distill", "train", "evaluate", "localise")
# How many samples of each (first verdict, verdict after revision) a report shows per model.
PAIRS_SHOWN = {(0, 1): 3, (1, 1): 1, (0, 0): 1, (1, 0): 1}


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """One model of the result table; `values` is empty when it was not run and `note` may say why."""

    name: str
    label: str
    values: Mapping[str, Any]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class RunData:
    """Everything a report shows. A missing stage is an empty value."""

    directory: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    rows: tuple[ResultRow, ...]
    responses: Mapping[str, Path]  # name of an evaluated model -> its responses
    ledgers: Mapping[str, Mapping[str, float]]  # stage -> what it spent, FLOPs where the model is known
    seconds: Mapping[str, float]  # stage -> wall clock
    k: int  # of avg@k
    phases: Mapping[str, list[list[dict[str, Any]]]]  # phase -> rounds -> metric rows
    collect: Mapping[str, Any]
    localisation: Mapping[str, Any]
    examples: tuple[Mapping[str, Any], ...]
    pairs: Mapping[str, list[dict[str, Any]]]  # model label -> sample rows


def load_run(run_dir: Path) -> RunData:
    """Reads a run directory; UserError if it is not one or a file in it is broken."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run directory")
    config = _optional(run_dir / "config.json")
    summary = _optional(run_dir / "summary.json")
    evaluations, responses = _evaluations(run_dir)
    done = {stage: record for stage in STAGES if (record := _optional(run_dir / stage / "done.json"))}
    located = _optional(run_dir / "localise" / "localisation.json")
    phases = {phase: _rounds(run_dir, phase) for phase in PHASES}
    collect = _optional(run_dir / "collect" / "summary.json")
    if not (config or summary or evaluations or collect or any(phases.values())):
        raise UserError(f"{run_dir}: not a run directory; expected config.json, summary.json or the folder of a stage")
    rows = _result_rows(config, summary, evaluations)
    seconds = {stage: record["seconds"] for stage, record in done.items() if is_number(record.get("seconds"))}
    return RunData(
        directory=run_dir,
        config=config,
        summary=summary,
        rows=tuple(rows),
        responses=responses,
        ledgers=_ledgers(done, config.get("model")),
        seconds=(summary.get("seconds") or {}) | seconds,
        k=_find_k(rows),
        phases=phases,
        collect=collect,
        localisation=located.get("summary") or summary.get("localisation") or {},
        examples=tuple(located.get("examples") or ()),
        pairs={row.label: sample_pairs(responses[row.name]) for row in rows if row.name in responses},
    )


def _evaluations(run_dir: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """Model -> its metrics, and -> the file of its responses: of the stage `evaluate`, and of a model alone.

    The latter lie under a hash, and say themselves which model they are of.
    """
    found = {}
    for path in sorted(run_dir.glob("evaluate-*/metrics.json")):
        metrics = _optional(path)
        if isinstance(name := metrics.get("model"), str):
            found[name] = metrics, path.with_name("responses.jsonl")
    for path in sorted((run_dir / "evaluate").glob("*.json")):
        if path.stem != "done":
            found[path.stem] = _optional(path), path.with_suffix(".jsonl")
    return {name: metrics for name, (metrics, _) in found.items()}, {name: path for name, (_, path) in found.items()}


def _ledgers(done: Mapping[str, Mapping[str, Any]], model: Any) -> dict[str, dict[str, float]]:
    """What each finished stage recorded of its spending, and "all" of them together."""
    names = [field.name for field in dataclasses.fields(Ledger)]
    own = {
        stage: Ledger(**{name: record["ledger"].get(name, 0) for name in names})
        for stage, record in done.items()
        if isinstance(record.get("ledger"), dict)
    }
    if len(own) > 1:
        own["all"] = sum(own.values(), Ledger())
    try:
        shape = DecoderConfig(**model)
    except (TypeError, UserError):  # no config, or one of another version
        return {stage: dataclasses.asdict(ledger) for stage, ledger in own.items()}
    return {stage: dataclasses.asdict(ledger) | {"flops": ledger.flops(shape)} for stage, ledger in own.items()}


def sample_pairs(path: Path) -> list[dict[str, Any]]:
    """The first few rows of each kind (see `PAIRS_SHOWN`); two plain rows if nothing was revised."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {kind: [] for kind in PAIRS_SHOWN}
    plain: list[dict[str, Any]] = []
    for row in json_lines(path):
        kind = (row.get("reward"), row.get("revised_reward"))
        if row.get("revised_response") is None:
            plain = [*plain, row][:2]
        elif kind in found and len(found[kind]) < PAIRS_SHOWN[kind]:
            found[kind].append(row)
            if all(len(rows) == PAIRS_SHOWN[kind] for kind, rows in found.items()):
                break
    return [row for rows in found.values() for row in rows] or plain


def _optional(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value


def _rounds(run_dir: Path, phase: str) -> list[list[dict[str, Any]]]:
    # Sorted by number, because round_10 comes before round_2 in a listing.
    matches = [(re.fullmatch(r"round_(\d+)", path.name), path) for path in (run_dir / phase).glob("round_*")]
    rounds = sorted((int(match[1]), path) for match, path in matches if match)
    paths = [run_dir / phase / FILE_NAME] + [path / FILE_NAME for _, path in rounds]
    return [rows for rows in (read_metrics(path) for path in paths if path.exists()) if rows]


def _result_rows(
    config: Mapping[str, Any], summary: Mapping[str, Any], evaluations: Mapping[str, Any]
) -> list[ResultRow]:
    """The four models of the method first, then any other model that was evaluated."""
    others = [name for name, value in {**summary, **evaluations}.items() if name not in MODELS and _is_result(value)]
    rows, labels = [], dict(MODELS)
    if isinstance(trained := config.get("train"), dict):
        labels["train"] = f"train ({trained.get('method')})"
    for name in [*MODELS, *others]:
        values = {**evaluations.get(name, {}), **(summary.get(name) or {})}
        note = "" if values else str(summary.get(f"{name}_reason") or "")
        rows.append(ResultRow(name, labels.get(name, name), values, note))
    return rows


def _is_result(value: Any) -> bool:
    return isinstance(value, dict) and any(re.fullmatch(r"avg@\d+", str(key)) for key in value)


def _find_k(rows: list[ResultRow]) -> int:
    """The largest k for which some model has a finite avg@k; 1 if there is none."""
    return max(
        (
            int(key.removeprefix("avg@"))
            for row in rows
            for key, value in row.values.items()
            if re.fullmatch(r"avg@\d+", key) and is_number(value)
        ),
        default=1,
    )


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The readable rows of a large file, one at a time; samples do not need the unreadable ones."""
    if not path.exists():
        return
    with open(path, "rb") as handle:
        for line in handle:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
