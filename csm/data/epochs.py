"""The rows of every epoch: a function of (seed, epoch) and the corpus alone, never of ranks, workers or where a run stopped.

So any position in training is found again from two numbers.

With weights, an epoch is as long as the corpus that is shortest of its share needs: the one that would last longest at its
weight is seen once, document by document; every other gives its share by being seen more often. Passes over a corpus run
on across epochs (an epoch that ends in the middle of one is followed by its second half), each in another order. Rows hold
documents of one corpus, and rows of all corpora are strewn evenly over the epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from csm.data.packing import Documents, pack_best_fit

# Documents shuffled and packed together: whole shards are added to a group until it holds this many. A group bounds both
# the reach of random reads (page cache) and the memory of packing; 65 536 one-minute conversations are about 3 GB of codes.
GROUP_DOCUMENTS = 65_536


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


@dataclass(frozen=True)
class Part:
    """A corpus in a mix.

    Attributes:
        first, last: its documents [first, last).
        num_visits: documents of it that an epoch takes; more than it has when it is repeated.
    """

    first: int
    last: int
    num_visits: int


def mix_parts(documents: Documents, starts: Sequence[int], weights: Sequence[float]) -> list[Part]:
    """How often each corpus is visited in an epoch, so that its positions are the share its weight says.

    Args:
        starts: [num_corpora + 1], documents [starts[i], starts[i + 1]) are corpus i's.
        weights: [num_corpora], their sum 1.
    Raises:
        ValueError: a corpus has no document.
    """
    positions = [int(documents.length[first:last].sum()) for first, last in zip(starts, starts[1:], strict=False)]
    if not all(positions):
        raise ValueError(f"corpus {positions.index(0)} of data.path has no conversation that can be used; take it and its weight out")
    total = max(length / weight for length, weight in zip(positions, weights, strict=True))
    parts = []
    for first, last, length, weight in zip(starts, starts[1:], positions, weights, strict=False):
        parts.append(Part(first, last, max(1, round((last - first) * (total * weight / length)))))
    return parts


def plan_epoch(
    documents: Documents, shard_of_sample: np.ndarray, seq_len: int, seed: int, epoch: int, parts: Sequence[Part] = ()
) -> EpochPlan:
    """The rows of an epoch, in an order that (seed, epoch) decides alone; without `parts`, every document once.

    Shards are shuffled and gathered into groups; inside a group documents are shuffled, packed, and the rows shuffled again
    (packing leaves them sorted by length).

    Args:
        shard_of_sample: [num_samples] int, ascending.
        parts: the corpora of a mix.
    """
    shard_of_document = shard_of_sample[documents.sample]
    if not parts:
        rows: list[np.ndarray] = []
        for group, members in enumerate(_groups(shard_of_document, seed, epoch)):
            members = members[_permutation(len(members), seed, epoch, 1, group)]
            rows += _packed(documents, members, seq_len, (seed, epoch, 2, group))
        return _plan(rows, documents.num_positions, seq_len)
    rows, places = [], []
    for corpus, part in enumerate(parts, start=1):
        own: list[np.ndarray] = []
        for group, members in enumerate(_visited(shard_of_document[part.first : part.last], part.num_visits, seed, epoch, corpus)):
            own += _packed(documents, members + part.first, seq_len, (seed, epoch, 2, group, corpus))
        # row j of n lies somewhere in the j-th n-th of the epoch: any stretch of it holds the mix
        places.append((np.arange(len(own)) + _uniform(len(own), seed, epoch, 3, 0, corpus)) / len(own))
        rows += own
    order = np.argsort(np.concatenate(places), kind="stable")
    rows = [rows[row] for row in order.tolist()]
    return _plan(rows, sum(int(documents.length[row].sum()) for row in rows), seq_len)


def _plan(rows: list[np.ndarray], num_positions: int, seq_len: int) -> EpochPlan:
    starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return EpochPlan(flat.astype(np.int64), starts, num_positions, seq_len)


def _packed(documents: Documents, members: np.ndarray, seq_len: int, key: tuple[int, ...]) -> list[np.ndarray]:
    """Rows of documents, shuffled."""
    packed = pack_best_fit(documents.length[members], seq_len)
    return [members[packed[row]] for row in _permutation(len(packed), *key).tolist()]


def _visited(shard_of_document: np.ndarray, num_visits: int, seed: int, epoch: int, corpus: int) -> Iterator[np.ndarray]:
    """The documents of a corpus that an epoch takes, in its order, about GROUP_DOCUMENTS at a time.

    Passes over the corpus follow one another without end; epoch e takes the e-th `num_visits` of them.
    """
    size = len(shard_of_document)
    start = epoch * num_visits
    gathered: list[np.ndarray] = []
    for number in range(start // size, (start + num_visits - 1) // size + 1):
        place = number * size  # of the pass, counted from the first epoch's first document
        for group, members in enumerate(_groups(shard_of_document, seed, number, corpus)):
            first, last = max(start - place, 0), min(start + num_visits - place, len(members))
            place += len(members)
            if first < last:
                gathered.append(members[_permutation(len(members), seed, number, 1, group, corpus)][first:last])
            if sum(map(len, gathered)) >= GROUP_DOCUMENTS:
                yield np.concatenate(gathered)
                gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _groups(shard_of_document: np.ndarray, seed: int, epoch: int, *corpus: int) -> Iterator[np.ndarray]:
    """Documents of whole shards, the shards shuffled, about GROUP_DOCUMENTS at a time."""
    shards, firsts = np.unique(shard_of_document, return_index=True)  # ascending: documents lie in sample order
    lasts = np.append(firsts[1:], len(shard_of_document))
    gathered: list[np.ndarray] = []
    for position in _permutation(len(shards), seed, epoch, 0, 0, *corpus).tolist():
        gathered.append(np.arange(firsts[position], lasts[position]))
        if sum(map(len, gathered)) >= GROUP_DOCUMENTS:
            yield np.concatenate(gathered)
            gathered = []
    if gathered:
        yield np.concatenate(gathered)


def _permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of `size` that the key decides: raw Philox words, sorted, as numpy promises their stream for good."""
    return np.argsort(_words(size, *key), kind="stable")


def _uniform(size: int, *key: int) -> np.ndarray:
    """float64 numbers in [0, 1) that the key decides."""
    return (_words(size, *key) >> np.uint64(11)) * 2.0**-53


def _words(size: int, *key: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence([part & 0xFFFF_FFFF_FFFF_FFFF for part in key])).random_raw(size)
