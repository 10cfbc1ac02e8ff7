"""Decides what goes where: how long each turn is, which documents a split gives, and the rows of every epoch.

A document is a whole conversation, or a run of its turns when the whole does not fit a row. The plan of an epoch is a
function of (seed, epoch) and the corpus alone, never of ranks, workers or the place where a run stopped, so any
position in training is found again from two numbers. Numpy only; reading and tensors are left to `loader`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from csm.data.shards import BadSamples, ShardIndex, ShardReader
from csm.text import TextTokenizer

LENGTHS_VERSION = 1
# Documents shuffled and packed together: whole shards are added to a group until it holds this many. A group bounds both
# the reach of random reads (page cache) and the memory of packing; 65 536 one-minute conversations are about 3 GB of codes.
GROUP_DOCUMENTS = 65_536
BAD = -1  # in a lengths table: this sample could not be read

_log = logging.getLogger(__name__)


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """sha256 (16 hex) of a tokenizer's settings: equal digests cut text into equally many ids."""
    return hashlib.sha256(json.dumps(tokenizer.settings(), sort_keys=True).encode()).hexdigest()[:16]


def measure_turns(reader: ShardReader, tokenizer: TextTokenizer, bad: BadSamples) -> np.ndarray:
    """The length of every turn of every sample, from a file beside the shards where that was done before.

    The first time, each sample's JSON is read and its text is cut into ids (about 35k samples a CPU-second with the word
    tokenizer); after that it is one small file a folder, `lengths-<digest>.npy`, written atomically, or not at all when
    the folder cannot be written.

    Returns:
        [num_turns, 3] int32: sample, text ids, audio rows (frames and the EOS row), in sample order. A bad sample has one entry
        whose lengths are `BAD`; it is counted in `bad`.
    """
    tables, first = [], 0
    for index in reader.indexes:
        path = _lengths_path(index, tokenizer)
        table = _load_lengths(path)
        if table is None:
            table = _measure(reader, range(first, first + index.num_samples), tokenizer, bad)
            _save_lengths(path, table)
        else:
            for sample_index in table[table[:, 1] == BAD, 0].tolist():
                bad.add(first + sample_index, f"sample {reader.keys[first + sample_index]} was bad before; delete {path} to try it again")
        table = table.copy()
        table[:, 0] += first
        tables.append(table)
        first += index.num_samples
    return np.concatenate(tables)


def _lengths_path(index: ShardIndex, tokenizer: TextTokenizer) -> Path:
    told = f"{LENGTHS_VERSION} {index.digest} {tokenizer_digest(tokenizer)}"
    return index.folder / f"lengths-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npy"


def _load_lengths(path: Path) -> np.ndarray | None:
    if not path.is_file():
        return None
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        _log.warning("%s: %s; measuring again", path, error)
        return None
    return table if table.ndim == 2 and table.shape[1] == 3 and table.dtype == np.int32 else None


def _save_lengths(path: Path, table: np.ndarray) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # ranks may measure at once: each writes its own, the last rename wins
    try:
        with part.open("wb") as file:
            np.save(file, table, allow_pickle=False)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        _log.info("lengths are not kept: %s", error)


def _measure(reader: ShardReader, samples: range, tokenizer: TextTokenizer, bad: BadSamples) -> np.ndarray:
    @lru_cache(maxsize=1 << 16)
    def num_text_ids(speaker: int, text: str) -> int:
        return len(tokenizer.encode_turn(speaker, text))

    rows: list[tuple[int, int, int]] = []
    for sample_index in samples:
        try:
            _, turns = reader.read_turns(sample_index)
            sample_rows = []
            for turn in turns:
                first, last = turn["frames"]
                sample_rows.append((sample_index - samples.start, num_text_ids(int(turn["speaker"]), turn["text"]), last - first + 1))
            rows += sample_rows
        except (ValueError, KeyError, TypeError) as error:
            bad.add(sample_index, f"sample {reader.keys[sample_index]}: {error}")
            rows.append((sample_index - samples.start, BAD, BAD))
    return np.array(rows, dtype=np.int32).reshape(-1, 3)


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


@dataclass(frozen=True)
class EpochPlan:
    """Every row of one epoch, in order.

    Attributes:
        documents: [M] int64, the documents of all rows, row after row.
        row_starts: [num_rows + 1] int64, into `documents`.
        num_positions: that the documents take, of num_rows * seq_len.
    """

    documents: np.ndarray
    row_starts: np.ndarray
    num_positions: int
    seq_len: int

    @property
    def num_rows(self) -> int:
        return len(self.row_starts) - 1

    @property
    def useful_share(self) -> float:
        """Share of positions that are not padding."""
        return self.num_positions / max(1, self.num_rows * self.seq_len)

    def row(self, row_index: int) -> list[int]:
        """The documents of one row."""
        return self.documents[self.row_starts[row_index] : self.row_starts[row_index + 1]].tolist()


def plan_epoch(documents: Documents, shard_of_sample: np.ndarray, seq_len: int, seed: int, epoch: int) -> EpochPlan:
    """The rows of an epoch: every document once, in an order that (seed, epoch) decides alone.

    Shards are shuffled and gathered into groups; inside a group documents are shuffled, packed, and the rows shuffled again
    (packing leaves them sorted by length).

    Args:
        shard_of_sample: [num_samples] int, ascending.
    """
    shard_of_document = shard_of_sample[documents.sample]
    rows: list[np.ndarray] = []
    for group, members in enumerate(_groups(shard_of_document, seed, epoch)):
        members = members[_permutation(len(members), seed, epoch, 1, group)]
        packed = pack_best_fit(documents.length[members], seq_len)
        rows += [members[packed[row]] for row in _permutation(len(packed), seed, epoch, 2, group).tolist()]
    starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return EpochPlan(flat.astype(np.int64), starts, documents.num_positions, seq_len)


def _groups(shard_of_document: np.ndarray, seed: int, epoch: int) -> Iterator[np.ndarray]:
    """Documents of whole shards, the shards shuffled, about GROUP_DOCUMENTS at a time."""
    shards, firsts = np.unique(shard_of_document, return_index=True)  # ascending: documents lie in sample order
    lasts = np.append(firsts[1:], len(shard_of_document))
    gathered: list[np.ndarray] = []
    for position in _permutation(len(shards), seed, epoch, 0, 0).tolist():
        gathered.append(np.arange(firsts[position], lasts[position]))
        if sum(map(len, gathered)) >= GROUP_DOCUMENTS:
            yield np.concatenate(gathered)
            gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of `size` that the key decides: raw Philox words, sorted, as numpy promises their stream for good."""
    words = np.random.Philox(np.random.SeedSequence([part & 0xFFFF_FFFF_FFFF_FFFF for part in key])).random_raw(size)
    return np.argsort(words, kind="stable")
