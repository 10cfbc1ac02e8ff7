"""Copies of a recording that differ in their bytes: another container, codec, rate, loudness, a little cut off.

The fingerprint is that of Haitsma and Kalker ("A Highly Robust Audio Fingerprinting System", ISMIR 2002): 32 bits a step, each whether the
energy difference of two neighbouring bands grows. No package that pip installs carries a fingerprinter (Chromaprint's library and
`fpcalc` come with the system), so it is reckoned here. Recordings are looked up by the few words of each that have the smallest
hashes, which a copy shares, and then compared bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soxr

from data_prep.decode import read_blocks, read_header
from data_prep.failures import Rejected
from data_prep.manifest import Recording

HEARD_S = 120.0  # from the beginning
_RATE_HZ = 8_000
_FRAME, _HOP = 3_072, 96  # 0.38 s each 12 ms: so long a frame that it hardly matters where it begins
_BANDS_HZ = np.geomspace(300.0, 2_000.0, 34)
_QUIET = 1e-4  # of the loudest frame's energy, -40 dB: below, bits are those of noise
_MIN_WORDS = 40  # half a second of frames; shorter recordings are told by their bytes alone
_NUM_LOOKED_UP = 64
# Share of bits. Measured on speech: 3% to 8% for mp3, Vorbis and Opus down to their lowest rates, 2% for a cut that falls between steps;
# 13% and more for one synthetic voice that says the same again, which is no copy, as for 20 dB of noise. Chance is 50%.
_MAX_DIFFERENT, _MAX_DIFFERENT_IN_QUARTER = 0.10, 0.15
_MIN_SHARED = 0.9  # of the shorter recording, heard in both
_MAX_LONGER_S, _MAX_LONGER = 1.0, 0.01  # a copy is as long as the first, but for a second or a hundredth


def fingerprint(path: Path) -> np.ndarray | None:
    """uint32 [W], a word each 12 ms of the first two minutes; 0 where it is quiet. None where there is too little to tell."""
    try:
        audio = _beginning(path)
    except Rejected:  # ingest says why
        return None
    if len(audio) < _FRAME + _MIN_WORDS * _HOP:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(audio, _FRAME)[::_HOP]
    edges = np.round(_BANDS_HZ * _FRAME / _RATE_HZ).astype(int)
    window = np.hanning(_FRAME).astype(np.float32)
    energies = np.concatenate([_energies(windows[first : first + 512] * window, edges) for first in range(0, len(windows), 512)])
    slopes = energies[:, :-1] - energies[:, 1:]  # [W, 32]
    bits = slopes[1:] > slopes[:-1]
    words = np.packbits(bits, axis=1).view(">u4")[:, 0].astype(np.uint32)
    loudness = energies.sum(axis=1)[1:]
    words[loudness <= loudness.max() * _QUIET] = 0
    return words if np.count_nonzero(words) >= _MIN_WORDS else None


def _beginning(path: Path) -> np.ndarray:
    """The first two minutes, mixed, float32 at 8 kHz."""
    header = read_header(path)
    resampler = soxr.ResampleStream(header.sample_rate_hz, _RATE_HZ, 1, dtype="float32", quality="HQ")
    parts, num_samples = [], 0
    for block in read_blocks(path, header):
        if not np.isfinite(block).all():
            raise Rejected("not_finite", "it holds samples that are not numbers")
        parts.append(resampler.resample_chunk(block.mean(axis=1, dtype=np.float32)))
        num_samples += len(block)
        if num_samples >= HEARD_S * header.sample_rate_hz:
            break
    parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
    return np.concatenate(parts)[: round(HEARD_S * _RATE_HZ)]


def _energies(frames: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """[n, 33]"""
    spectrum = np.fft.rfft(frames, axis=1)
    return np.add.reduceat(np.square(spectrum.real) + np.square(spectrum.imag), edges, axis=1)[:, :-1]


class Copies:
    """Recordings by their fingerprints, the first of each kept.

    Args:
        fingerprint_of: of a recording that was added; asked for again when another resembles it, for all of them would take much memory.
    """

    def __init__(self, fingerprint_of: Callable[[Recording], np.ndarray | None]) -> None:
        self._fingerprint_of = fingerprint_of
        self._recordings: list[Recording] = []
        self._places: dict[int, list[tuple[int, int]]] = {}  # word -> recordings that it is among the first of, and where in them

    def first_like(self, recording: Recording, words: np.ndarray) -> Recording | None:
        """The earliest recording added that this one is a copy of; None if there is none, and then it is added."""
        looked_up = _looked_up(words)
        votes: dict[int, Counter[int]] = {}
        for word, place in looked_up:
            for index, first_place in self._places.get(word, ()):
                votes.setdefault(index, Counter())[round((place - first_place) / 4)] += 1
        for index in sorted(votes):
            first = self._recordings[index]
            (offset, count), *_ = votes[index].most_common(1)
            if count < 2 or not _is_as_long(recording, first):
                continue
            others = self._fingerprint_of(first)
            if others is not None and _is_same(words, others, 4 * offset):
                return first
        for word, place in looked_up:
            self._places.setdefault(word, []).append((len(self._recordings), place))
        self._recordings.append(recording)
        return None


def _looked_up(words: np.ndarray) -> list[tuple[int, int]]:
    """(word, first place) of the words that a copy is likely to be looked up by, too: those of the smallest hashes."""
    distinct, places = np.unique(words, return_index=True)
    hashes = (distinct.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(20)
    order = np.argsort(hashes, kind="stable")
    return [(int(distinct[index]), int(places[index])) for index in order if distinct[index]][:_NUM_LOOKED_UP]


def _is_as_long(one: Recording, other: Recording) -> bool:
    if not one.duration_s or not other.duration_s:  # a header that does not say
        return True
    difference_s = abs(one.duration_s - other.duration_s)
    return difference_s <= max(_MAX_LONGER_S, _MAX_LONGER * max(one.duration_s, other.duration_s))


def _is_same(words: np.ndarray, others: np.ndarray, offset: int) -> bool:
    """Whether words[i + offset] resemble others[i], in the whole and in every quarter (a jingle is not a recording)."""
    return any(_is_same_at(words, others, offset + shift) for shift in (0, -1, 1, -2, 2, -3, 3))


def _is_same_at(words: np.ndarray, others: np.ndarray, offset: int) -> bool:
    first, second = words[max(0, offset) :], others[max(0, -offset) :]
    shared = min(len(first), len(second))
    if shared < _MIN_SHARED * min(len(words), len(others)):
        return False
    first, second = first[:shared], second[:shared]
    is_heard = (first != 0) & (second != 0)
    if is_heard.sum() < _MIN_WORDS:
        return False
    different = np.unpackbits((first[is_heard] ^ second[is_heard]).view(np.uint8)).reshape(-1, 32).mean(axis=1)
    is_alike_in_parts = all(part.mean() <= _MAX_DIFFERENT_IN_QUARTER for part in np.array_split(different, 4))
    return bool(different.mean() <= _MAX_DIFFERENT) and is_alike_in_parts
