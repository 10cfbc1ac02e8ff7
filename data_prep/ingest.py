"""A recording becomes 24 kHz float32 at one loudness, mono or a row a channel; or it is rejected, with the reason.

Decoding and resampling go block by block, so memory is that of the result: 6 MB a minute and channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soxr

from csm.config import IngestConfig
from csm.frames import SAMPLE_RATE_HZ
from csm.listening.acoustics import peak
from data_prep.decode import Header, read_blocks, read_header
from data_prep.failures import Rejected

FULL_SCALE = 32_767 / 32_768  # the largest 16-bit sample; floating point files clip above it
SILENCE_PEAK = 1e-3  # -60 dBFS: nothing louder than that is nothing said
NUM_LOUDNESS_MIN = 10  # loudness of a longer recording is that of as many minutes, spread over it; each takes 40 MB
_MINUTE = 60 * SAMPLE_RATE_HZ
_OVERSAMPLING = 4  # of the true peak; source: ITU-R BS.1770-4, annex 2


@dataclass
class Ingested:
    """A recording ready to be cut.

    Attributes:
        audio: [C, S] float32 at 24 kHz; one row when the channels are mixed.
        clipping: share of the file's samples at full scale.
        gain_db: of each row, as applied.
    """

    audio: np.ndarray
    clipping: float
    gain_db: list[float]

    @property
    def duration_s(self) -> float:
        return self.audio.shape[1] / SAMPLE_RATE_HZ


def ingest(path: Path, config: IngestConfig, *, by_channel: bool = False, channel: int | None = None) -> Ingested:
    """Decode, resample once, level.

    Args:
        by_channel: keep channels apart (each is a speaker); else they are averaged.
        channel: of those kept apart, the only one to return, as if the others were there: of hours, each takes a gigabyte.
    Raises:
        Rejected: what `read_header` and `read_blocks` reject, and "too_long", "not_finite", "clipped", "silent".
    """
    header = read_header(path)
    max_s = config.max_recording_min * 60
    if header.duration_s > max_s:
        raise Rejected("too_long", f"{header.duration_s / 60:.0f} min, ingest.max_recording_min={config.max_recording_min:g}")
    audio, clipping, highest = _decode(path, header, by_channel, channel, max_s)
    if clipping > config.max_clipping:
        raise Rejected("clipped", f"{clipping:.1%} of its samples are at full scale, ingest.max_clipping={config.max_clipping:g}")
    if highest < SILENCE_PEAK:
        raise Rejected("silent", "nothing in it is louder than -60 dBFS")
    gains = [_level(row, config) for row in audio]
    return Ingested(audio, clipping, gains)


def loudness_lufs(row: np.ndarray) -> float:
    """Integrated loudness of [S] at 24 kHz (BS.1770, gated); -inf where nothing passes the gate."""
    if len(row) > NUM_LOUDNESS_MIN * _MINUTE:
        starts = np.linspace(0, len(row) - _MINUTE, NUM_LOUDNESS_MIN).astype(int)
        row = np.concatenate([row[start : start + _MINUTE] for start in starts])
    shortest = int(0.4 * SAMPLE_RATE_HZ) + 1  # one gating block
    if len(row) < shortest:
        row = np.tile(row, -(-shortest // len(row)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(_meter().integrated_loudness(row.astype(np.float64)))


def true_peak(row: np.ndarray) -> float:
    """The highest point of the waveform between its samples, [S] at 24 kHz, four times oversampled."""
    highest = peak(row)
    for start in range(0, len(row), _MINUTE):
        # A second more on each side: the filter's ends lie outside of the minute.
        part = row[max(0, start - SAMPLE_RATE_HZ) : start + _MINUTE + SAMPLE_RATE_HZ]
        highest = max(highest, peak(soxr.resample(part, 1, _OVERSAMPLING)))
    return highest


@lru_cache(maxsize=1)
def _meter():  # type: ignore[no-untyped-def]  # pyloudnorm has no types
    try:
        import pyloudnorm
    except ImportError as error:
        raise ImportError("loudness is measured by pyloudnorm: run `pip install pyloudnorm`") from error
    return pyloudnorm.Meter(SAMPLE_RATE_HZ)


def _decode(path: Path, header: Header, by_channel: bool, channel: int | None, max_s: float) -> tuple[np.ndarray, float, float]:
    """([C, S] float32 at 24 kHz, share of samples at full scale, largest magnitude), the latter two of all channels."""
    kept = slice(None) if channel is None else slice(channel, channel + 1)
    num_rows = header.num_channels if by_channel and channel is None else 1
    resampler = None
    if header.sample_rate_hz != SAMPLE_RATE_HZ:
        resampler = soxr.ResampleStream(header.sample_rate_hz, SAMPLE_RATE_HZ, num_rows, dtype="float32", quality="HQ")
    audio = _Growing(num_rows, round(header.duration_s * SAMPLE_RATE_HZ) + SAMPLE_RATE_HZ)
    num_samples = num_clipped = 0
    highest = 0.0
    for block in read_blocks(path, header):
        if block.shape[1] != header.num_channels:
            raise Rejected("bad_format", f"its channels change from {header.num_channels} to {block.shape[1]}")
        if not np.isfinite(block).all():
            raise Rejected("not_finite", "it holds samples that are not numbers")
        num_samples += len(block)
        if num_samples > max_s * header.sample_rate_hz:
            raise Rejected("too_long", f"more than {max_s / 60:g} min (ingest.max_recording_min)")
        num_clipped += int((np.abs(block) >= FULL_SCALE).sum())
        rows = block if by_channel else block.mean(axis=1, keepdims=True, dtype=np.float32)
        highest = max(highest, peak(rows))
        rows = rows[:, kept]
        audio.append(rows if resampler is None else resampler.resample_chunk(rows))
    if num_samples == 0:
        raise Rejected("empty", "no samples in it")
    if resampler is not None:
        audio.append(resampler.resample_chunk(np.zeros((0, num_rows), np.float32), last=True))
    if not audio.length:
        raise Rejected("empty", f"{num_samples} samples, less than one at {SAMPLE_RATE_HZ} Hz")
    return audio.rows[:, : audio.length], num_clipped / (num_samples * header.num_channels), highest


class _Growing:
    """Blocks joined as they come, [C, S] float32: hours of audio are never held twice where the header tells their length."""

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.rows = np.empty((num_rows, capacity), np.float32)
        self.length = 0

    def append(self, block: np.ndarray) -> None:
        """Take [S, C], or [S] of a single row."""
        block = block.reshape(-1, len(self.rows))
        needed = self.length + len(block)
        if needed > self.rows.shape[1]:
            grown = np.empty((len(self.rows), 2 * needed), np.float32)
            grown[:, : self.length] = self.rows[:, : self.length]
            self.rows = grown
        self.rows[:, self.length : needed] = block.T
        self.length = needed


def _level(row: np.ndarray, config: IngestConfig) -> float:
    """Bring [S] to the loudness asked for, in place, as far as its true peak allows. Returns the gain in dB."""
    measured = loudness_lufs(row)
    if not np.isfinite(measured):  # a silent channel beside one that speaks
        return 0.0
    gain_db = config.loudness_lufs - measured
    peak_db = 20 * np.log10(max(true_peak(row), 1e-9))
    gain_db = min(gain_db, config.peak_dbtp - peak_db)
    row *= np.float32(10 ** (gain_db / 20))
    return round(float(gain_db), 3)
