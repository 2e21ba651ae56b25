"""Metrics: (sum, count) pairs that merge exactly, and a writer to JSON lines and TensorBoard.

A training step returns sums and counts, never means, so that micro-batches, devices and steps of
unequal token counts merge into the right mean. All hosts have equal metrics, and the first one writes.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdzero_jax import hosts
from sdzero_jax.files import parse_jsonl, write_bytes_atomic

FILE_NAME = "metrics.jsonl"


def merge(*metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Adds (sum, count) pairs name by name; a name may be missing from some of the arguments.

    Values may be Python numbers, numpy or jax scalars; nothing is copied from a device.
    """
    merged: dict[str, tuple[Any, Any]] = {}
    for mapping in metrics:
        for name, (total, count) in mapping.items():
            if name in merged:
                total, count = merged[name][0] + total, merged[name][1] + count
            merged[name] = (total, count)
    return merged


def finalise(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """{name: (sum, count)} -> {name: sum / count} as Python floats; names with count 0 are left out."""
    return {name: float(total) / float(count) for name, (total, count) in metrics.items() if float(count)}


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics file, in order; a last line cut short by a crash is ignored.

    Raises FileNotFoundError, or UserError for a broken line in the middle.
    """
    return parse_jsonl(Path(path).read_bytes(), str(path))[0]


class MetricWriter:
    """Appends scalars to `<directory>/metrics.jsonl` and to `<directory>/tensorboard`.

    At opening, a broken last line and every row with step > `resume_step` are removed, so that a
    resumed run does not write a step twice; None keeps every whole row, and a run that starts afresh
    passes 0. Each line is flushed as it is written. NaN stays NaN: a diverged loss must be visible.
    On other hosts than the first it does nothing.
    """

    def __init__(self, directory: str | os.PathLike, resume_step: int | None = None):
        self._file = self._tensorboard = None
        if not hosts.is_first():
            return
        # Imported here because only the process that writes needs it.
        from tensorboardX import SummaryWriter

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / FILE_NAME
        if path.exists():
            _drop_rows_after(path, resume_step)
        self._file = path.open("a", encoding="ascii")
        purge_step = None if resume_step is None else resume_step + 1
        self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row {"step": step, **metrics}; values are anything float() takes."""
        if self._file is None:
            return
        row = {name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({**row, "step": int(step)}, sort_keys=True) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._tensorboard.add_scalar(name, value, int(step))

    def close(self) -> None:
        """Flushes and closes both files; a second call does nothing."""
        if self._file is not None and not self._file.closed:
            self._file.close()
            self._tensorboard.close()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _drop_rows_after(path: Path, resume_step: int | None) -> None:
    rows = read_metrics(path)
    kept = [row for row in rows if resume_step is None or row.get("step", 0) <= resume_step]
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in kept)
    write_bytes_atomic(path, text.encode("ascii"))
