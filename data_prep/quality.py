"""How good a turn sounds, and how much of it is speech: numbers that filters and users choose by. DNSMOS is
`csm.listening.naturalness`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from csm.frames import SAMPLE_RATE_HZ
from data_prep.ingest import FULL_SCALE
from data_prep.manifest import ManifestTurn
from data_prep.transcript import Span

_FRAME = SAMPLE_RATE_HZ // 50
_AROUND_S = 1.5  # before and after a turn: where its background is listened to
_MIN_BACKGROUND_S = 0.2
_BANDWIDTH_DB = 50.0  # below the loudest third-octave-wide band: what is quieter is not speech's spectrum any more


def turn_quality(clip: np.ndarray, start_s: float, end_s: float, speech: Sequence[Span], noise_db: float) -> dict[str, float]:
    """Measures of one turn but DNSMOS.

    Args:
        clip: 24 kHz float32 [S].
        speech: of its channel, in the recording.
        noise_db: level of the quiet parts of the recording.
    """
    level_db = _db(float(np.mean(np.square(clip, dtype=np.float64)))) if len(clip) else -120.0
    duration_s = max(end_s - start_s, 1e-6)
    heard_s = sum(max(0.0, min(end_s, span.end_s) - max(start_s, span.start_s)) for span in speech)
    return {
        "duration_s": round(duration_s, 4),
        "snr_db": round(level_db - noise_db, 2),
        "speech_share": round(min(1.0, heard_s / duration_s), 4),
        "bandwidth_hz": bandwidth_hz(clip),
        "clipping": round(float((np.abs(clip) >= FULL_SCALE).mean()) if len(clip) else 0.0, 6),
    }


def text_quality(turn: ManifestTurn) -> dict[str, float]:
    """What a turn's words say about whether they were said: how fast, and how many of them differ."""
    assert turn.start_s is not None and turn.end_s is not None
    duration_s = max(turn.end_s - turn.start_s, 1e-6)
    words = [word["word"].strip().lower() for word in turn.words] or turn.text.lower().split()
    return {
        "words_per_s": round(len(words) / duration_s, 3),
        "characters_per_s": round(len(turn.text) / duration_s, 3),
        "unique_share": round(len(set(words)) / max(1, len(words)), 4),
    }


def background_db(audio: np.ndarray, start_s: float, end_s: float, speech: Sequence[Span]) -> float | None:
    """Level of what is no speech within 1.5 s of a turn, over the turn's own: music or noise that goes on around it.

    The median of 20 ms frames, so a single knock does not count. None where there is hardly anything but speech.

    Args:
        audio: 24 kHz float32 [S], the recording or the turn's channel of it.
        speech: of that channel.
    """
    begin_s, stop_s = max(0.0, start_s - _AROUND_S), min(len(audio) / SAMPLE_RATE_HZ, end_s + _AROUND_S)
    around = audio[round(begin_s * SAMPLE_RATE_HZ) : round(stop_s * SAMPLE_RATE_HZ)]
    power = np.mean(np.square(around[: len(around) // _FRAME * _FRAME].reshape(-1, _FRAME), dtype=np.float64), axis=1)
    middles_s = begin_s + (np.arange(len(power)) + 0.5) * _FRAME / SAMPLE_RATE_HZ
    is_turn = (middles_s >= start_s) & (middles_s < end_s)
    is_quiet = ~is_turn
    for span in speech:
        is_quiet &= (middles_s < span.start_s) | (middles_s > span.end_s)
    if is_quiet.sum() * _FRAME < _MIN_BACKGROUND_S * SAMPLE_RATE_HZ or not is_turn.any():
        return None
    return round(_db(float(np.median(power[is_quiet]))) - _db(float(power[is_turn].mean())), 2)


def noise_level_db(audio: np.ndarray) -> float:
    """Level of the quiet parts of [S]: the tenth percentile of 20 ms frames; digital silence counts as -90 dB."""
    frames = audio[: len(audio) // _FRAME * _FRAME].reshape(-1, _FRAME)
    if not len(frames):
        return -90.0
    # Part by part: the squares of three hours are 2 GB.
    parts = [np.square(frames[first : first + 10_000], dtype=np.float64).mean(axis=1) for first in range(0, len(frames), 10_000)]
    return max(-90.0, _db(float(np.percentile(np.concatenate(parts), 10))))


def bandwidth_hz(clip: np.ndarray) -> float:
    """Up to where the spectrum of [S] at 24 kHz reaches: 3.4 kHz for telephones, 8 kHz for 16 kHz files."""
    size = 2048
    if len(clip) < size:
        clip = np.pad(clip, (0, size - len(clip)))
    windows = np.lib.stride_tricks.sliding_window_view(clip, size)[:: size // 2] * np.hanning(size).astype(np.float32)
    power = (np.abs(np.fft.rfft(windows, axis=1)) ** 2).mean(axis=0)
    smooth = np.convolve(power, np.ones(9) / 9, mode="same")
    above = np.flatnonzero(smooth > smooth.max() * 10 ** (-_BANDWIDTH_DB / 10))
    return round(float(above[-1] + 1) * SAMPLE_RATE_HZ / size, 1) if above.size else 0.0


def _db(power: float) -> float:
    return 10 * float(np.log10(max(power, 1e-12)))
