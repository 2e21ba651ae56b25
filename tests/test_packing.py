"""Packing: every token once, nothing across a border, few rows; the same loss as unpacked rows."""

import itertools
import logging
import random
import types

import numpy as np
import pytest

from sdzero_jax.batches import response_sequence, sequence_batch
from sdzero_jax.data import first_fit_decreasing, packed_batch, packed_groups, utilisation


def naive_first_fit_decreasing(lengths, row_length):
    """The textbook's loop."""
    rows, room = [], []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((row for row, free in enumerate(room) if free >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(row_length)
        rows[row].append(index)
        room[row] -= lengths[index]
    return rows


def test_by_hand():
    assert first_fit_decreasing([3, 7, 5, 2, 3], 10) == [[1, 0], [2, 4, 3]]
    assert first_fit_decreasing([], 10) == []
    assert first_fit_decreasing([10], 10) == [[0]]
    assert utilisation([3, 7, 5, 2, 3], 2, 10) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_like_the_naive_loop(seed):
    rng = random.Random(seed)
    row_length = rng.randrange(1, 60)
    lengths = [rng.randrange(1, row_length + 1) for _ in range(rng.randrange(1, 300))]
    rows = first_fit_decreasing(lengths, row_length)
    assert rows == naive_first_fit_decreasing(lengths, row_length)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))


def test_many_sequences_are_packed_quickly_and_well():
    rng = random.Random(0)
    lengths = [rng.randrange(100, 3000) for _ in range(50_000)]
    rows = first_fit_decreasing(lengths, 8192)
    assert utilisation(lengths, len(rows), 8192) > 0.99


@pytest.mark.parametrize("length", [0, 11])
def test_what_does_not_fit_is_refused(length):
    with pytest.raises(ValueError, match=f"sequence 1 has {length} tokens; wanted 1 to 10"):
        first_fit_decreasing([5, length], 10)


def random_sequences(count, longest, seed):
    rng = random.Random(seed)
    pieces = [
        [[rng.randrange(1, 50) for _ in range(rng.randrange(1, longest // 2))] for _ in range(2)] for _ in range(count)
    ]
    return [response_sequence(prompt, response) for prompt, response in pieces]


def targets(batch):
    """(a segment's tokens up to and with the target, weight) of every weighted target."""
    found = []
    for row in range(batch["tokens"].shape[0]):
        for place in np.flatnonzero(batch["weights"][row]):
            at = batch["index"][row, place]
            segment = batch["segment_ids"][row]
            assert segment[at] == segment[at + 1] != 0  # no prediction across a border
            assert batch["target_ids"][row, place] == batch["tokens"][row, at + 1]
            start = at - batch["positions"][row, at]
            assert (segment[start : at + 2] == segment[at]).all()
            tokens = tuple(batch["tokens"][row, start : at + 2].tolist())
            found.append((tokens, float(batch["weights"][row, place])))
    return sorted(found)


def test_a_packed_batch_asks_for_the_same_targets_as_unpacked_rows(caplog):
    sequences = random_sequences(40, 24, seed=1)
    with caplog.at_level(logging.INFO, logger="sdzero_jax.data.packing"):
        packed = packed_batch(sequences, 32)
    unpacked = sequence_batch(sequences, 32)
    assert targets(packed) == targets(unpacked)
    assert {name: array.dtype for name, array in packed.items()} == {n: a.dtype for n, a in unpacked.items()}
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    assert (packed["segment_ids"] > 0).sum() == tokens
    share = tokens / packed["tokens"].size
    assert share > 0.9 and f"utilisation {share:.3f}" in caplog.text


def test_positions_restart_and_padding_is_segment_zero():
    one, two = response_sequence([1, 2], [3, 4]), response_sequence([5], [6, 7])
    batch = packed_batch([one, two], 8, rows=2)
    np.testing.assert_array_equal(batch["tokens"], [[1, 2, 3, 4, 5, 6, 7, 0], [0] * 8])
    np.testing.assert_array_equal(batch["positions"], [[0, 1, 2, 3, 0, 1, 2, 0], [0] * 8])
    np.testing.assert_array_equal(batch["segment_ids"], [[1, 1, 1, 1, 2, 2, 2, 0], [0] * 8])
    np.testing.assert_array_equal(batch["weights"], [[0, 1, 1, 0, 1, 1, 0], [0] * 7])
    np.testing.assert_array_equal(batch["target_ids"][0], [2, 3, 4, 5, 6, 7, 0])


def test_too_few_rows_and_a_weighted_first_token_are_refused():
    with pytest.raises(ValueError, match="need 2 rows of 4; there are 1"):
        packed_batch([response_sequence([1], [2, 3])] * 2, 4, rows=1)
    with pytest.raises(ValueError, match="cannot be a target"):
        packed_batch([types.SimpleNamespace(tokens=(1, 2), weights=(1.0, 1.0))], 4)


def test_groups_fill_static_batches():
    sequences = random_sequences(100, 24, seed=2)
    groups = packed_groups(sequences, 32, rows=4)
    assert sorted(s.tokens for group in groups for s in group) == sorted(s.tokens for s in sequences)
    whole = len(first_fit_decreasing([len(s.tokens) for s in sequences], 32))
    assert len(groups) == -(-whole // 4)
    for group in groups:
        assert packed_batch(group, 32, rows=4)["tokens"].shape == (4, 32)
