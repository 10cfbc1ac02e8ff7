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

NUM_ITERATIONS = 12  # of Griffin-Lim a block; each hop gets them twice, ahead and then in its own block
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
        self._centred = (1 - 2 * (torch.arange(NUM_BINS, device=device) % 2)).to(torch.complex64)

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
        kept = magnitudes.new_zeros(0, NUM_BINS, dtype=torch.complex64) if self._pending_phase is None else self._pending_phase
        before = kept[-1] if kept.shape[0] else _phasors(self._last)
        start = torch.where(before.abs() < 0.5, self._centred, before)  # a bin that was silent starts like a click amid the window
        advance = 2.0 * math.pi * HOP_SAMPLES / NUM_FFT * _peak_bins(magnitudes[kept.shape[0] :]).cumsum(dim=0)
        return torch.cat([kept, start * torch.polar(torch.ones_like(advance), advance)])

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


def _peak_bins(magnitudes: Tensor) -> Tensor:
    """Frequency of the spectral peak each bin belongs to, in bins: a partial turns all bins around it at its own rate.

    Nearest local maximum, refined by a parabola through the logarithms; a hop without one keeps each bin's own frequency.
    [n, NUM_BINS] -> [n, NUM_BINS]. Source: the phase-locked vocoder of Laroche and Dolson (1999).
    """
    logs = (magnitudes + _SMALL).log()
    left, middle, right = logs[:, :-2], logs[:, 1:-1], logs[:, 2:]
    is_peak = F.pad((middle >= left) & (middle > right), (1, 1))
    shift = 0.5 * (left - right) / (left - 2.0 * middle + right).clamp(max=-_SMALL)
    bins = torch.arange(NUM_BINS, device=magnitudes.device)
    refined = bins + F.pad(shift.clamp(-0.5, 0.5), (1, 1))
    below = torch.where(is_peak, bins, -NUM_BINS).cummax(dim=1).values
    above = torch.where(is_peak, bins, 2 * NUM_BINS).flip(1).cummin(dim=1).values.flip(1)
    nearest = torch.where(bins - below <= above - bins, below, above)
    has_peak = is_peak.any(dim=1, keepdim=True)
    return torch.where(has_peak, refined.gather(1, nearest.clamp(0, NUM_BINS - 1)), bins.to(refined.dtype))
