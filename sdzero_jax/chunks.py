"""An append-only JSON-lines file written in chunks, the unit of restart of sampling stages.

A chunk's records are followed by a closing record that carries its counts. A chunk without
one was cut by a crash: it is dropped and made again, with the same random numbers.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from sdzero_jax import hosts, signals, stores
from sdzero_jax.errors import Stopped
from sdzero_jax.files import append_jsonl, jsonl, read_jsonl_repaired, write_bytes_atomic
from sdzero_jax.progress import Progress, say

T = TypeVar("T")
Records = Sequence[Mapping[str, Any]]


class ChunkLog:
    """Chunks of records in `path`; opening it drops what follows the last whole chunk."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.records: list[dict[str, Any]]
        self.closings: list[dict[str, Any]]
        self.records, self.closings = hosts.from_first(self._read)

    def _read(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if not self._path.exists():
            return [], []
        size = self._path.stat().st_size
        lines, _ = read_jsonl_repaired(self._path)
        cut = self._path.stat().st_size < size
        ends = [number for number, line in enumerate(lines) if "closes" in line]
        whole = lines[: ends[-1] + 1] if ends else []
        if cut or len(whole) < len(lines):
            say(f"{self._path}: the last chunk was half written; it is made again")
            write_bytes_atomic(self._path, jsonl(whole))
        return [line for line in whole if "closes" not in line], [line for line in whole if "closes" in line]

    @property
    def done(self) -> int:
        """Number of whole chunks."""
        return len(self.closings)

    def append(self, records: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> None:
        """Writes the next chunk in one append."""
        closing = {"closes": self.done, **counts}
        append_jsonl(self._path, [*records, closing])
        stores.push(self._path)
        self.records += [dict(record) for record in records]
        self.closings.append(closing)


def fill(
    log: ChunkLog,
    name: str,
    items: Sequence[T],
    size: int,
    make: Callable[[int, Sequence[T]], tuple[Records, Mapping[str, Any]]],
    figures: Callable[[], Mapping[str, float]],
) -> None:
    """Makes the chunks of `items` that `log` lacks, `size` items each, with progress under `name`.

    Args:
      make: (number of the chunk, its items) -> (records, counts of its closing record).
      figures: what the progress line shows after a chunk.
    Raises Stopped on a signal; a chunk that was begun is made again.
    """
    starts = range(0, len(items), size)
    with Progress(name, len(items), min(log.done * size, len(items)), "q") as bar:
        for number in range(log.done, len(starts)):
            written = f"{name}: {number} of {len(starts)} chunks are written"
            if signum := signals.requested():
                raise Stopped(signum, written)
            part = items[starts[number] : starts[number] + size]
            try:
                records, counts = make(number, part)
            except Stopped as stop:
                raise Stopped(stop.signum, written) from None
            log.append(records, counts)
            bar.update(len(part), figures())
