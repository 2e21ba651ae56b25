"""Grain pipelines over host records: shuffled per epoch, sharded over hosts, batched, resumable.

`get_state` / `set_state` of every iterator here are exact, at any batch. Leaves out tokenisation and
prefetching: rollouts take longer than reading.
"""

from collections.abc import Sequence
from typing import Any, Literal

import grain

from sdzero_jax.errors import UserError

Remainder = Literal["drop", "pad"]


def shuffled_batches(records: Sequence[Any], batch_size: int, seed: int) -> grain.DatasetIterator:
    """An endless iterator over lists of `batch_size` records, each epoch in an order of its own.

    `get_state` / `set_state` of the result are exact. A batch may span two epochs.
    """
    if batch_size < 1 or not records:
        raise UserError(f"a batch of {batch_size} from {len(records)} records; both must be at least 1")
    # Practically endless: grain's own endless repeat overflows with batches of one.
    epochs = 2**48 // len(records)
    dataset = grain.MapDataset.source(records).seed(seed).shuffle().repeat(epochs)
    dataset = dataset.batch(batch_size, batch_fn=list)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


class _Padding:
    """Stands for a record that is not there (grain takes None for a record that was filtered out)."""


def epoch_batches(
    records: Sequence[Any],
    batch_size: int,
    seed: int,
    *,
    remainder: Remainder,
    epochs: int | None = None,
    shuffle: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """An iterator over lists of `batch_size` records of one host; no batch spans two epochs.

    All hosts see the same order and take every `process_count`-th record of it, and all see equally many
    batches, so that none waits for another: what does not fill a batch on every host is dropped (other
    records each epoch), or filled up with None.

    Args:
      records: anything with a length and random access, such as a prepared split; the same on all hosts.
      batch_size: records per batch and host.
      seed: of the order; each epoch has its own.
      remainder: "drop" or "pad".
      epochs: None is practically endless.
      shuffle: False keeps the order of `records`.
      process_index, process_count: this host among all, e.g. jax.process_index(), jax.process_count().
    Raises: UserError for sizes that give no batch.
    """
    if batch_size < 1 or not len(records):
        raise UserError(f"a batch of {batch_size} from {len(records)} records; both must be at least 1")
    if not 0 <= process_index < process_count:
        raise UserError(f"host {process_index} of {process_count}; wanted 0 to {process_count - 1}")
    if remainder not in ("drop", "pad"):
        raise UserError(f"remainder={remainder!r}; choose from drop, pad")
    per_round = batch_size * process_count
    whole = len(records) // per_round * per_round
    if remainder == "drop" and not whole:
        raise UserError(f"{len(records)} records do not fill {process_count} batches of {batch_size}; pad them")
    dataset = grain.MapDataset.source(records).seed(seed)
    dataset = dataset.shuffle() if shuffle else dataset
    if remainder == "drop":
        dataset = dataset[:whole]
    elif missing := -len(records) % per_round:
        dataset = grain.MapDataset.concatenate([dataset, grain.MapDataset.source([_Padding] * missing)])
    dataset = dataset[process_index::process_count]
    dataset = dataset.batch(batch_size, batch_fn=_with_none)
    dataset = dataset.repeat(2**48 // len(records) if epochs is None else epochs)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))


def _with_none(records: Sequence[Any]) -> list[Any]:
    return [None if record is _Padding else record for record in records]
