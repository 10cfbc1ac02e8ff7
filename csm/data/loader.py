"""Walks over the rows of a source, batch by batch, and remembers where training is.

Only the process that trains keeps the position, two numbers, so a run goes on at once, on another number of ranks or workers
if need be. Which rows there are, and what is in them, the source knows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from csm.data.bad_samples import Position
from csm.data.rows import Bad, Plan, RowSource, empty_batch
from csm.frames import Batch

# The validation order is the same in every run, whatever its seed, so that validation losses compare across runs.
VALIDATION_SEED = 0

_log = logging.getLogger(__name__)


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
            built = next(self._stream)
            self._batch += 1
            if self._batch == len(self):
                self.epoch, self._batch = self.epoch + 1, 0
            batch = _count_bad(self.source, *built, at=(self.epoch, -(-self._batch // self.accumulate)))
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


def _count_bad(source: RowSource, batch: Batch, bad: Bad, at: Position | None = None) -> Batch:
    """Count what is missing from a batch, in the process that trains: workers only report it."""
    if source.bad is not None:
        for sample_index, reason in bad:
            source.bad.add(sample_index, reason, at)
    return batch
