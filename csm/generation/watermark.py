"""The inaudible marks that say a machine spoke: what every one of them offers, and how they are chosen by name.

`keyed` is ours: no weights, a secret key if one is set, and a stated chance of a false alarm, so it decides (`KeyedWatermarker`).
`perth` is Resemble AI's, known to other people's detectors. Both are put in by default. `silentcipher` (Sesame's choice) and
`audioseal` need their own packages and weights. docs/watermark.md holds what was measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import soxr
import torch
from torch import Tensor

from csm.config import DEFAULT_WATERMARK
from csm.frames import SAMPLE_RATE_HZ

MARKS = ("keyed", "perth", "silentcipher", "audioseal")  # joined by "+" where a clip gets several


@dataclass
class WatermarkResult:
    """What a detector heard.

    Attributes:
        is_marked: by the detector's own threshold.
        confidence: 0 to 1.
        p_value: the chance that a clip made without the key scores as high; None where the detector states none.
    """

    is_marked: bool
    confidence: float
    p_value: float | None = None


class WatermarkStream(ABC):
    """Marks one clip as its samples come. All that is returned, joined, equals `Watermarker.embed` of all that was pushed."""

    @abstractmethod
    def push(self, waveform: Tensor) -> Tensor:
        """Take float32 [S] and return the marked samples that are final by now, float32 (possibly none)."""

    @abstractmethod
    def finish(self) -> Tensor:
        """Return what is left; the stream is over."""


class Watermarker(ABC):
    """Marks 24 kHz sound, and tells marked sound from other sound."""

    name: str

    @abstractmethod
    def stream(self) -> WatermarkStream:
        """Start marking a clip."""

    @abstractmethod
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        """Listen for the mark in float32 [S].

        Raises:
            ValueError: if the clip is empty, not mono or not finite.
        """

    def embed(self, waveform: Tensor) -> Tensor:
        """Mark a clip, float32 [S] at 24 kHz -> [S]."""
        stream = self.stream()
        return torch.cat((stream.push(check_waveform(waveform)), stream.finish()))


class JointWatermarker(Watermarker):
    """Several marks in one clip, each made from the clip as it came, and their changes added; the first one decides."""

    def __init__(self, marks: Sequence[Watermarker]) -> None:
        self.marks = tuple(marks)
        self.name = "+".join(mark.name for mark in marks)

    def stream(self) -> WatermarkStream:
        return _JointStream([mark.stream() for mark in self.marks])

    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        return self.marks[0].detect(waveform, sample_rate)


class _JointStream(WatermarkStream):
    """Waits for the slowest mark: what all have finished is returned."""

    def __init__(self, streams: Sequence[WatermarkStream]) -> None:
        self._streams = streams
        self._clean = torch.zeros(0)
        self._marked = [torch.zeros(0) for _ in streams]

    def push(self, waveform: Tensor) -> Tensor:
        waveform = waveform.detach().float().cpu()
        self._clean = torch.cat((self._clean, waveform))
        self._marked = [torch.cat((held, stream.push(waveform))) for held, stream in zip(self._marked, self._streams, strict=True)]
        return self._take()

    def finish(self) -> Tensor:
        self._marked = [torch.cat((held, stream.finish())) for held, stream in zip(self._marked, self._streams, strict=True)]
        return self._take()

    def _take(self) -> Tensor:
        num_samples = min(held.shape[0] for held in self._marked)
        clean = self._clean[:num_samples]
        total = clean.clone()
        for held in self._marked:
            total += held[:num_samples] - clean
        self._clean = self._clean[num_samples:]
        self._marked = [held[num_samples:] for held in self._marked]
        return total


def load_watermarker(name: str = DEFAULT_WATERMARK) -> Watermarker | None:
    """The watermarker of that name; None for "off", which must be asked for and is noted in what is written.

    Args:
        name: "off", or one or several of `MARKS` joined by "+".
    Raises:
        ValueError: if there is no such watermarker, or its key cannot be used.
        ImportError, FileNotFoundError: if its package or weights are missing.
    """
    if name == "off":
        return None
    names = name.split("+")
    if not set(names) <= set(MARKS) or len(set(names)) < len(names):
        raise ValueError(f"watermark={name!r}: expected off, or one or several of {', '.join(MARKS)} joined by +, each once")
    marks = [_load_mark(each) for each in names]
    return marks[0] if len(marks) == 1 else JointWatermarker(marks)


def _load_mark(name: str) -> Watermarker:
    if name == "keyed":
        from csm.generation.keyed_mark import KeyedWatermarker

        return KeyedWatermarker()
    if name == "perth":
        from csm.generation.perth_mark import PerthWatermarker

        return PerthWatermarker()
    from csm.generation import neural_marks

    return neural_marks.SilentCipherWatermarker() if name == "silentcipher" else neural_marks.AudioSealWatermarker()


def check_waveform(waveform: Tensor) -> Tensor:
    """A clip as float32 [S], or an error that says what is wrong with it."""
    if waveform.ndim != 1:
        raise ValueError(f"the audio has shape {tuple(waveform.shape)}, expected mono samples [S]; mix the channels down first")
    if waveform.shape[0] == 0:
        raise ValueError("the audio has no samples")
    if not waveform.is_floating_point():
        raise ValueError(f"the audio is {waveform.dtype}, expected float32 in [-1, 1]")
    if not bool(torch.isfinite(waveform).all()):
        raise ValueError("the audio has samples that are not finite (NaN or infinite); check the file it came from")
    return waveform.detach().float()


def resampled(waveform: Tensor, sample_rate: int, to_rate: int = SAMPLE_RATE_HZ) -> Tensor:
    """A checked clip, on the CPU, float32 [S] at `to_rate`.

    Raises:
        ValueError: if it is no clip, or the rate is not positive.
    """
    waveform = check_waveform(waveform).cpu()
    if sample_rate <= 0:
        raise ValueError(f"sample_rate={sample_rate}: expected a positive number of samples a second")
    if sample_rate == to_rate:
        return waveform
    return torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, to_rate))
