"""Perth, Resemble AI's watermark: its published weights in our own code.

Perth (MIT licence, `resemble-perth` on PyPI, weights inside the wheel) moves magnitudes below 2 kHz. Two small networks: one
reads 10 ms spectra and says by how many decibels to move each bin, one reads spectra and says how likely they are marked. We
run its published weights ourselves, for three reasons: the package's imports pull in librosa, torchaudio and pkg_resources,
which current environments lack; its spectra (64 ms windows, 10 ms hops) can be taken at 24 kHz as well as at its 32, which
saves resampling; and it marks whole clips, while we must mark a stream.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ
from csm.generation.spectral_stream import SpectralStream
from csm.generation.watermark import Watermarker, WatermarkResult, WatermarkStream, resampled
from csm.packaged import PackagedWeights

DETECTION_THRESHOLD = 0.40  # see PerthWatermarker
WEIGHTS = PackagedWeights(
    "Perth, the second watermark",
    "resemble-perth==1.0.1",
    "implicit/perth_net_250000.pth.tar",
    "a15bce457ebc53ce5e6c9c3f11df78cf7ee2bf9cdab0a798902135b4c4027670",
    or_else=", or ask for --watermark keyed",
)
_WINDOW_S, _HOP_S = 0.064, 0.010
_NUM_FFT, _HOP = round(_WINDOW_S * SAMPLE_RATE_HZ), round(_HOP_S * SAMPLE_RATE_HZ)  # 1536 and 240 samples at 24 kHz
_PERTH_NUM_FFT = 2048  # at 32 kHz: magnitudes of our shorter windows are scaled up to its
_NUM_BINS = 128  # up to 2 kHz, 15.6 Hz each
_FLOOR_DB, _RANGE_DB = -180.0, 195.0  # a magnitude is read as (dB - floor) / range
_SILENCE = 0.05  # hops whose mean reading is below this share of the loudest are neither marked nor read
_FIRST_BLOCK_HOPS, _BLOCK_HOPS = 4, 8  # the first is shorter, so that sound comes after the first frame of a codec
_DETECTION_FLOOR_DB = -25.0  # below the mean power under 2 kHz: what the detector is not let to see, see PerthWatermarker
_BRANCHES = (("slow", 1.25), ("normal", 1.0), ("fast", 0.75))  # the detector listens at three speeds


class PerthWatermarker(Watermarker):
    """Perth's implicit watermark: one bit, present or not.

    Its detector takes holes in the spectrum for the mark: of unmarked clips it accepts, with confidences up to 1.0, 13 of 16
    with everything below 50 Hz cut away, 16 of 16 below 120 Hz, and 40 of 40 that went through our offline codec. So `detect`
    fills the holes: power 25 dB below the mean is added to every bin. That is not enough to decide by: the threshold was chosen
    on 40 clips, and of 50 others from our offline codec, unmarked, 6 are still accepted, while of 50 marked clips of human
    speech 23 are missed (docs/watermark.md). So `keyed` decides.
    """

    name = "perth"

    def __init__(self) -> None:
        self._path = WEIGHTS.find()  # now, so that a missing package is told before any work; read when first used

    def stream(self) -> WatermarkStream:
        return _PerthStream(_load_weights(self._path))

    @torch.no_grad()
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        waveform = resampled(waveform, sample_rate)
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


class _PerthStream(SpectralStream):
    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__(_NUM_FFT, _HOP, _FIRST_BLOCK_HOPS, _BLOCK_HOPS)
        self._weights = weights
        self._peak = 0.0

    def _gains(self, spectra: Tensor, first_hop: int) -> Tensor:
        readings = _read(spectra)
        loudness = readings.sum(dim=0)
        self._peak = max(self._peak, float(loudness.max()))
        is_heard = (loudness > _SILENCE * self._peak).float()
        gain_db = _RANGE_DB * _convolve("encoder.layers", readings[None, :_NUM_BINS], self._weights)[0] * is_heard
        return 10.0 ** (gain_db / 20.0)


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


@cache
def _load_weights(path: Path) -> dict[str, Tensor]:
    """Perth's tensors. Its file is a torch pickle: digest checked, tensors only."""
    state = torch.load(WEIGHTS.checked(path), map_location="cpu", weights_only=True)["model"]
    return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "decoder."))}
