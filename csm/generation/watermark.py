"""The inaudible mark that says a machine spoke, and its detector.

Perth (Resemble AI, MIT licence, `resemble-perth` on PyPI, weights inside the wheel) moves magnitudes below 2 kHz. Two small
networks: one reads 10 ms spectra and says by how many decibels to move each bin, one reads spectra and says how likely they
are marked. We run its published weights in our own code, for three reasons: the package's imports pull in librosa, torchaudio
and pkg_resources, which current environments lack; its spectra (64 ms windows, 10 ms hops) can be taken at 24 kHz as well as
at its 32, which saves resampling; and it marks whole clips, while we must mark a stream. So sound is marked in blocks of
80 ms, each by itself, joined by overlapping windows: what comes out does not depend on how the samples came in.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ

DETECTION_THRESHOLD = 0.40  # between marked and unmarked, see PerthWatermarker
CHOICES = ("perth", "off")
_WEIGHTS = Path("perth_net/pretrained/implicit/perth_net_250000.pth.tar")
_WEIGHTS_SHA256 = "a15bce457ebc53ce5e6c9c3f11df78cf7ee2bf9cdab0a798902135b4c4027670"
_WINDOW_S, _HOP_S = 0.064, 0.010
_NUM_FFT, _HOP = round(_WINDOW_S * SAMPLE_RATE_HZ), round(_HOP_S * SAMPLE_RATE_HZ)  # 1536 and 240 samples at 24 kHz
_PERTH_NUM_FFT = 2048  # at 32 kHz: magnitudes of our shorter windows are scaled up to its
_NUM_BINS = 128  # up to 2 kHz, 15.6 Hz each
_FLOOR_DB, _RANGE_DB = -180.0, 195.0  # a magnitude is read as (dB - floor) / range
_SILENCE = 0.05  # hops whose mean reading is below this share of the loudest are neither marked nor read
_FIRST_BLOCK_HOPS, _BLOCK_HOPS = 4, 8  # the first is shorter, so that sound comes after the first frame of a codec
_DETECTION_FLOOR_DB = -25.0  # below the mean power under 2 kHz: what the detector is not let to see, see PerthWatermarker
_BRANCHES = (("slow", 1.25), ("normal", 1.0), ("fast", 0.75))  # the detector listens at three speeds


@dataclass
class WatermarkResult:
    """What a detector heard.

    Attributes:
        is_marked: confidence above `DETECTION_THRESHOLD`.
        confidence: 0 to 1.
    """

    is_marked: bool
    confidence: float


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


class PerthWatermarker(Watermarker):
    """Perth's implicit watermark: one bit, present or not.

    Its detector takes holes in the spectrum for the mark: of unmarked clips it accepts, with confidences up to 1.0, 13 of 16
    with everything below 50 Hz cut away, 16 of 16 below 120 Hz, and 40 of 40 that went through our offline codec. So `detect`
    fills the holes: power 25 dB below the mean is added to every bin. Measured on 40 clips of synthetic speech of 1-4 s: marked
    ones score 0.46 or more (through the offline codec 0.43), unmarked ones 0.06 at most (codec 0.31), and the threshold lies
    between. Cut to 0.75-1 s all marked ones are still found, but of unmarked codec output one in ten or so is accepted; of clips
    of half a second many marked ones are missed.
    """

    name = "perth"

    def __init__(self) -> None:
        self._path = _weights_path()  # found now, so that a missing package is told before any work; read when first used

    def stream(self) -> WatermarkStream:
        return _PerthStream(_load_weights(self._path))

    @torch.no_grad()
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        waveform = check_waveform(waveform).cpu()
        if sample_rate <= 0:
            raise ValueError(f"sample_rate={sample_rate}: expected a positive number of samples a second")
        if sample_rate != SAMPLE_RATE_HZ:
            waveform = torch.from_numpy(soxr.resample(waveform.numpy(), sample_rate, SAMPLE_RATE_HZ))
        waveform = F.pad(waveform, (0, max(0, _NUM_FFT - waveform.shape[0])))
        window = torch.hann_window(_NUM_FFT)
        spectra = torch.stft(waveform, _NUM_FFT, _HOP, window=window, pad_mode="reflect", return_complex=True)
        readings = _read(spectra)  # [bins, hops]
        loudness = readings.sum(dim=0)
        power = spectra[:_NUM_BINS].abs().square()
        filled = _read((power + power.mean() * 10.0 ** (_DETECTION_FLOOR_DB / 10.0)).sqrt())
        is_heard = (loudness > _SILENCE * loudness.max()).float()
        if not bool(is_heard.any()):
            return WatermarkResult(False, 0.0)  # digital silence holds no mark
        confidence = float(_score(filled, is_heard, _load_weights(self._path)).clamp(0.0, 1.0))
        return WatermarkResult(confidence > DETECTION_THRESHOLD, confidence)


class _PerthStream(WatermarkStream):
    """Overlap-add of block after block; hop j is centred on sample 240 j."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights
        self._window = torch.hann_window(_NUM_FFT)
        squared = F.pad(self._window.square(), (0, -_NUM_FFT % _HOP)).view(-1, _HOP)
        self._envelope = squared.sum(dim=0)  # [240]: the windows of all hops at one sample, wherever it is
        self._samples = torch.zeros(_NUM_FFT // 2)  # from the next hop's window on; nothing sounds before the clip
        self._overlap = torch.zeros(_NUM_FFT - _HOP)  # of residuals that reach past the hops done
        self._num_hops = 0
        self._num_pushed = self._num_returned = 0
        self._peak = 0.0
        self._is_over = False

    @torch.no_grad()
    def push(self, waveform: Tensor) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Watermarker.stream()")
        waveform = waveform.detach().float().cpu()
        self._num_pushed += waveform.shape[0]
        return self._take(waveform)

    @torch.no_grad()
    def finish(self) -> Tensor:
        num_left = self._num_pushed - self._num_returned
        padding = torch.zeros(num_left + 2 * _NUM_FFT + _BLOCK_HOPS * _HOP)  # nothing sounds behind it; flushes every block
        marked = self._take(padding)[:num_left]
        self._is_over = True
        return marked

    def _take(self, waveform: Tensor) -> Tensor:
        self._samples = torch.cat((self._samples, waveform))
        parts = []
        while True:
            num_hops = _BLOCK_HOPS if self._num_hops else _FIRST_BLOCK_HOPS
            if self._samples.shape[0] < (num_hops - 1) * _HOP + _NUM_FFT:
                break
            parts.append(self._block(num_hops))
        marked = torch.cat(parts) if parts else torch.zeros(0)
        self._num_returned += marked.shape[0]
        return marked

    def _block(self, num_hops: int) -> Tensor:
        """Mark `num_hops` hops; return the samples that no later hop touches."""
        spectra = torch.fft.rfft(self._samples.unfold(0, _NUM_FFT, _HOP)[:num_hops] * self._window).T  # [bins, hops]
        readings = _read(spectra)
        loudness = readings.sum(dim=0)
        self._peak = max(self._peak, float(loudness.max()))
        is_heard = (loudness > _SILENCE * self._peak).float()
        gain_db = _RANGE_DB * _convolve("encoder.layers", readings[None, :_NUM_BINS], self._weights)[0] * is_heard
        residual = spectra[:_NUM_BINS] * (10.0 ** (gain_db / 20.0) - 1.0)
        windows = torch.fft.irfft(F.pad(residual, (0, 0, 0, spectra.shape[0] - _NUM_BINS)), n=_NUM_FFT, dim=0).T * self._window
        total = F.pad(self._overlap, (0, num_hops * _HOP))
        for hop in range(num_hops):
            total[hop * _HOP : hop * _HOP + _NUM_FFT] += windows[hop]
        num_done = num_hops * _HOP
        residual_samples = (total[:num_done].view(-1, _HOP) / self._envelope).flatten()
        marked = self._samples[:num_done] + residual_samples
        if self._num_hops == 0:
            marked = marked[_NUM_FFT // 2 :]  # what stands before the clip
        self._samples, self._overlap = self._samples[num_done:], total[num_done:]
        self._num_hops += num_hops
        return marked


def load_watermarker(name: str = "perth") -> Watermarker | None:
    """The watermarker of that name; None for "off", which must be asked for and is noted in what is written.

    Raises:
        ValueError: if there is no such watermarker.
        ImportError: if its package is missing or holds other weights.
    """
    if name == "off":
        return None
    if name != "perth":
        raise ValueError(f"watermark={name!r}: expected one of {', '.join(CHOICES)}")
    return PerthWatermarker()


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


def _read(spectra: Tensor) -> Tensor:
    """Magnitudes as Perth's networks read them: decibels of its 32 kHz spectra, 0 at -180 dB and 1 at 15 dB."""
    magnitudes = spectra.abs() * (_PERTH_NUM_FFT / _NUM_FFT)
    floor = 10.0 ** (_FLOOR_DB / 20.0)
    return (20.0 * magnitudes.clamp(min=floor).log10() - _FLOOR_DB) / _RANGE_DB


def _convolve(name: str, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """Seven convolutions over time, six of them followed by a leaky ReLU: [1, channels, hops] -> the same hops."""
    for index in range(7):
        weight = weights[f"{name}.{index}.conv.weight"]
        x = F.conv1d(x, weight, weights[f"{name}.{index}.conv.bias"], padding=weight.shape[-1] // 2)
        if index < 6:
            x = F.leaky_relu(x)
    return x


def _score(readings: Tensor, is_heard: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """How likely spectra [128, hops] are marked, from the hops that are heard; three speeds, weighed by attention."""
    scores, attention = [], []
    for branch, speed in _BRANCHES:
        num_hops = int(readings.shape[1] * speed)
        stretched = F.interpolate(readings[None], size=num_hops, mode="linear", align_corners=True)
        heard = F.interpolate(is_heard[None, None], size=num_hops, mode="nearest")
        output = _convolve(f"decoder.{branch}_layers", stretched, weights)  # [1, 2, hops]: attention, score
        mean = (output * heard).sum(dim=2) / heard.sum(dim=2).clamp(min=1.0)
        attention.append(mean[0, 0])
        scores.append(mean[0, 1])
    return (torch.stack(scores) * torch.stack(attention).softmax(dim=0)).sum()


def _weights_path() -> Path:
    """Where the installed package keeps its weights; the package itself is not imported."""
    spec = find_spec("perth")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / _WEIGHTS).is_file():
            return Path(folder) / _WEIGHTS
    raise ImportError("the watermark needs Perth's weights: pip install resemble-perth==1.0.1 (or ask for watermark off)")


@cache
def _load_weights(path: Path) -> dict[str, Tensor]:
    """Perth's tensors. Its file is a torch pickle, the only one we read: digest checked, tensors only."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _WEIGHTS_SHA256:
        raise ImportError(f"{path} is not the file that resemble-perth 1.0.1 ships; pip install --force-reinstall resemble-perth==1.0.1")
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "decoder."))}
