"""Log-mels back to sound, 80 ms at a time: mel inversion, and Griffin-Lim on blocks with one frame of look-ahead.

Samples that went out stay as they are; the phases of the current frame and of the look-ahead frame are iterated until they
agree with them and with the magnitudes, then the current frame is committed. Source of the idea: Zhu, Beauregard and Wyse,
"Real-Time Signal Estimation From Modified STFT Magnitude Spectra" (RTISI-LA, 2007), here on blocks of 8 hops, and the
momentum of Perraudin, Balazs and Sondergaard, "A fast Griffin-Lim algorithm" (2013).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from csm.codec.mel import HOP_SAMPLES, HOPS_PER_FRAME, MARGIN_SAMPLES, NUM_BINS, NUM_FFT, analysis_window, mel_filters
from csm.frames import SAMPLES_PER_FRAME

NUM_ITERATIONS = 16  # of Griffin-Lim a block; each hop is iterated twice, ahead and then in its own block
MOMENTUM = 0.9
NUM_INVERSION_STEPS = 20  # of the multiplicative mel inversion
_HOPS_PER_WINDOW = math.ceil(NUM_FFT / HOP_SAMPLES)  # 5
_OVERLAP_HOPS = _HOPS_PER_WINDOW - 1
_SMALL = 1e-8


def magnitudes_from_log_mels(log_mels: Tensor) -> Tensor:
    """Non-negative magnitudes whose mel bands match: [n, NUM_MELS] -> [n, NUM_BINS].

    Multiplicative least squares (Lee and Seung, 2001) from the spread-out bands: stays positive and smooth where the
    bands say nothing.
    """
    filters = mel_filters(log_mels.device)  # [NUM_BINS, NUM_MELS]
    mels = log_mels.exp()
    target = mels @ filters.T  # [n, NUM_BINS]
    magnitudes = target / filters.square().sum(dim=1).clamp(min=0.25)
    for _ in range(NUM_INVERSION_STEPS):
        magnitudes = magnitudes * target / ((magnitudes @ filters) @ filters.T + _SMALL)
    return magnitudes


class PhaseStream:
    """Turns magnitudes into samples block by block; what `push` returns is final.

    The first push returns nothing, the second 1528 samples, later ones 1920 each, and `finish` the remaining 2312.
    """

    def __init__(self, device: torch.device) -> None:
        self._window = analysis_window(device)
        squared = F.pad(self._window.square(), (0, _HOPS_PER_WINDOW * HOP_SAMPLES - NUM_FFT))
        self._squared = squared.reshape(_HOPS_PER_WINDOW, HOP_SAMPLES)
        self._steady = self._squared.sum(dim=0).mean()
        self._tail = torch.zeros(_OVERLAP_HOPS, HOP_SAMPLES, device=device)  # committed windows that reach ahead, and
        self._tail_weight = torch.zeros(_OVERLAP_HOPS, HOP_SAMPLES, device=device)  # their squared windows
        self._last = torch.zeros(NUM_BINS, dtype=torch.complex64, device=device)  # spectrum of the last committed hop
        self._pending: Tensor | None = None  # magnitudes of the block that waits for its look-ahead
        self._pending_phase: Tensor | None = None  # its unit phasors, iterated while it was look-ahead
        self._is_first = True
        self._advance = torch.exp(2j * math.pi * HOP_SAMPLES / NUM_FFT * torch.arange(NUM_BINS, device=device))

    def push(self, magnitudes: Tensor) -> Tensor:
        """Take one block, [8, NUM_BINS]."""
        if self._pending is None:
            self._pending = magnitudes
            return magnitudes.new_zeros(0)
        return self._commit(self._pending, magnitudes)

    def finish(self) -> Tensor:
        """Samples of the block that waited; nothing comes after it."""
        if self._pending is None:
            return self._tail.new_zeros(0)
        return self._commit(self._pending, None)

    def _commit(self, current: Tensor, ahead: Tensor | None) -> Tensor:
        magnitudes = current if ahead is None else torch.cat([current, ahead])
        num_hops = magnitudes.shape[0]
        weight = self._overlap(self._squared.expand(num_hops, -1, -1))
        weight[:_OVERLAP_HOPS] += self._tail_weight
        weight = weight.clamp(min=0.1 * self._steady)
        spectrum = magnitudes * self._first_guess(magnitudes)
        previous: Tensor | None = None
        for _ in range(NUM_ITERATIONS):
            signal = self._synthesise(spectrum, weight, is_last=ahead is None)
            windows = signal.flatten().unfold(0, NUM_FFT, HOP_SAMPLES)[:num_hops]
            estimate = torch.fft.rfft(windows * self._window)
            pushed = estimate if previous is None else estimate + MOMENTUM * (estimate - previous)
            previous = estimate
            spectrum = magnitudes * _phasors(pushed)
        signal = self._synthesise(spectrum, weight, is_last=ahead is None).flatten()
        start = MARGIN_SAMPLES if self._is_first else 0
        self._is_first = False
        if ahead is None:
            self._pending = None
            return signal[start : SAMPLES_PER_FRAME + MARGIN_SAMPLES]
        committed = self._windowed(spectrum[:HOPS_PER_FRAME])
        self._tail = self._overlap(committed)[HOPS_PER_FRAME:]
        self._tail_weight = self._overlap(self._squared.expand(HOPS_PER_FRAME, -1, -1))[HOPS_PER_FRAME:]
        self._last = spectrum[HOPS_PER_FRAME - 1]
        self._pending = ahead
        self._pending_phase = _phasors(spectrum[HOPS_PER_FRAME:])
        return signal[start:SAMPLES_PER_FRAME]

    def _first_guess(self, magnitudes: Tensor) -> Tensor:
        """Unit phasors: kept from the look-ahead where there are any, carried on from the hop before where not."""
        phases = [] if self._pending_phase is None else list(self._pending_phase)
        phase = phases[-1] if phases else _phasors(self._last)
        for hop in range(len(phases), magnitudes.shape[0]):
            phase = phase * self._advance
            phase = torch.where(phase == 0, torch.ones_like(phase), phase)
            phases.append(phase)
        return torch.stack(phases)

    def _windowed(self, spectrum: Tensor) -> Tensor:
        windows = torch.fft.irfft(spectrum, n=NUM_FFT) * self._window
        return F.pad(windows, (0, _HOPS_PER_WINDOW * HOP_SAMPLES - NUM_FFT)).reshape(-1, _HOPS_PER_WINDOW, HOP_SAMPLES)

    def _overlap(self, windows: Tensor) -> Tensor:
        """Add windows [n, 5, HOP] at their places: [n + 4, HOP]."""
        num_hops = windows.shape[0]
        total = windows.new_zeros(num_hops + _OVERLAP_HOPS, HOP_SAMPLES)
        for shift in range(_HOPS_PER_WINDOW):
            total[shift : shift + num_hops] += windows[:, shift]
        return total

    def _synthesise(self, spectrum: Tensor, weight: Tensor, *, is_last: bool) -> Tensor:
        signal = self._overlap(self._windowed(spectrum))
        signal[:_OVERLAP_HOPS] += self._tail
        signal = signal / weight
        if self._is_first:
            signal.flatten()[:MARGIN_SAMPLES] = 0.0  # nothing sounds before the clip
        if is_last:
            signal.flatten()[SAMPLES_PER_FRAME + MARGIN_SAMPLES :] = 0.0  # nor after it
        return signal


def _phasors(spectrum: Tensor) -> Tensor:
    """Divided by its magnitude; what is nothing stays nothing (torch.sgn gives NaN where the magnitude underflows)."""
    return spectrum / spectrum.abs().clamp(min=1e-12)
