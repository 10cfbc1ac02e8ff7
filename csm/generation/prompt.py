"""From turns to the rows a reply starts from: context encoded once, whole old turns dropped when the window is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from csm.codec import Codec
from csm.config import ModelConfig
from csm.frames import Rows, Turn, frames_from_seconds, rows_from_turn, text_rows
from csm.generation.watermark import check_waveform
from csm.text import TextTokenizer


class PromptBuilder:
    """Turns context and text into rows of one model.

    Args:
        config: of the model.
        codec: gives codes of context that comes as audio.
        tokenizer: reads texts.
    Raises:
        ValueError: if codec or tokenizer do not fit the model.
    """

    def __init__(self, config: ModelConfig, codec: Codec, tokenizer: TextTokenizer) -> None:
        if codec.num_codebooks != config.num_codebooks or codec.vocab_size > config.audio_vocab_size:
            raise ValueError(
                f"codec {codec.name} has {codec.num_codebooks} codebooks of {codec.vocab_size} codes, the model {config.num_codebooks} of "
                f"{config.audio_vocab_size}; use the codec the model was trained with"
            )
        if tokenizer.vocab_size > config.text_vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model's text table {config.text_vocab_size}; use the tokenizer the "
                "model was trained with"
            )
        self.config = config
        self.codec = codec
        self.tokenizer = tokenizer
        self._encoded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # audio tensor -> codes, for as long as the tensor lives

    def reply_rows(self, text: str, speaker: int) -> Rows:
        """The rows of a text that is to be spoken.

        Raises:
            ValueError: if the text is empty or the tokenizer cannot write it.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text is {text!r}: expected something to say")
        return text_rows(self.tokenizer.encode_turn(speaker, text), self.config.num_codebooks)

    def turn_with_codes(self, turn: Turn, place: str) -> Turn:
        """The turn with its codes, encoded now if it came as audio.

        Args:
            place: how messages call it, e.g. "context turn 2".
        Raises:
            ValueError: if it has neither audio nor codes, or they cannot be used.
        """
        if not turn.text.strip():
            raise ValueError(f"{place} has no text; write what is said in it")
        if turn.codes is not None:
            return replace(turn, codes=self._checked_codes(turn.codes, place), audio=None)
        if turn.audio is None:
            raise ValueError(f"{place} has neither audio nor codes; context is heard, so give its audio")
        codes = self._encoded.get(turn.audio)
        if codes is None:
            try:
                waveform = check_waveform(turn.audio)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            codes = self.codec.encode([waveform])[0].cpu()
            self._encoded[turn.audio] = codes
        return replace(turn, codes=codes, audio=None)

    def turn_rows(self, turn: Turn, place: str) -> Rows:
        """Rows of a turn that was heard: its text, its frames and the EOS row."""
        return rows_from_turn(self.turn_with_codes(turn, place), self.tokenizer, self.config.num_codebooks)

    def build(self, text: str, speaker: int, context: Sequence[Turn], max_frames: int) -> tuple[Rows, int]:
        """The rows a reply of up to `max_frames` starts from.

        Returns:
            The rows, and how many of the oldest context turns were dropped to fit them.
        Raises:
            ValueError: if the text alone does not fit, or a turn cannot be used.
        """
        reply = self.reply_rows(text, speaker)
        turns = [self.turn_rows(turn, f"context turn {index}") for index, turn in enumerate(context)]
        num_dropped = self.num_to_drop([len(rows) for rows in turns], len(reply), max_frames)
        return Rows.concatenate([*turns[num_dropped:], reply]), num_dropped

    def num_to_drop(self, turn_lengths: Sequence[int], reply_length: int, max_frames: int) -> int:
        """How many of the oldest turns must go so that the rest, the reply's text and its frames fit the window.

        Raises:
            ValueError: if text and frames do not fit even alone.
        """
        room = self.config.max_seq_len - reply_length - max_frames
        if room < 0:
            raise ValueError(
                f"a text of {reply_length} tokens and {max_frames} frames of reply exceed the window of {self.config.max_seq_len} "
                "positions; shorten the text or max_duration_s"
            )
        num_dropped = 0
        while sum(turn_lengths[num_dropped:]) > room:
            num_dropped += 1
        return num_dropped

    def _checked_codes(self, codes: Tensor, place: str) -> Tensor:
        expected = f"int64 [{self.config.num_codebooks}, F] in [0, {self.config.audio_vocab_size})"
        if codes.ndim != 2 or codes.shape[0] != self.config.num_codebooks or codes.shape[1] == 0 or codes.is_floating_point():
            raise ValueError(f"{place} has codes {codes.dtype} {tuple(codes.shape)}, expected {expected}; encode it with the model's codec")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.config.audio_vocab_size:
            raise ValueError(f"{place} has codes from {low} to {high}, expected {expected}; encode it with the model's codec")
        return codes.long().cpu()


def max_frames_from_duration(max_duration_s: float) -> int:
    """Frames of the longest reply.

    Raises:
        ValueError: if it is shorter than a frame, or not a number.
    """
    if not 0 < max_duration_s < float("inf"):
        raise ValueError(f"max_duration_s={max_duration_s}: expected a positive number of seconds")
    return max(1, frames_from_seconds(max_duration_s))


def min_frames_from_duration(min_duration_s: float) -> int:
    """Frames of the shortest reply; 0 leaves its end to the model.

    Raises:
        ValueError: if it is negative, or not a number.
    """
    if not 0 <= min_duration_s < float("inf"):
        raise ValueError(f"min_duration_s={min_duration_s}: expected a number of seconds from 0")
    return frames_from_seconds(min_duration_s)


def pad_prompts(prompts: Sequence[Rows]) -> tuple[Tensor, Tensor]:
    """Lay prompts side by side, shorter ones padded on the left: tokens and mask [B, T, K+1]."""
    width = max(len(rows) for rows in prompts)
    columns = prompts[0].tokens.shape[1]
    tokens = torch.zeros(len(prompts), width, columns, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, columns, dtype=torch.bool)
    for index, rows in enumerate(prompts):
        tokens[index, width - len(rows) :] = rows.tokens
        mask[index, width - len(rows) :] = rows.mask
    return tokens, mask
