"""What a loader asks of a source of rows: the rows of each epoch, and any of them built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from csm.data.bad_samples import BadSamples
from csm.frames import PADDING_DOCUMENT, Batch

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
