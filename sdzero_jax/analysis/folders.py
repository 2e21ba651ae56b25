"""What `run.py report` does: writes the reports of folders again, and puts two runs side by side."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sdzero_jax import statistics
from sdzero_jax.analysis.comparison import write_comparison
from sdzero_jax.analysis.report import write_report
from sdzero_jax.analysis.run_data import json_lines, load_run


def write_reports(folders: Sequence[Path]) -> list[str]:
    """Writes the report of every run directory or comparison; returns the paths, and of two runs their difference."""
    comparisons = [(folder / "comparison.json").exists() for folder in folders]
    lines = [str((write_comparison if is_one else write_report)(f)) for f, is_one in zip(folders, comparisons)]
    return lines + (paired_lines(*folders) if len(folders) == 2 and not any(comparisons) else [])


def paired_lines(first: Path, second: Path) -> list[str]:
    """Model by model second - first in avg@k, paired by question, with its 95% bootstrap interval over questions."""
    one, other = load_run(first), load_run(second)
    lines = []
    for row in other.rows:
        if row.name not in one.responses or row.name not in other.responses:
            continue
        theirs, ours = question_means(one.responses[row.name]), question_means(other.responses[row.name])
        if not ours or theirs.keys() != ours.keys():
            lines.append(f"{row.name:<14}not compared: the runs evaluated other questions")
            continue
        sides = np.array([[means[question] for question in ours] for means in (theirs, ours)])
        sides = sides[:, ~np.isnan(sides).any(axis=0)]  # graded in both
        if not sides.size:
            lines.append(f"{row.name:<14}not compared: no question has a verdict in both")
            continue
        gap = statistics.paired_difference(sides[1], sides[0])
        means = "".join(f"{side.mean():>9.3f}" for side in sides)
        lines.append(f"{row.name:<14}{means}{gap.mean:>+11.3f} [{gap.low:+.3f}, {gap.high:+.3f}] {sides.shape[1]:>10}")
    both = f"avg@{one.k}" if one.k == other.k else f"avg@{one.k}, avg@{other.k}"
    head = f"{both:<14}{'first':>9}{'second':>9}{'difference':>11} 95% interval   questions"
    return ["", f"first: {first}", f"second: {second}", head, *lines] if lines else []


def question_means(path: Path) -> dict[tuple[str, str], float]:
    """(id, prompt) of a question -> mean reward of its first attempts, NaN where none has a verdict."""
    rewards: dict[tuple[str, str], list[float]] = {}
    for record in json_lines(path):
        if "reward" in record:  # else it ends a chunk
            own = rewards.setdefault((str(record.get("question_id")), str(record.get("prompt"))), [])
            own += [] if record["reward"] is None else [record["reward"]]
    return {question: float(np.mean(own)) if own else float("nan") for question, own in rewards.items()}
