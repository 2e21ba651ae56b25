"""Grain pipelines over host records: shuffled per epoch, repeated, batched, resumable."""

from collections.abc import Sequence
from typing import Any

import grain

from sdzero_jax.errors import UserError


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
