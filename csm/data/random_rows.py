"""Made-up conversations of a model's shape: rows without files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from csm.config import DataConfig, ModelConfig
from csm.data.rows import Bad
from csm.frames import Batch, Rows, audio_rows, text_rows

ROWS_PER_RANDOM_EPOCH = 65_536  # made-up rows have no end: this many are called an epoch
NUM_RANDOM_VALIDATION_ROWS = 32


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
