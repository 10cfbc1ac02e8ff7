"""What every codec offers: audio to codes and back, all at once or frame by frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from csm.frames import FRAME_RATE_HZ, SAMPLE_RATE_HZ


class DecodeStream(ABC):
    """Decodes one clip frame by frame. All samples returned, joined, equal `Codec.decode` of all frames pushed."""

    @abstractmethod
    def push(self, codes: Tensor) -> Tensor:
        """Take codes [K, F] (F >= 1) and return the samples that are final by now, float32 [S] (S may be 0 at first)."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Return what is left, float32 [S]; the stream is over."""


class Codec(ABC):
    """Turns 24 kHz mono audio into codes [K, F] at 12.5 frames a second, and back.

    Attributes:
        name: as in `codec.name` and in a shard index.
        num_codebooks: K.
        vocab_size: codes are in [0, vocab_size).
        digest: sha256 (hex) of weights and settings: equal digests give equal codes.
    """

    name: str
    num_codebooks: int
    vocab_size: int
    digest: str
    sample_rate_hz: int = SAMPLE_RATE_HZ
    frame_rate_hz: float = FRAME_RATE_HZ

    @abstractmethod
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips, each float32 [S], S >= 1, to int64 [K, ceil(S / 1920)]; no frame is all zero.

        Batched inside; a clip's codes do not depend on its neighbours.
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Decode [K, F] to float32 [F * 1920], the same samples as a `DecodeStream` fed frame by frame."""

    @abstractmethod
    def stream(self) -> DecodeStream:
        """Start decoding a clip frame by frame."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write codec.json, and weights as safetensors where they are ours to write, into `folder`."""

    def to(self, device: torch.device | str) -> Codec:
        """Move to a device, where the codec has weights to move."""
        return self

    def index_entry(self) -> dict[str, object]:
        """How a shard index names this codec."""
        return {
            "name": self.name,
            "num_codebooks": self.num_codebooks,
            "frame_rate_hz": self.frame_rate_hz,
            "sample_rate_hz": self.sample_rate_hz,
            "digest": self.digest,
        }


def check_waveform(waveform: Tensor) -> None:
    """Refuse what is not one mono clip.

    Raises:
        ValueError: if `waveform` is not floating point [S] with S >= 1, or has samples that are not finite.
    """
    if waveform.ndim != 1 or waveform.shape[0] == 0 or not waveform.is_floating_point():
        raise ValueError(
            f"a clip is {waveform.dtype} {tuple(waveform.shape)}, expected float32 [S] with S >= 1; mix to mono at 24 kHz, in [-1, 1]"
        )
    if not bool(torch.isfinite(waveform).all()):
        raise ValueError("a clip has samples that are not finite; check the file it came from")


def check_codes(codes: Tensor, num_codebooks: int, vocab_size: int) -> None:
    """Refuse what is not codes [K, F] of a codec with these sizes.

    Raises:
        ValueError: if the shape or a value is off.
    """
    if codes.ndim != 2 or codes.shape[0] != num_codebooks:
        raise ValueError(f"codes have shape {tuple(codes.shape)}, expected [{num_codebooks}, F]; use the codec the codes were made with")
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < vocab_size:
        raise ValueError(
            f"codes reach from {int(codes.min())} to {int(codes.max())}, expected 0 to {vocab_size - 1}; "
            "use the codec the codes were made with"
        )
