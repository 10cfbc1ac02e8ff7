"""Builds batches from a plan, and remembers where training is: everything of the data pipeline that is not Lightning.

A source knows the rows of each epoch and builds any of them; a loader walks over them. Only the process that trains
keeps the position, two numbers, so a run goes on at once, on another number of ranks or workers if need be.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from csm.config import DataConfig, ModelConfig
from csm.data.packing import Documents, EpochPlan, cut_documents, measure_turns, plan_epoch, tokenizer_digest
from csm.data.shards import BadSamples, ShardReader
from csm.frames import PADDING_DOCUMENT, Batch, Rows, audio_rows, rows_from_turns, text_rows
from csm.text import TextTokenizer

CACHE_BYTES = 2**30  # a split whose rows fit in this, all workers together, is decoded once and kept in memory
ROWS_PER_RANDOM_EPOCH = 65_536  # made-up rows have no end: this many are called an epoch
NUM_RANDOM_VALIDATION_ROWS = 32
# The validation order is the same in every run, whatever its seed, so that validation losses compare across runs.
VALIDATION_SEED = 0

_log = logging.getLogger(__name__)
Bad = list[tuple[int, str]]  # samples that could not be used, and why


class RowSource(Protocol):
    """Rows of one split: how many an epoch has, and any of them on request. Pickled to workers."""

    seq_len: int
    num_codebooks: int

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the order of rows depends on, besides the seed."""
        ...

    @property
    def bad(self) -> BadSamples | None:
        """Counts what `build` could not use; None where nothing can be bad."""
        ...

    def plan(self, seed: int, epoch: int) -> Plan:
        """The rows of an epoch."""
        ...

    def build(self, rows: Sequence[list[int]]) -> tuple[Batch, Bad]:
        """A batch of rows [len(rows), seq_len], and the samples that are missing from it because they are bad."""
        ...


class Plan(Protocol):
    """What a loader needs of an epoch."""

    @property
    def num_rows(self) -> int: ...

    def row(self, row_index: int) -> list[int]:
        """What `RowSource.build` needs to know of a row."""
        ...


def empty_batch(num_rows: int, seq_len: int, num_codebooks: int) -> Batch:
    """Rows [num_rows, seq_len] of padding: no document, no target."""
    size = (num_rows, seq_len)
    return Batch(
        tokens=torch.zeros(*size, num_codebooks + 1, dtype=torch.int64),
        mask=torch.zeros(*size, num_codebooks + 1, dtype=torch.bool),
        document_ids=torch.full(size, PADDING_DOCUMENT, dtype=torch.int64),
        learn_c0=torch.zeros(size, dtype=torch.bool),
        learn_depth=torch.zeros(size, dtype=torch.bool),
        keys=[],
    )


