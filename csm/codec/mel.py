"""Framing and log-mels of the spectral codec: which samples a mel frame sees, and how loud it is in 80 bands.

Mel frame j looks at the 1024 samples centred on the middle of hop j, so 8 hops of 240 samples line up with one 80 ms
frame of codes and a frame depends on nothing further than 392 samples from its own 1920. Outside the clip there is silence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME, num_frames_from_samples, num_samples_from_frames

NUM_FFT = 1024
HOP_SAMPLES = 240
NUM_BINS = NUM_FFT // 2 + 1
NUM_MELS = 80
HOPS_PER_FRAME = SAMPLES_PER_FRAME // HOP_SAMPLES  # 8
MARGIN_SAMPLES = (NUM_FFT - HOP_SAMPLES) // 2  # 392, seen on each side of a frame
MEL_FLOOR = 1e-2  # of a band's summed magnitude, about -90 dB of full scale; everything below is silence
ROWS_PER_BLOCK = 256  # matrix products run on blocks of one size, so that a row's result does not depend on its neighbours


@lru_cache(maxsize=4)
def mel_filters(device: torch.device) -> Tensor:
    """Triangles on the HTK mel scale from 0 Hz to half the sampling rate, peak 1. [NUM_BINS, NUM_MELS] float32."""
    top_mel = 2595.0 * torch.log10(torch.tensor(1.0 + SAMPLE_RATE_HZ / 2 / 700.0, dtype=torch.float64))
    mels = torch.linspace(0.0, float(top_mel), NUM_MELS + 2, dtype=torch.float64)
    edges_hz = 700.0 * (10.0 ** (mels / 2595.0) - 1.0)
    bins_hz = torch.linspace(0.0, SAMPLE_RATE_HZ / 2, NUM_BINS, dtype=torch.float64)[:, None]
    rising = (bins_hz - edges_hz[:-2]) / (edges_hz[1:-1] - edges_hz[:-2])
    falling = (edges_hz[2:] - bins_hz) / (edges_hz[2:] - edges_hz[1:-1])
    return torch.minimum(rising, falling).clamp(min=0.0).float().to(device)


@lru_cache(maxsize=4)
def analysis_window(device: torch.device) -> Tensor:
    """Periodic Hann, [NUM_FFT] float32."""
    return torch.hann_window(NUM_FFT, device=device)


def hop_windows(waveform: Tensor, num_more_hops: int = 0) -> Tensor:
    """The samples each mel frame of a clip sees, silence around it. [S] -> view [8 * ceil(S / 1920) + num_more_hops, NUM_FFT]."""
    num_samples = num_samples_from_frames(num_frames_from_samples(waveform.shape[0])) + num_more_hops * HOP_SAMPLES
    padded = F.pad(waveform, (MARGIN_SAMPLES, num_samples - waveform.shape[0] + MARGIN_SAMPLES))
    return padded.unfold(0, NUM_FFT, HOP_SAMPLES)


def log_mels(windows: Sequence[Tensor]) -> Tensor:
    """Log magnitudes in mel bands of windows, each [n, NUM_FFT]: [sum n, NUM_MELS] float32, at least log(MEL_FLOOR)."""
    rows = torch.cat(list(windows))
    return in_blocks(_log_mels_of_block, rows)


def _log_mels_of_block(rows: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(rows * analysis_window(rows.device)).abs()  # [n, NUM_BINS]
    return (spectrum @ mel_filters(rows.device)).clamp(min=MEL_FLOOR).log()


def in_blocks(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """Apply a row-wise function to blocks of ROWS_PER_BLOCK rows, the last one padded with zeros."""
    num_rows = rows.shape[0]
    results = []
    for start in range(0, num_rows, ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        results.append(function(F.pad(block, (0, 0, 0, ROWS_PER_BLOCK - block.shape[0]))))
    return torch.cat(results)[:num_rows]
