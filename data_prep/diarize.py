"""Who speaks when: local speakers of overlapping windows, their voices clustered over the whole recording.

The segmentation network says, for windows of five seconds, when each of up to three speakers is active; a speaker encoder
says what each of them sounds like; average linkage over all windows says which are the same person. Where two overlap, both
are kept. The scheme is pyannote's (Bredin 2023, "pyannote.audio 2.1 speaker diarization pipeline"), the code is ours.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage

from csm.config import DiarizeConfig
from csm.listening.campplus import CampplusEncoder
from csm.listening.speaker import unit
from data_prep.segmentation import FRAME_S, RATE_HZ, Activity, frame_time, local_activity
from data_prep.segmentation import WEIGHTS as SEGMENTATION
from data_prep.transcript import NO_SPEAKER, SENTENCE_ENDS, Span, SpeakerSpan, Transcript, Word, union

_MAX_TOGETHER = 4_000  # voices clustered at once: about 50 minutes; longer recordings are clustered in parts, then the parts
# Two in a row for a word of another in between are less than that word, 1. On made talks anything from 0.3 to 1.2 gave the same.
_CHANGE, _EASY_CHANGE = 0.3, 0.1
_BREATH_S = 0.3  # a pause after which another may well speak
_HEARD_TOGETHER = 256  # clips, some 30 MB
_SAME_EDGE_S = 0.1  # pieces of two windows that begin and end as near as this are one sound, and are heard once

_Place = tuple[int, int, int]  # where in the recording a stretch begins and ends and how long it is alone: windows overlap five times
_Stretch = tuple[int, int, int, int, float]  # window, local speaker, first frame, the frame behind the last, seconds alone


@lru_cache(maxsize=1)
def load_encoder() -> CampplusEncoder:
    """The speaker encoder, loaded once a process."""
    return CampplusEncoder()


def load_diarizer(config: DiarizeConfig, device: str = "cpu") -> Diarizer:
    """The diarizer that `config.pipeline` names.

    Raises:
        ImportError: if it is pyannote's, outside of the prep environment.
    """
    if config.pipeline == "pyannote":
        from data_prep.pyannote_diarizer import load

        return load(config, device)
    return Diarizer(config, device)


class Diarizer:
    """Finds the speakers of a recording of any length; nothing is drawn at random."""

    def __init__(self, config: DiarizeConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device
        self.encoder = load_encoder()

    @property
    def settings(self) -> dict[str, Any]:
        """Models by digest: what a result depends on besides the configuration."""
        return {"segmentation": SEGMENTATION.sha256, "speaker": self.encoder.digest, "version": 4}

    def diarize(self, audio: np.ndarray, speech: Sequence[Span] | None = None, activity: Activity | None = None) -> list[SpeakerSpan]:
        """Spans of speakers 0, 1, ... in the order of their first words; spans of different speakers may overlap.

        Args:
            audio: 16 kHz float32 [S].
            speech: where to look; None is everywhere.
            activity: `local_activity` of the audio, where that is known already.
        """
        activity = (local_activity(audio, self.device) if activity is None else activity).of_the_audible()
        is_active = activity.probabilities > self.config.onset  # [W, frames, 3]
        pieces = self._pieces(audio, activity.starts, is_active)
        if not pieces:
            return []
        labels = self._labels(pieces)
        scores = np.zeros((activity.num_frames, max(labels) + 1), np.float32)
        for piece, label in zip(pieces, labels, strict=True):
            first = activity.first_frame(piece.window)
            stop = min(activity.num_frames, first + piece.stop)
            begin = first + piece.first
            scores[begin:stop, label] += activity.probabilities[piece.window, piece.first : piece.first + stop - begin, piece.local]
        num_active = activity.averaged(is_active.sum(axis=2))
        chosen = _most_active(scores, np.rint(num_active).astype(int))
        spans = [span for speaker in range(scores.shape[1]) for span in self._spans(chosen[:, speaker], speaker)]
        return renumbered(spans if speech is None else clipped(spans, speech))

    def _pieces(self, audio: np.ndarray, starts: np.ndarray, is_active: np.ndarray) -> list[_Piece]:
        """What each local speaker says in one go, with the voice it is said in; pieces without a voice are left out."""
        found: list[tuple[_Place, _Stretch]] = []
        voices: dict[_Place, np.ndarray | None] = {}
        waiting: dict[_Place, np.ndarray] = {}  # clips that are not heard yet

        def hear() -> None:
            voices.update(zip(waiting, self.encoder.embed_all(list(waiting.values())), strict=True))
            waiting.clear()

        for place, stretch, clip in self._stretches(audio, starts, is_active):
            found.append((place, stretch))
            if place not in voices:
                waiting.setdefault(place, clip)
            if len(waiting) == _HEARD_TOGETHER:
                hear()
        hear()
        return [_Piece(*stretch, voice) for place, stretch in found if (voice := voices[place]) is not None]

    def _stretches(self, audio: np.ndarray, starts: np.ndarray, is_active: np.ndarray) -> Iterator[tuple[_Place, _Stretch, np.ndarray]]:
        """Stretches of speech long enough to have a voice, each with its place and its samples, where it can be of the speaker alone."""
        hop = round(FRAME_S * RATE_HZ)
        step = round(_SAME_EDGE_S / FRAME_S)
        is_alone = is_active & (is_active.sum(axis=2, keepdims=True) == 1)
        for window, start in enumerate(starts):
            offset = round(start / hop)
            for local in range(is_active.shape[2]):
                for first, stop in _runs(is_active[window, :, local], round(self.config.split_pause_s / FRAME_S)):
                    alone = is_alone[window, first:stop, local]
                    alone_s = float(alone.sum() * FRAME_S)
                    mask = alone if alone_s >= self.config.min_alone_s else is_active[window, first:stop, local]
                    clip = audio[start + first * hop : start + stop * hop]
                    clip = clip[np.repeat(mask, hop)[: len(clip)]]
                    if len(clip) >= self.config.min_heard_s * RATE_HZ:
                        place = round((offset + first) / step), round((offset + stop) / step), round(alone.sum() / step)
                        yield place, (window, local, first, stop, alone_s), clip

    def _labels(self, pieces: Sequence[_Piece]) -> list[int]:
        """The speaker of every piece. Pieces that overlap in a window are of different speakers, where there are several."""
        voices = np.stack([piece.voice for piece in pieces])
        centroids = self._centroids(*self._clear(voices, np.array([piece.alone_s for piece in pieces])))
        likeness = voices @ centroids.T  # [N, speakers]
        labels = [NO_SPEAKER] * len(pieces)
        window_of: dict[int, list[int]] = {}
        for index, piece in enumerate(pieces):
            window_of.setdefault(piece.window, []).append(index)
        for members in window_of.values():
            for index in sorted(members, key=lambda member: -pieces[member].alone_s):  # the clearest voice chooses first
                taken = {labels[other] for other in members if pieces[other].overlaps(pieces[index])}
                free = [speaker for speaker in range(len(centroids)) if speaker not in taken] or list(range(len(centroids)))
                labels[index] = max(free, key=lambda speaker: likeness[index, speaker])
        return labels

    def _clear(self, voices: np.ndarray, alone_s: np.ndarray) -> tuple[np.ndarray, float]:
        """The voices that tell how many speakers there are, and the distance up to which two are one.

        Where people hardly ever speak long enough, short pieces have to do; a voice varies more from one to the next.
        """
        is_clear = alone_s >= self.config.clear_s
        if is_clear.any() and is_clear.mean() >= self.config.min_clear_share:
            return voices[is_clear], self.config.threshold
        is_usable = alone_s >= min(self.config.clear_s / 2, float(alone_s.max()))
        return voices[is_usable], self.config.short_threshold

    def _centroids(self, voices: np.ndarray, threshold: float) -> np.ndarray:
        """One unit vector a speaker, [speakers, 192]."""
        parts = [voices[first : first + _MAX_TOGETHER] for first in range(0, len(voices), _MAX_TOGETHER)]
        found = [self._clusters(part, threshold) for part in parts]
        centroids = np.concatenate([centroids for centroids, _ in found])
        sizes = np.concatenate([sizes for _, sizes in found])
        if len(parts) > 1:
            labels = self._cut(centroids, self.config.link_threshold)
            sums = [(centroids * sizes[:, None])[labels == label].sum(axis=0) for label in np.unique(labels)]
            sizes = np.array([sizes[labels == label].sum() for label in np.unique(labels)])
            centroids = np.stack([unit(total) for total in sums])
        order = np.argsort(-sizes, kind="stable")
        centroids, sizes = centroids[order], sizes[order]
        is_large = sizes >= min(self.config.min_windows, -(-len(voices) // 10), sizes[0])  # voices that are all unlike leave one
        return centroids[is_large | (self.config.num_speakers > 0)][: self.config.max_speakers or None]

    def _clusters(self, voices: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
        """(centroids, sizes) of clusters, the largest first."""
        labels = self._cut(voices, threshold)
        names, sizes = np.unique(labels, return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        return np.stack([unit(voices[labels == names[index]].mean(axis=0)) for index in order]), sizes[order]

    def _cut(self, voices: np.ndarray, threshold: float) -> np.ndarray:
        if len(voices) == 1:
            return np.ones(1, int)
        tree = linkage(voices.astype(np.float64), method="average", metric="cosine")
        if self.config.num_speakers:
            return fcluster(tree, self.config.num_speakers, criterion="maxclust")
        return fcluster(tree, threshold, criterion="distance")

    def _spans(self, is_chosen: np.ndarray, speaker: int) -> list[SpeakerSpan]:
        spans: list[SpeakerSpan] = []
        for first, stop in _runs(is_chosen, round(self.config.fill_gap_s / FRAME_S)):
            start_s, end_s = float(frame_time(first)) - FRAME_S / 2, float(frame_time(stop)) - FRAME_S / 2
            spans.append(SpeakerSpan(speaker, max(0.0, start_s), end_s))
        return spans


@dataclass
class _Piece:
    """Frames [first, stop) of a local speaker in a window, and the seconds of them in which nobody else speaks."""

    window: int
    local: int
    first: int
    stop: int
    alone_s: float
    voice: np.ndarray

    def overlaps(self, other: _Piece) -> bool:
        return self.local != other.local and self.first < other.stop and other.first < self.stop


def _runs(is_on: np.ndarray, max_gap: int) -> list[tuple[int, int]]:
    """[first, stop) of what is on, gaps of up to `max_gap` frames filled."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_on.astype(np.int8), [0]]))).reshape(-1, 2)
    runs: list[tuple[int, int]] = []
    for first, stop in edges.tolist():
        if runs and first - runs[-1][1] <= max_gap:
            runs[-1] = runs[-1][0], stop
        else:
            runs.append((first, stop))
    return runs


