"""Packing of training sequences into rows of one length, with segment ids: first-fit decreasing.

Only for objectives that read scored sequences (SFT, RFT, SRT): rows hold several sequences that must not
attend to each other. Leaves out cutting: a sequence that does not fit is the caller's mistake.
"""

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np

_log = logging.getLogger(__name__)


class Scored(Protocol):
    """A token sequence and the weight of each token as a target; the first weight is 0."""

    tokens: Sequence[int]
    weights: Sequence[float]


def first_fit_decreasing(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Deals sequences into rows: the longest first, each into the first row with room.

    Args:
      lengths: tokens of each sequence.
      row_length: tokens of a row.
    Returns: indices of the sequences in each row. Equal lengths keep their order, so that the result is a
      function of the input; at most 11/9 of the fewest possible rows, plus one (Johnson, 1973).
    Raises: ValueError for a sequence that is empty or longer than a row.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= row_length:
            raise ValueError(f"sequence {index} has {length} tokens; wanted 1 to {row_length}")
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    # room[node]: the most room in any row below; rows are the leaves, all empty at first.
    room = [row_length] * (2 * leaves)
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        node = 1
        while node < leaves:
            node = 2 * node if room[2 * node] >= lengths[index] else 2 * node + 1
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        room[node] -= lengths[index]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def utilisation(lengths: Sequence[int], rows: int, row_length: int) -> float:
    """Share of the positions of `rows` rows that hold a token."""
    return sum(lengths) / (rows * row_length) if rows else 0.0


def packed_batch(sequences: Sequence[Scored], row_length: int, *, rows: int | None = None) -> dict[str, np.ndarray]:
    """Sequences packed into one scored-sequence batch; its utilisation is logged.

    Args:
      sequences: what to pack; their first weight must be 0, since nothing before it predicts it.
      row_length: L.
      rows: B, for one static shape; rows that stay empty are padding. None takes as many as needed.
    Returns: tokens, positions, segment_ids [B, L] int32 (positions start at 0 in every segment; segments
      count from 1, padding is 0); index, target_ids [B, L-1] int32 and weights [B, L-1] float32, where the
      output at position `index` predicts `target_ids`.
    Raises: ValueError when a sequence does not fit or more than `rows` rows are needed.
    """
    lengths = [len(sequence.tokens) for sequence in sequences]
    packs = first_fit_decreasing(lengths, row_length)
    count = len(packs) if rows is None else rows
    if len(packs) > count:
        raise ValueError(f"{len(sequences)} sequences need {len(packs)} rows of {row_length}; there are {count}")
    _log.info(
        "packed %d sequences into %d rows of %d tokens, utilisation %.3f (unpacked %.3f)",
        len(sequences), count, row_length,
        utilisation(lengths, count, row_length), utilisation(lengths, len(lengths), row_length),
    )  # fmt: skip
    shape = (count, row_length)
    tokens, positions, segments = (np.zeros(shape, np.int32) for _ in range(3))
    token_weights = np.zeros(shape, np.float32)
    for row, pack in enumerate(packs):
        start = 0
        for segment, index in enumerate(pack, start=1):
            sequence = sequences[index]
            if sequence.weights[0] != 0:
                raise ValueError("the first token of a sequence has nothing before it and cannot be a target")
            place = slice(start, start + lengths[index])
            tokens[row, place] = sequence.tokens
            token_weights[row, place] = sequence.weights
            positions[row, place] = np.arange(lengths[index])
            segments[row, place] = segment
            start = place.stop
    index = np.broadcast_to(np.arange(row_length - 1, dtype=np.int32), (count, row_length - 1)).copy()
    # The first weight of a segment is 0, so that no position predicts across a border.
    return {
        "tokens": tokens,
        "positions": positions,
        "segment_ids": segments,
        "index": index,
        "target_ids": tokens[:, 1:].copy(),
        "weights": token_weights[:, 1:].copy(),
    }


def packed_groups(sequences: Sequence[Scored], row_length: int, rows: int) -> list[list[Scored]]:
    """Splits sequences into groups whose `packed_batch` fills `rows` rows (the last one maybe fewer).

    All sequences are packed at once and full rows are dealt out, so that utilisation does not suffer
    from small groups. Within a group the sequences repack into the same rows.
    """
    packs = first_fit_decreasing([len(sequence.tokens) for sequence in sequences], row_length)
    return [
        [sequences[index] for pack in packs[start : start + rows] for index in pack]
        for start in range(0, len(packs), rows)
    ]