class ShardRows:
    """Packed rows of conversations read from shards.

    Args:
        reader: the split.
        copies: processes that will each hold a cache of their own.
    Raises:
        ValueError: too many bad samples, or no document that fits a row.
    """

    def __init__(self, reader: ShardReader, tokenizer: TextTokenizer, data: DataConfig, model: ModelConfig, copies: int = 1) -> None:
        self.reader, self.tokenizer = reader, tokenizer
        self.seq_len, self.num_codebooks, self.audio_vocab_size = data.seq_len, model.num_codebooks, model.audio_vocab_size
        self.bad = BadSamples(len(reader), data.max_bad_share)
        self.documents: Documents = cut_documents(measure_turns(reader, tokenizer, self.bad), data.seq_len)
        folders = ", ".join(str(index.folder) for index in reader.indexes)
        if not len(self.documents):
            raise ValueError(f"{folders}: none of {len(reader)} samples fits a row of data.seq_len={data.seq_len}; raise it")
        if self.documents.num_too_long:
            _log.warning("%s: left out %d turns longer than data.seq_len=%d", folders, self.documents.num_too_long, data.seq_len)
        self.fingerprint: dict[str, object] = {
            "index": "+".join(index.digest[:16] for index in reader.indexes),
            "tokenizer": tokenizer_digest(tokenizer),
            "seq_len": data.seq_len,
            "num_documents": len(self.documents),
        }
        self._cache = _RowCache.for_documents(self.documents, model, CACHE_BYTES // copies)

    def plan(self, seed: int, epoch: int) -> EpochPlan:
        return plan_epoch(self.documents, self.reader.shard, self.seq_len, seed, epoch)

    def build(self, rows: Sequence[list[int]]) -> tuple[Batch, Bad]:
        packed: list[list[Rows]] = []
        keys: list[str] = []
        bad: Bad = []
        for row in rows:
            packed.append([])
            for document in row:
                sample_index = int(self.documents.sample[document])
                if sample_index in self.bad.reasons:
                    continue
                try:
                    packed[-1].append(self._document(document, sample_index))
                    keys.append(self.reader.keys[sample_index])
                except ValueError as error:
                    bad.append((sample_index, str(error)))
        if not any(packed):
            return empty_batch(len(rows), self.seq_len, self.num_codebooks), bad
        return Batch.from_documents(packed, self.seq_len, keys), bad

    def _document(self, document: int, sample_index: int) -> Rows:
        cached = self._cache.get(document) if self._cache is not None else None
        if cached is not None:
            return cached
        turns = self.reader.read(sample_index).turns[self.documents.first_turn[document] : self.documents.last_turn[document]]
        key = self.reader.keys[sample_index]
        try:
            rows = rows_from_turns(turns, self.tokenizer, self.num_codebooks)
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from error
        smallest, largest = (int(code) for code in rows.tokens[:, :-1].aminmax())
        if smallest < 0 or largest >= self.audio_vocab_size:
            raise ValueError(
                f"sample {key}: codes from {smallest} to {largest}, the model takes 0 to {self.audio_vocab_size - 1}; "
                "set model.audio_vocab_size to the codec's"
            )
        if len(rows) != self.documents.length[document]:
            raise ValueError(f"sample {key}: {len(rows)} positions, not {self.documents.length[document]}; remove the old lengths-*.npy")
        if self._cache is not None:
            self._cache.put(document, rows)
        return rows


class _RowCache:
    """Decoded documents in a few flat arrays, small integers, filled as they are first read.

    One array for all documents and not an object for each: 100 000 documents of 80 positions are 240 MB this way. Memory
    is touched only where a document was put.
    """

    def __init__(self, documents: Documents, width: int, dtype: torch.dtype) -> None:
        self._starts = np.concatenate([[0], np.cumsum(documents.length, dtype=np.int64)])
        size = int(self._starts[-1])
        self._is_there = np.zeros(len(documents), dtype=bool)
        self._rows = Rows(
            tokens=torch.empty(size, width, dtype=dtype),
            mask=torch.empty(size, width, dtype=torch.bool),
            learn_c0=torch.empty(size, dtype=torch.bool),
            learn_depth=torch.empty(size, dtype=torch.bool),
        )

    @staticmethod
    def for_documents(documents: Documents, model: ModelConfig, max_bytes: int) -> _RowCache | None:
        """A cache, or None where the split is too large for `max_bytes`."""
        width = model.num_codebooks + 1
        is_small = max(model.text_vocab_size, model.audio_vocab_size) <= 2**15
        num_bytes = documents.num_positions * (width * (3 if is_small else 5) + 2)
        return _RowCache(documents, width, torch.int16 if is_small else torch.int32) if num_bytes <= max_bytes else None

    def get(self, document: int) -> Rows | None:
        return self._at(document) if self._is_there[document] else None

    def put(self, document: int, rows: Rows) -> None:
        place = self._at(document)
        for name in ("tokens", "mask", "learn_c0", "learn_depth"):
            getattr(place, name).copy_(getattr(rows, name))
        self._is_there[document] = True

    def _at(self, document: int) -> Rows:
        span = slice(int(self._starts[document]), int(self._starts[document + 1]))
        rows = self._rows
        return Rows(rows.tokens[span], rows.mask[span], rows.learn_c0[span], rows.learn_depth[span])


class _CountedRows:
    """The plan of a source without documents: row i of an epoch is (seed, epoch, i)."""

    def __init__(self, seed: int, epoch: int, num_rows: int) -> None:
        self.seed, self.epoch, self.num_rows = seed, epoch, num_rows

    def row(self, row_index: int) -> list[int]:
        return [self.seed, self.epoch, row_index]


class RandomRows:
    """Made-up conversations of the model's shape: for benchmarks, and for a first look at a model without data.

    Text ids and codes are uniform and never 0; rows are full, each holds one or more documents, every turn ends in EOS.

    Args:
        is_validation: make other rows than training sees, whatever its seed.
    """

    def __init__(self, data: DataConfig, model: ModelConfig, num_rows: int = ROWS_PER_RANDOM_EPOCH, *, is_validation: bool = False) -> None:
        if data.seq_len < 8:
            raise ValueError(f"data.seq_len={data.seq_len}: made-up rows need at least 8 positions")
        self.seq_len, self.num_codebooks, self.num_rows = data.seq_len, model.num_codebooks, num_rows
        self.bad = None
        self.key = [1] if is_validation else []
        self.text_vocab_size, self.audio_vocab_size = model.text_vocab_size, model.audio_vocab_size
        self.fingerprint: dict[str, object] = {"index": "random", "seq_len": data.seq_len, "num_codebooks": model.num_codebooks}

    def plan(self, seed: int, epoch: int) -> _CountedRows:
        return _CountedRows(seed, epoch, self.num_rows)

    def build(self, rows: Sequence[list[int]]) -> tuple[Batch, Bad]:
        return Batch.from_documents([self._row(*row) for row in rows], self.seq_len, [f"random-{row[1]}-{row[2]}" for row in rows]), []

    def _row(self, seed: int, epoch: int, row_index: int) -> list[Rows]:
        numbers = np.random.default_rng(
            np.random.Philox(np.random.SeedSequence([seed & 0xFFFF_FFFF_FFFF_FFFF, epoch, row_index, *self.key]))
        )
        documents = []
        left = self.seq_len
        while left:
            length = int(numbers.integers(8, 200))  # of a turn: some words, then up to 15 s of audio
            length = left if left - length < 8 else length
            num_text = max(3, length // 8)
            text_ids = numbers.integers(1, self.text_vocab_size, num_text)
            codes = numbers.integers(1, self.audio_vocab_size, (self.num_codebooks, length - num_text - 1))
            documents.append(Rows.concatenate([text_rows(text_ids.tolist(), self.num_codebooks), audio_rows(torch.from_numpy(codes))]))
            left -= length
        return documents


class _Built(Dataset):
    """Lets a DataLoader's workers build batches from the rows that its sampler names."""

    def __init__(self, source: RowSource) -> None:
        self.source = source

    def __getitem__(self, rows: list[list[int]]) -> tuple[Batch, Bad]:  # type: ignore[override]
        return self.source.build(rows)


def _as_is(built: Any) -> Any:
    return built


class TrainLoader:
    """Walks over epochs of a source, micro-batch by micro-batch, and can say and take up its position.

    An optimizer step takes `rows_per_batch * world_size * accumulate` rows, the next ones of the plan; every rank takes
    every world_size-th of them, and cuts its share into micro-batches. So a step sees the same rows on any number of
    ranks, as long as that product stays. Rows that do not fill a last step are left out of their epoch (and counted):
    which ones, the next epoch's shuffle changes.

    Iterating yields what is left of the epoch. The position moves before a batch is handed out, and past the end of the
    epoch before its last batch is, because Lightning may save a checkpoint while it still holds that batch.
    """

    def __init__(
        self,
        source: RowSource,
        *,
        seed: int,
        rows_per_batch: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: expected 0 to {world_size - 1}")
        self.source, self.seed = source, seed
        self.rows_per_batch, self.accumulate, self.rank, self.world_size = rows_per_batch, accumulate, rank, world_size
        self.num_workers = num_workers
        self.epoch, self._batch = 0, 0  # the next micro-batch of this rank
        self._plan: tuple[int, Plan] | None = None  # of the epoch asked for last
        self._steps: dict[int, int] = {}
        self._stream: Iterator[tuple[Batch, Bad]] | None = None
        self.steps_of(0)  # fail now when an epoch has no whole step

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_batch * self.world_size * self.accumulate

    def plan(self, epoch: int) -> Plan:
        """The rows of an epoch."""
        if self._plan is None or self._plan[0] != epoch:
            self._plan = epoch, self.source.plan(self.seed, epoch)
        return self._plan[1]

    def steps_of(self, epoch: int) -> int:
        """Whole optimizer steps in an epoch.

        Raises:
            ValueError: the epoch has fewer rows than a step takes.
        """
        if epoch not in self._steps:
            num_rows = self.plan(epoch).num_rows
            if num_rows < self.rows_per_step:
                raise ValueError(
                    f"epoch {epoch} has {num_rows} rows, one step takes {self.rows_per_step} (data.rows_per_batch={self.rows_per_batch} x "
                    f"{self.world_size} processes x trainer.accumulate={self.accumulate}); lower one of them, or give more data"
                )
            self._steps[epoch] = num_rows // self.rows_per_step
        return self._steps[epoch]

    def __len__(self) -> int:
        """Micro-batches in the whole of the epoch that comes next."""
        return self.steps_of(self.epoch) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.epoch
        while self.epoch == epoch:
            if self._stream is None:
                self._stream = self._open_stream()
            batch = _count_bad(self.source, *next(self._stream))
            self._batch += 1
            if self._batch == len(self):
                self.epoch, self._batch = self.epoch + 1, 0
            yield batch

    def state_dict(self) -> dict[str, object]:
        """Where training is: the steps of this epoch whose every micro-batch was handed out. The same on every rank."""
        fingerprint = {**self.source.fingerprint, "rows_per_step": self.rows_per_step}
        return {"epoch": self.epoch, "batch": self._batch // self.accumulate, "seed": self.seed, "fingerprint": fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a position, at once.

        With another number of rows a step the position is kept in rows, rounded down to a whole step.

        Raises:
            ValueError: the position belongs to another order of rows; says what differs.
        """
        got, own = dict(state["fingerprint"]), dict(self.source.fingerprint)
        got["seed"], own["seed"] = state["seed"], self.seed
        rows_per_step = got.pop("rows_per_step")
        differing = [f"{name} {got.get(name)!r}, now {own.get(name)!r}" for name in sorted({*got, *own}) if got.get(name) != own.get(name)]
        if differing:
            raise ValueError(
                f"the checkpoint's place in the data means another order: {'; '.join(differing)}. Resume with the data and settings it "
                "was saved with, or start a new run from its weights"
            )
        first_row = state["batch"] * rows_per_step
        self.epoch, step = state["epoch"], first_row // self.rows_per_step
        if rows_per_step != self.rows_per_step:
            again = first_row % self.rows_per_step
            _log.info("resuming with %d rows a step, not %d: %d rows are seen again", self.rows_per_step, rows_per_step, again)
        if step >= self.steps_of(self.epoch):
            self.epoch, step = self.epoch + 1, 0
        self._batch = step * self.accumulate
        self.close()

    def close(self) -> None:
        """Stop the workers, if any; the position stays."""
        self._stream = None

    def _open_stream(self) -> Iterator[tuple[Batch, Bad]]:
        """Built batches from the position on, without end; workers run ahead of it, in order."""
        rows = self._rows_from(self.epoch, self._batch)
        if self.num_workers == 0:
            return map(self.source.build, rows)
        loader = DataLoader(
            _Built(self.source),
            batch_size=None,
            sampler=rows,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            collate_fn=_as_is,
            generator=torch.Generator(),  # of its own: a DataLoader draws from the global one when it starts
        )
        return iter(loader)

    def _rows_from(self, epoch: int, batch: int) -> Iterator[list[list[int]]]:
        """The rows of one micro-batch of this rank after another."""
        while True:
            plan = self.plan(epoch)
            for batch_index in range(batch, self.steps_of(epoch) * self.accumulate):
                step, micro_batch = divmod(batch_index, self.accumulate)
                first = step * self.rows_per_step + micro_batch * self.rows_per_batch * self.world_size + self.rank
                yield [plan.row(row) for row in range(first, first + self.rows_per_batch * self.world_size, self.world_size)]
            epoch, batch = epoch + 1, 0


class ValidationLoader:
    """The same rows in the same order each time, spread over the ranks batch by batch.

    Every rank gets equally many batches; where they run out, a batch of padding (no targets) keeps the ranks in step.

    Args:
        max_batches: of `rows_per_batch` rows, over all ranks together; 0 takes every row.
    """

    def __init__(self, source: RowSource, *, rows_per_batch: int, max_batches: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.source, self.rows_per_batch, self.rank, self.world_size = source, rows_per_batch, rank, world_size
        self._plan = source.plan(VALIDATION_SEED, 0)
        num_batches = -(-self._plan.num_rows // rows_per_batch)
        self.num_batches = min(num_batches, max_batches) if max_batches else num_batches  # over all ranks

    def __len__(self) -> int:
        return -(-self.num_batches // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch_index in range(self.rank, len(self) * self.world_size, self.world_size):
            first = batch_index * self.rows_per_batch
            if batch_index >= self.num_batches:
                yield empty_batch(1, self.source.seq_len, self.source.num_codebooks)
                continue
            rows = range(first, min(first + self.rows_per_batch, self._plan.num_rows))
            yield _count_bad(self.source, *self.source.build([self._plan.row(row) for row in rows]))


def _count_bad(source: RowSource, batch: Batch, bad: Bad) -> Batch:
    """Count what is missing from a batch, in the process that trains: workers only report it."""
    if source.bad is not None:
        for sample_index, reason in bad:
            source.bad.add(sample_index, reason)
    return batch
