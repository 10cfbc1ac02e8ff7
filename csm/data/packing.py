"""Cuts conversations into documents that fit a row, and lays documents into rows.

A document is a whole conversation, or a run of its turns when the whole does not fit a row. Numpy only; which documents an
epoch takes, and in which order, is `epochs`' job.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BAD = -1  # in a lengths table: this sample could not be read


@dataclass(frozen=True)
class Documents:
    """What can be laid into rows: runs of turns, at most `seq_len` positions each.

    Attributes:
        sample: [M] int32.
        first_turn, last_turn: [M] int32, the turns [first, last) of the sample.
        length: [M] int32, positions.
        num_cut: conversations that were cut at turn boundaries.
        num_too_long: turns left out, longer than a row by themselves.
    """

    sample: np.ndarray
    first_turn: np.ndarray
    last_turn: np.ndarray
    length: np.ndarray
    num_cut: int
    num_too_long: int

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def num_positions(self) -> int:
        return int(self.length.sum())


def cut_documents(turns: np.ndarray, seq_len: int) -> Documents:
    """Cut conversations into documents that fit a row, only where they must be cut.

    A conversation that is too long is cut at turn boundaries, greedily from its start; a turn that is too long by itself
    is left out, and what follows it is a document of its own.

    Args:
        turns: [num_turns, 3], as `measure_turns` gives it.
        seq_len: positions of a row.
    """
    turns = turns[turns[:, 1] != BAD]
    if not len(turns):
        empty = np.zeros(0, dtype=np.int32)
        return Documents(empty, empty, empty, empty, 0, 0)
    lengths = turns[:, 1].astype(np.int64) + turns[:, 2]
    starts = np.flatnonzero(np.diff(turns[:, 0], prepend=-1))  # where each sample's turns begin
    stops = np.append(starts[1:], len(turns))
    totals = np.add.reduceat(lengths, starts)
    fits = totals <= seq_len
    cut: list[tuple[int, int, int, int]] = []  # rare: most conversations fit
    num_too_long = 0
    for start, stop in zip(starts[~fits].tolist(), stops[~fits].tolist(), strict=True):
        pieces, left_out = _cut_turns(lengths[start:stop].tolist(), seq_len)
        cut += [(int(turns[start, 0]), *piece) for piece in pieces]
        num_too_long += left_out
    whole = np.stack([turns[starts[fits], 0], np.zeros(fits.sum(), np.int64), (stops - starts)[fits], totals[fits]], axis=1)
    table = np.concatenate([whole, np.array(cut, dtype=np.int64).reshape(-1, 4)])
    table = table[np.lexsort((table[:, 1], table[:, 0]))].astype(np.int32)
    return Documents(table[:, 0], table[:, 1], table[:, 2], table[:, 3], int((~fits).sum()), num_too_long)


def _cut_turns(lengths: list[int], seq_len: int) -> tuple[list[tuple[int, int, int]], int]:
    """Pieces (first turn, last turn, length) of one conversation, and how many turns had to go."""
    pieces: list[tuple[int, int, int]] = []
    first, length, num_too_long = 0, 0, 0
    for turn, turn_length in enumerate(lengths):
        is_too_long = turn_length > seq_len
        if length and (is_too_long or length + turn_length > seq_len):
            pieces.append((first, turn, length))
            length = 0
        if is_too_long:
            num_too_long += 1
            continue
        if not length:
            first = turn
        length += turn_length
    if length:
        pieces.append((first, len(lengths), length))
    return pieces, num_too_long


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Lay documents into rows of `seq_len` positions, longest first, each into the fullest row that still has room.

    Best-fit decreasing; a bit set of the rooms on offer finds that row in a few machine operations. Equal lengths keep
    their order, so shuffling the documents shuffles the rows.

    Args:
        lengths: [n], each in [1, seq_len].
    Returns:
        For each row, the documents in it.
    """
    order = np.argsort(-lengths, kind="stable")
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
    offered = 0  # bit r: some row has exactly r positions left
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = offered >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with_room[room].pop()
            rows[row].append(document)
            if not rows_with_room[room]:
                offered &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append([document])
        left = room - length
        if left:
            rows_with_room[left].append(row)
            offered |= 1 << left
    return rows
