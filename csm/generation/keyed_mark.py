"""Our own mark: a pattern of small level changes over time and frequency that only the key's holder can look for.

Between 250 Hz and 7 kHz the spectrum is cut into cells of 94 Hz by 24 ms. Each is made louder or softer by `STRENGTH_DB`, as a
sign drawn from the key says; the pattern of signs repeats every 1.5 s. A detector that knows the key correlates the levels,
freed of what speech does slowly, with the signs, at every offset in time and at some speeds. It needs no weights and no
training. Its chance of a false alarm is a theorem: for sound made without the key, the statistic is a sum of signs drawn
apart from the sound, and such sums have at most 3.18 times the tail of a normal distribution (Bentkus and Dzindzalieta 2015,
"A tight Gaussian bound for weighted sums of Rademacher random variables"); the bound is multiplied by the number of places
searched. Whoever knows the key can take the mark out or put it into anything; so can, in part, whoever has very many marked
clips, as the pattern is the same in all of them.
Source: spread spectrum (Cox et al. 1997) and patchwork marks (Yeo and Kim 2003) are the ideas; code and constants are ours.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import os

import soxr
import torch
import torch.nn.functional as F
from torch import Tensor

from csm.config import WATERMARK_KEY_VARIABLE
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.spectral_stream import SpectralStream
from csm.generation.watermark import Watermarker, WatermarkResult, WatermarkStream, resampled

STRENGTH_DB = 1.75  # +- of a cell's level; 17 dB below speech, see docs/watermark.md
MAX_P_VALUE = 1e-6  # of a clip that is called marked
PUBLIC_KEY = b"csm-lab public watermark key"  # anyone can verify with it, and forge; CSM_WATERMARK_KEY sets another
MIN_KEY_LENGTH = 16  # characters
_PURPOSE = b"csm-lab keyed mark, version 1"  # what else is made of the same key has other bits

_WINDOW, _HOP = 768, 192  # samples at 24 kHz: 32 and 8 ms; a bin is 31.25 Hz
_FIRST_BIN, _CELL_BINS, _NUM_CELLS = 8, 3, 72  # 250 to 7000 Hz
_CELL_HOPS, _PERIOD = 3, 64  # a cell lasts 24 ms, the pattern 1.536 s
_FIRST_BLOCK_HOPS, _BLOCK_HOPS = 4, 5

# The detector's view: frames of half a hop, so that no cell is met more than 2 ms off its middle.
_FRAME = _HOP // 2
_CELL_FRAMES = 2 * _CELL_HOPS
_SLOW_FRAMES = 3 * _CELL_FRAMES + 1  # what lasts longer than this is speech, not the mark
_NEIGHBOUR_CELLS = 9  # what moves all of these together is speech, too
_CLIP_DB = 6.0  # onsets move levels by tens of dB; none may outweigh the rest
_NOISE_SHARE = 0.1  # of the time a cell's level is taken for noise
_LONGEST_S, _STEP_S = 8.0, 4.0  # longer clips are searched in pieces: a part may be marked, clocks drift
_SPEEDS = tuple(round(1 + percent / 100, 2) for percent in range(-6, 7) if percent)
_NUM_PIECES_AT_SPEEDS = 4  # other speeds cost twelve times as much: only the first half minute is searched
_TAIL_CONSTANT = 3.18


class KeyedWatermarker(Watermarker):
    """Marks with, and looks for, the pattern of one key.

    Args:
        key: None takes the one of the environment variable `CSM_WATERMARK_KEY`, and the public one where that is not set.
    """

    name = "keyed"

    def __init__(self, key: bytes | None = None) -> None:
        self.key_kind = "given"
        if key is None:
            key, self.key_kind = key_from_environment()
        self._signs = _signs_from_key(key)  # [cells, period]

    def stream(self) -> WatermarkStream:
        return _KeyedStream(self._signs)

    @torch.no_grad()
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        """Look for the mark in float32 [S], at any sample rate and at speeds within 6%.

        Half of the allowance for false alarms goes to the speed as it is, half to all others together.
        """
        pieces = _pieces(resampled(waveform, sample_rate))
        p_value = min(self._p_value(piece) * 2 * len(pieces) for piece in pieces)
        if p_value > MAX_P_VALUE:
            chosen = pieces[:_NUM_PIECES_AT_SPEEDS]
            for speed in _SPEEDS:
                for piece in chosen:
                    slowed = torch.from_numpy(soxr.resample(piece.numpy(), SAMPLE_RATE_HZ, SAMPLE_RATE_HZ * speed))
                    p_value = min(p_value, self._p_value(slowed) * 2 * len(chosen) * len(_SPEEDS))
        p_value = min(1.0, p_value)
        return WatermarkResult(p_value <= MAX_P_VALUE, 1.0 - p_value, p_value)

    def _p_value(self, piece: Tensor) -> float:
        scores = _scores(_readings(piece), self._signs)
        tail = _TAIL_CONSTANT * 0.5 * math.erfc(float(scores.max()) / math.sqrt(2.0))
        return min(1.0, tail * scores.numel())


class _KeyedStream(SpectralStream):
    def __init__(self, signs: Tensor) -> None:
        super().__init__(_WINDOW, _HOP, _FIRST_BLOCK_HOPS, _BLOCK_HOPS)
        factors = 10.0 ** (signs * STRENGTH_DB / 20.0)
        self._factors = F.pad(factors.repeat_interleave(_CELL_BINS, dim=0), (0, 0, _FIRST_BIN, 0), value=1.0)  # [bins, period]

    def _gains(self, spectra: Tensor, first_hop: int) -> Tensor:
        hops = torch.arange(first_hop, first_hop + spectra.shape[1])
        return self._factors[:, (hops // _CELL_HOPS) % _PERIOD]


def key_from_environment() -> tuple[bytes, str]:
    """The key to mark and look with, and whether it is "secret" or "public".

    Raises:
        ValueError: if the variable holds a key that is too short; the message does not show it.
    """
    value = os.environ.get(WATERMARK_KEY_VARIABLE)
    if value is None:
        return PUBLIC_KEY, "public"
    if len(value.strip()) < MIN_KEY_LENGTH:
        raise ValueError(
            f"{WATERMARK_KEY_VARIABLE} holds a key of {len(value.strip())} characters, expected at least {MIN_KEY_LENGTH}; "
            "python -c 'import secrets; print(secrets.token_hex(32))' makes one, and unsetting it means the public key"
        )
    return value.strip().encode(), "secret"


def _signs_from_key(key: bytes) -> Tensor:
    """+1 and -1, float32 [cells, period], from the key alone."""
    num_bits = _NUM_CELLS * _PERIOD
    blocks = [hmac.digest(key, _PURPOSE + index.to_bytes(4, "big"), hashlib.sha256) for index in range(num_bits // 256)]
    octets = torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8)
    bits = (octets[:, None] >> torch.arange(8)) & 1
    return (bits.float() * 2.0 - 1.0).view(_NUM_CELLS, _PERIOD)


def _pieces(waveform: Tensor) -> list[Tensor]:
    """The clip, or overlapping pieces of a long one, the last ending where the clip ends."""
    size, step = round(_LONGEST_S * SAMPLE_RATE_HZ), round(_STEP_S * SAMPLE_RATE_HZ)
    last = waveform.shape[0] - size
    if last <= step:
        return [waveform]
    return [waveform[start : start + size] for start in [*range(0, last, step), last]]


def _readings(waveform: Tensor) -> Tensor:
    """What the mark would change: decibels by which cells stand out from before, after and beside them, [cells, frames].

    Depends on the sound alone, never on a key; the bound on false alarms rests on it.
    """
    waveform = F.pad(waveform, (0, max(0, _WINDOW - waveform.shape[0])))
    spectra = torch.stft(waveform, _WINDOW, _FRAME, window=torch.hann_window(_WINDOW), pad_mode="constant", return_complex=True)
    power = spectra.abs().square()
    last_bin = _FIRST_BIN + _CELL_BINS * _NUM_CELLS
    power = power[_FIRST_BIN:last_bin].view(_NUM_CELLS, _CELL_BINS, -1).mean(dim=1) + 1e-9 * power.max() + 1e-12
    level_db = 10.0 * power.log10()
    cell_db = _moving_mean(level_db, _CELL_FRAMES + 1)
    readings = cell_db - _moving_mean(level_db, _SLOW_FRAMES)
    readings = readings - _moving_mean(readings.T, _NEIGHBOUR_CELLS).T
    readings = (readings / _CLIP_DB).tanh() * _CLIP_DB
    noise_db = cell_db.quantile(_NOISE_SHARE, dim=1, keepdim=True)
    return readings * (1.0 - 10.0 ** ((noise_db - cell_db) / 10.0)).clamp(min=0.0)


def _scores(readings: Tensor, signs: Tensor) -> Tensor:
    """Correlations with the pattern in standard deviations, [phases within a cell, offsets of the pattern]."""
    rows = []
    spectrum = torch.fft.rfft(signs, dim=1)
    for phase in range(_CELL_FRAMES):
        cells = readings[:, phase::_CELL_FRAMES]
        folded = F.pad(cells, (0, -cells.shape[1] % _PERIOD)).view(_NUM_CELLS, -1, _PERIOD).sum(dim=1)
        products = torch.fft.irfft((torch.fft.rfft(folded, dim=1).conj() * spectrum).sum(dim=0), n=_PERIOD)
        rows.append(products / folded.square().sum().sqrt().clamp(min=1e-9))
    return torch.stack(rows)


def _moving_mean(values: Tensor, width: int) -> Tensor:
    """Mean of `width` (odd) neighbours along the last dimension, [rows, columns]; edges are repeated."""
    return F.avg_pool1d(F.pad(values[None], (width // 2, width // 2), mode="replicate"), width, stride=1)[0]
