"""Keeps decoded documents of a small split in memory."""

from __future__ import annotations

import numpy as np
import torch

from csm.config import ModelConfig
from csm.data.packing import Documents
from csm.frames import Rows


class RowCache:
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
    def for_documents(documents: Documents, model: ModelConfig, max_bytes: int) -> RowCache | None:
        """A cache, or None where the split is too large for `max_bytes`."""
        width = model.num_codebooks + 1
        is_small = max(model.text_vocab_size, model.audio_vocab_size) <= 2**15
        num_bytes = documents.num_positions * (width * (3 if is_small else 5) + 2)
        return RowCache(documents, width, torch.int16 if is_small else torch.int32) if num_bytes <= max_bytes else None

    def __contains__(self, document: int) -> bool:
        return bool(self._is_there[document])

    def get(self, document: int) -> Rows:
        return self._at(document)

    def put(self, document: int, rows: Rows) -> None:
        place = self._at(document)
        for name in ("tokens", "mask", "learn_c0", "learn_depth"):
            getattr(place, name).copy_(getattr(rows, name))
        self._is_there[document] = True

    def _at(self, document: int) -> Rows:
        span = slice(int(self._starts[document]), int(self._starts[document + 1]))
        rows = self._rows
        return Rows(rows.tokens[span], rows.mask[span], rows.learn_c0[span], rows.learn_depth[span])
