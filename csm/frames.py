"""Turns and batches, and the only place where codes [K, F] and rows [T, K+1] become one another.

A row is one position of the model's window: K audio codes, then a text id in the last column, with a mask of the same
shape that says which columns count. A turn is its text rows, one row per 80 ms audio frame, and one EOS row of K zeros
whose audio columns count. Seconds, samples and frames meet only here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE_HZ = 24_000
FRAME_RATE_HZ = 12.5
SAMPLES_PER_FRAME = 1_920
PADDING_DOCUMENT = -1  # in Batch.document_ids


def num_frames_from_samples(num_samples: int) -> int:
    """Frames that cover `num_samples`: the last one may be part silence. Source: Mimi, ceil(n / 1920)."""
    return math.ceil(num_samples / SAMPLES_PER_FRAME)


def num_samples_from_frames(num_frames: int) -> int:
    return num_frames * SAMPLES_PER_FRAME


def frames_from_seconds(duration_s: float) -> int:
    """Frames that cover `duration_s`."""
    return num_frames_from_samples(round(duration_s * SAMPLE_RATE_HZ))


def seconds_from_frames(num_frames: int) -> float:
    return num_frames / FRAME_RATE_HZ


@dataclass
class Turn:
    """What one speaker said: text, and its audio as samples or as codes.

    Attributes:
        speaker: the number in front of the text, counted per conversation.
        text: as spoken, without the `[speaker]` prefix.
        audio: [S] float32 at 24 kHz, or None.
        codes: [K, F] int64 in [0, V), or None; wins over `audio` when both are there.
        learn_c0, learn_depth: whether training learns codebook 0 and the depth decoder from this turn. A turn with both
            off is heard as context and never learnt.
    """

    speaker: int
    text: str
    audio: Tensor | None = None
    codes: Tensor | None = None
    learn_c0: bool = True
    learn_depth: bool = True


class TextEncoder(Protocol):
    """What rows need of a tokenizer; `csm.text` has the real ones."""

    def encode_turn(self, speaker: int, text: str) -> list[int]:
        """Token ids of `[speaker]text` between BOS and EOS."""
        ...


@dataclass
class Rows:
    """A run of positions: one turn, or a whole conversation.

    Attributes:
        tokens: [T, K+1] int64.
        mask: [T, K+1] bool, the columns that count.
        learn_c0, learn_depth: [T] bool, true on audio and EOS rows that training may learn from.
    """

    tokens: Tensor
    mask: Tensor
    learn_c0: Tensor
    learn_depth: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @staticmethod
    def concatenate(parts: Sequence[Rows]) -> Rows:
        return Rows(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rows)))


def text_rows(token_ids: Sequence[int], num_codebooks: int) -> Rows:
    """Rows that hold text only: ids in the last column, the audio columns zero and masked."""
    length = len(token_ids)
    tokens = torch.zeros(length, num_codebooks + 1, dtype=torch.int64)
    tokens[:, -1] = torch.as_tensor(token_ids, dtype=torch.int64)
    mask = torch.zeros(length, num_codebooks + 1, dtype=torch.bool)
    mask[:, -1] = True
    nothing = torch.zeros(length, dtype=torch.bool)
    return Rows(tokens, mask, nothing, nothing.clone())


def audio_rows(codes: Tensor, *, with_eos: bool = True, learn_c0: bool = True, learn_depth: bool = True) -> Rows:
    """Rows of codes [K, F], and the EOS row of K zeros that ends a turn.

    Raises:
        ValueError: if `codes` is not [K, F], not whole numbers from 0, or holds an all-zero frame, which would read as EOS.
    """
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [K, F]; encode one turn at a time")
    if codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise ValueError(f"codes are {codes.dtype}, expected whole numbers; give the codec's output as it is")
    num_codebooks, num_frames = codes.shape
    if bool((codes < 0).any()):
        raise ValueError(f"codes hold {int(codes.min())}, expected numbers from 0; encode the turn again with our codec")
    is_zero_frame = (codes == 0).all(dim=0)
    if bool(is_zero_frame.any()):
        where = int(is_zero_frame.nonzero()[0])
        raise ValueError(
            f"frame {where} of {num_frames} has {num_codebooks} zero codes, which means EOS; encode the turn again with our codec"
        )
    length = num_frames + int(with_eos)
    tokens = torch.zeros(length, num_codebooks + 1, dtype=torch.int64)
    tokens[:num_frames, :-1] = codes.T
    mask = torch.ones(length, num_codebooks + 1, dtype=torch.bool)
    mask[:, -1] = False
    return Rows(tokens, mask, torch.full((length,), learn_c0), torch.full((length,), learn_depth))


def rows_from_turn(turn: Turn, text: TextEncoder, num_codebooks: int, *, with_eos: bool = True) -> Rows:
    """A turn as rows: its text, then (when it has codes) its frames and the EOS row."""
    return rows_from_turns([turn], text, num_codebooks, with_eos=with_eos)


def rows_from_turns(turns: Sequence[Turn], text: TextEncoder, num_codebooks: int, *, with_eos: bool = True) -> Rows:
    """A conversation as rows, its turns in order. Positions run on across turns.

    The same as `text_rows` and `audio_rows` joined, written straight into one array: a training step lays dozens of
    conversations, and a tensor for every part took three times as long.

    Raises:
        ValueError: no turns; or a turn has other codebooks than the model, or an all-zero frame, which would read as EOS.
    """
    if not turns:
        raise ValueError("a conversation needs at least one turn, got none")
    ids = [text.encode_turn(turn.speaker, turn.text) for turn in turns]
    num_audio_rows = [0 if turn.codes is None else turn.codes.shape[-1] + int(with_eos) for turn in turns]
    length = sum(map(len, ids)) + sum(num_audio_rows)
    tokens = np.zeros((length, num_codebooks + 1), dtype=np.int64)
    mask = np.zeros((length, num_codebooks + 1), dtype=bool)
    learn_c0, learn_depth = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
    stop = 0
    for turn, token_ids, num_rows in zip(turns, ids, num_audio_rows, strict=True):
        start, stop = stop, stop + len(token_ids)
        tokens[start:stop, -1] = token_ids
        mask[start:stop, -1] = True
        if turn.codes is None:
            continue
        codes = turn.codes.numpy(force=True)
        _check_codes(codes, num_codebooks)
        start, stop = stop, stop + num_rows
        tokens[start : start + codes.shape[1], :-1] = codes.T
        mask[start:stop, :-1] = True
        learn_c0[start:stop], learn_depth[start:stop] = turn.learn_c0, turn.learn_depth
    return Rows(*(torch.from_numpy(array) for array in (tokens, mask, learn_c0, learn_depth)))


def _check_codes(codes: np.ndarray | Tensor, num_codebooks: int | None = None) -> None:
    """Refuse codes that are not [K, F], or hold an all-zero frame."""
    if codes.ndim != 2:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [K, F]; encode one turn at a time")
    if num_codebooks is not None and codes.shape[0] != num_codebooks:
        raise ValueError(f"a turn has {codes.shape[0]} codebooks, the model expects {num_codebooks}; encode it with the model's codec")
    is_zero_frame = (codes == 0).all(0)
    if is_zero_frame.any():
        where = int(is_zero_frame.nonzero()[0][0])
        raise ValueError(
            f"frame {where} of {codes.shape[1]} has {codes.shape[0]} zero codes, which means EOS; encode the turn again with our codec"
        )


def is_eos_row(tokens: Tensor, mask: Tensor) -> Tensor:
    """Whether each row ends a turn: audio columns count and are all zero. [..., K+1] -> [...]."""
    return mask[..., 0] & (tokens[..., :-1] == 0).all(dim=-1)


def codes_from_rows(tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """The audio of rows [T, K+1], one [K, F] per turn: the inverse of `rows_from_turns`."""
    is_eos = is_eos_row(tokens, mask)
    turns: list[Tensor] = []
    frames: list[Tensor] = []
    for position in mask[:, 0].nonzero().flatten().tolist():
        if is_eos[position]:
            turns.append(torch.stack(frames, dim=1) if frames else tokens.new_zeros(tokens.shape[1] - 1, 0))
            frames = []
        else:
            frames.append(tokens[position, :-1])
    if frames:
        turns.append(torch.stack(frames, dim=1))
    return turns


@dataclass
class Batch:
    """Packed rows ready for the model.

    Attributes:
        tokens: [B, T, K+1] int64.
        mask: [B, T, K+1] bool.
        document_ids: [B, T] int64; equal ids attend to one another, -1 is padding. Left out: each row is one document, and
            positions without an unmasked column are padding.
        learn_c0, learn_depth: [B, T] bool, rows whose codebook 0, and whose codebooks 1..K-1, are targets. A row that
            opens its document is never a target: nothing comes before it. Left out: every frame and EOS row.
        keys: the samples inside, for messages that must name a bad one.
    """

    tokens: Tensor
    mask: Tensor
    document_ids: Tensor = None  # type: ignore[assignment]  # a Tensor after __post_init__
    learn_c0: Tensor = None  # type: ignore[assignment]
    learn_depth: Tensor = None  # type: ignore[assignment]
    keys: list[str] | None = None

    def __post_init__(self) -> None:
        if self.document_ids is None:
            self.document_ids = torch.where(self.mask.any(dim=-1), 0, PADDING_DOCUMENT)
        if self.learn_c0 is None:
            self.learn_c0 = self.mask[..., 0]
        if self.learn_depth is None:
            self.learn_depth = self.mask[..., 0]

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(Batch) if f.name != "keys"})

    @property
    def num_frames(self) -> int:
        """Audio frames in the batch, EOS rows not counted."""
        return int((self.mask[..., 0] & ~is_eos_row(self.tokens, self.mask)).sum())

    @staticmethod
    def from_documents(packed: Sequence[Sequence[Rows]], seq_len: int | None = None, keys: Sequence[str] | None = None) -> Batch:
        """Lay documents end to end, one list of them for each row of the batch, and pad to `seq_len` (None: the longest).

        Raises:
            ValueError: if a row's documents are longer than `seq_len`, or there is nothing to lay.
        """
        if not packed or not any(packed):
            raise ValueError("a batch needs at least one document, got none")
        lengths = [sum(len(document) for document in row) for row in packed]
        seq_len = max(lengths) if seq_len is None else seq_len
        if max(lengths) > seq_len:
            raise ValueError(f"documents of {max(lengths)} positions do not fit rows of {seq_len}; raise data.seq_len")
        width = next(document for row in packed for document in row).tokens.shape[1]
        size = (len(packed), seq_len)
        tokens = torch.zeros(*size, width, dtype=torch.int64)
        mask = torch.zeros(*size, width, dtype=torch.bool)
        document_ids = torch.full(size, PADDING_DOCUMENT, dtype=torch.int64)
        learn_c0 = torch.zeros(size, dtype=torch.bool)
        learn_depth = torch.zeros(size, dtype=torch.bool)
        for row_index, row in enumerate(packed):
            start = 0
            for document_index, document in enumerate(row):
                stop = start + len(document)
                tokens[row_index, start:stop] = document.tokens
                mask[row_index, start:stop] = document.mask
                document_ids[row_index, start:stop] = document_index
                learn_c0[row_index, start + 1 : stop] = document.learn_c0[1:]
                learn_depth[row_index, start + 1 : stop] = document.learn_depth[1:]
                start = stop
        return Batch(tokens, mask, document_ids, learn_c0, learn_depth, list(keys) if keys is not None else None)