def _most_active(scores: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The `count` highest scores of each frame, [frames, speakers] bool; none that is 0."""
    chosen = np.zeros_like(scores, dtype=bool)
    order = np.argsort(-scores, axis=1, kind="stable")
    for rank in range(min(scores.shape[1], int(count.max(initial=0)))):
        frames = np.flatnonzero(count > rank)
        picked = order[frames, rank]
        chosen[frames, picked] = scores[frames, picked] > 0
    return chosen


def clipped(spans: Sequence[SpeakerSpan], speech: Sequence[Span]) -> list[SpeakerSpan]:
    """What of the spans is in speech, which is in order and without overlap."""
    clipped = []
    for span in spans:
        for part in itertools.islice(speech, bisect_right(speech, span.start_s, key=lambda part: part.end_s), None):
            if part.start_s >= span.end_s:
                break
            clipped.append(SpeakerSpan(span.speaker, max(span.start_s, part.start_s), min(span.end_s, part.end_s)))
    return clipped


def renumbered(spans: Sequence[SpeakerSpan]) -> list[SpeakerSpan]:
    numbers: dict[int, int] = {}
    ordered = sorted(spans, key=lambda span: (span.start_s, span.end_s, span.speaker))
    return [SpeakerSpan(numbers.setdefault(span.speaker, len(numbers)), span.start_s, span.end_s) for span in ordered]


def assign_speakers(transcript: Transcript) -> None:
    """Give every word a speaker: the sequence that costs least, words taken in the order of their starts.

    A word costs the share of it that its speaker's spans leave uncovered; where nobody's cover any of it, nothing for the nearest
    speaker and 1 for others. A change of speaker costs `_CHANGE`, less after a pause or a sentence. So where two speak at once, or
    a span begins a little late, a word goes with those around it.
    """
    words = sorted(transcript.words, key=lambda word: word.start_s)
    if not words or not transcript.speakers:
        return
    speakers = sorted({span.speaker for span in transcript.speakers})
    easy = [
        later.start_s - word.end_s >= _BREATH_S or word.word.rstrip().endswith(SENTENCE_ENDS)
        for word, later in zip(words, words[1:], strict=False)
    ]
    columns = _cheapest(_word_costs(words, transcript.speakers, speakers), np.where(easy, _EASY_CHANGE, _CHANGE))
    for word, column in zip(words, columns, strict=True):
        word.speaker = speakers[column]


def _word_costs(words: Sequence[Word], spans: Sequence[SpeakerSpan], speakers: Sequence[int]) -> np.ndarray:
    """What each word costs each speaker, [words, speakers], as `assign_speakers` says."""
    starts, ends = np.array([word.start_s for word in words]), np.array([word.end_s for word in words])
    middles = (starts + ends) / 2
    uncovered, far_s = np.empty((len(words), len(speakers))), np.empty((len(words), len(speakers)))
    for column, speaker in enumerate(speakers):
        begun_s, ended_s = np.array(union([(span.start_s, span.end_s) for span in spans if span.speaker == speaker])).T
        edges = np.stack((begun_s, ended_s), axis=1).ravel()
        until_s = np.cumsum(ended_s - begun_s)  # spoken up to each end
        spoken_s = np.stack((until_s - (ended_s - begun_s), until_s), axis=1).ravel()
        shared_s = np.interp(ends, edges, spoken_s) - np.interp(starts, edges, spoken_s)
        uncovered[:, column] = 1 - shared_s / np.maximum(ends - starts, 1e-3)
        later = np.searchsorted(begun_s, middles)  # the first span that begins later
        to_next, to_last = np.append(begun_s, np.inf)[later] - middles, middles - np.append(-np.inf, ended_s)[later]
        far_s[:, column] = np.maximum(np.minimum(to_next, to_last), 0.0)
    nobodys = (uncovered > 1 - 1e-6).all(axis=1)
    uncovered[nobodys] = far_s[nobodys] > far_s[nobodys].min(axis=1, keepdims=True)
    return uncovered


def _cheapest(costs: np.ndarray, changes: np.ndarray) -> list[int]:
    """The column of each row [rows, columns] of least sum, where `changes` [rows - 1] is paid between rows of different columns."""
    best, came_from = costs[0], []
    for row, change in zip(costs[1:], changes, strict=True):
        other = int(best.argmin())
        stays = best <= best[other] + change
        came_from.append(np.where(stays, np.arange(len(best)), other))
        best = np.where(stays, best, best[other] + change) + row
    path = [int(best.argmin())]
    for columns in reversed(came_from):
        path.append(int(columns[path[-1]]))
    return path[::-1]
