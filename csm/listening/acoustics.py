"""Waveforms as evaluators see them: resampled, trimmed, and as log-mel spectrograms; and how far two clips lie apart."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import soxr
from transformers.audio_utils import mel_filter_bank

from csm.frames import SAMPLE_RATE_HZ

SILENT_DB = -60.0  # of full scale, root mean square: a clip below it counts as empty
_TRIM_DB = -40.0  # below the loudest 20 ms window
_TRIM_WINDOW_S = 0.02
_SHORTEST_PAUSE_S = 0.15  # below it lie the closures of stops


def resample(audio: np.ndarray, to_hz: int) -> np.ndarray:
    """24 kHz float32 [S] to another rate, float32."""
    return soxr.resample(audio, SAMPLE_RATE_HZ, to_hz).astype(np.float32, copy=False)


def peak(audio: np.ndarray) -> float:
    """The largest magnitude, without a copy of the samples: of hours that is a gigabyte."""
    return float(max(audio.max(initial=0.0), -audio.min(initial=0.0)))


def is_silent(audio: np.ndarray) -> bool:
    """Whether there is nothing to hear: no samples, or all of it below -60 dBFS."""
    return audio.size == 0 or float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))) < 10 ** (SILENT_DB / 20)


def trim_silence(audio: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Cut what lies before the first and after the last 20 ms window within 40 dB of the loudest one."""
    loud, size = _loud_windows(audio, rate_hz)
    return audio[loud[0] * size : (loud[-1] + 1) * size] if loud.size else audio


def silence_tail_s(audio: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> float:
    """Seconds after the last 20 ms window within 40 dB of the loudest one."""
    loud, size = _loud_windows(audio, rate_hz)
    return max(0.0, len(audio) - (loud[-1] + 1) * size if loud.size else len(audio)) / rate_hz


def pauses_s(audio: np.ndarray, rate_hz: int = SAMPLE_RATE_HZ) -> list[float]:
    """Lengths of the silences of 0.15 s and more between what is loud: 20 ms windows within 40 dB of the loudest one."""
    loud, size = _loud_windows(audio, rate_hz)
    gaps = (np.diff(loud) - 1) * size / rate_hz
    return [float(gap) for gap in gaps if gap >= _SHORTEST_PAUSE_S]


def _loud_windows(audio: np.ndarray, rate_hz: int) -> tuple[np.ndarray, int]:
    """(indices of the 20 ms windows within 40 dB of the loudest one, samples a window)."""
    size = round(_TRIM_WINDOW_S * rate_hz)
    num_windows = len(audio) // size
    if num_windows == 0:
        return np.zeros(0, int), size
    energy = np.square(audio[: num_windows * size].reshape(num_windows, size), dtype=np.float64).mean(axis=1)
    return np.flatnonzero(energy > energy.max() * 10 ** (_TRIM_DB / 10)), size


@lru_cache(maxsize=8)
def _filters(num_mels: int, fft_size: int, rate_hz: int) -> np.ndarray:
    # Slaney's scale and area norm: librosa's default, which the speaker encoder was trained on.
    return mel_filter_bank(fft_size // 2 + 1, num_mels, 0.0, rate_hz / 2, rate_hz, norm="slaney", mel_scale="slaney")


def mel_spectrogram(audio: np.ndarray, *, num_mels: int, fft_size: int, hop: int, rate_hz: int) -> np.ndarray:
    """Mel power spectrogram, float32 [1 + S // hop, num_mels]; frames centred, ends padded with zeros."""
    padded = np.pad(audio.astype(np.float32), fft_size // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, fft_size)[::hop]
    periodic_hann = np.hanning(fft_size + 1)[:-1].astype(np.float32)
    power = np.abs(np.fft.rfft(windows * periodic_hann, axis=1)) ** 2
    return (power @ _filters(num_mels, fft_size, rate_hz)).astype(np.float32)


def log_mel_db(audio: np.ndarray, *, hop: int = 480) -> np.ndarray:
    """80 log-mels of 24 kHz audio in dB, [frames, 80]; 20 ms a frame by default, floor at -80 dB."""
    power = mel_spectrogram(audio, num_mels=80, fft_size=1024, hop=hop, rate_hz=SAMPLE_RATE_HZ)
    return 10 * np.log10(np.maximum(power, 1e-8))


def mel_distance_db(audio: np.ndarray, reference: np.ndarray) -> float:
    """Mean absolute log-mel difference in dB, silence trimmed, along the best dynamic time warping path.

    What the word error rate hardly hears, the fine structure that codebooks 1..K-1 carry, shows here. 0 for equal clips.
    """
    one, other = (log_mel_db(trim_silence(clip)) for clip in (audio, reference))
    cost = np.abs(one[:, None, :] - other[None, :, :]).mean(axis=2)
    return _warped_mean(cost)


def _warped_mean(cost: np.ndarray) -> float:
    """Mean cost along the cheapest monotone path from corner to corner of `cost` [M, N].

    Walks anti-diagonals so that numpy does the inner loop; steps are right, down and diagonal, all of weight one.
    """
    num_rows, num_columns = cost.shape
    total = np.full((num_rows, num_columns), np.inf)
    steps = np.zeros((num_rows, num_columns))
    total[0, 0], steps[0, 0] = cost[0, 0], 1
    for diagonal in range(1, num_rows + num_columns - 1):
        i = np.arange(max(0, diagonal - num_columns + 1), min(num_rows, diagonal + 1))
        j = diagonal - i
        before = np.full((3, len(i)), np.inf)
        length = np.zeros((3, len(i)))
        for way, (di, dj) in enumerate(((1, 1), (1, 0), (0, 1))):  # the diagonal first: it wins ties and keeps paths short
            inside = (i >= di) & (j >= dj)
            before[way, inside] = total[i[inside] - di, j[inside] - dj]
            length[way, inside] = steps[i[inside] - di, j[inside] - dj]
        best = before.argmin(axis=0)
        columns = np.arange(len(i))
        total[i, j] = before[best, columns] + cost[i, j]
        steps[i, j] = length[best, columns] + 1
    return float(total[-1, -1] / steps[-1, -1])
