"""What was heard in a recording: speech, words, speakers. Stages hand it on as JSON, checked as it is read."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from data_prep.failures import Rejected
from data_prep.manifest import check_object

NO_SPEAKER = -1
QUESTION_MARKS = ("?", "？")
SENTENCE_ENDS = (".", "!", "…", "。", "！", *QUESTION_MARKS)
_UNHEARD_S = 1.0  # of speech that no word came of, from which it is reported
_WORD_ROOM_S = 0.5  # of speech around a word, which is its own


@dataclass
class Span:
    """A stretch of a recording, seconds."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass
class SpeakerSpan:
    """Where one speaker speaks; spans of two speakers may overlap."""

    speaker: int
    start_s: float
    end_s: float


@dataclass
class Word:
    """A word as the recogniser writes it, its own punctuation included; `speaker` is -1 until one is assigned."""

    word: str
    start_s: float
    end_s: float
    probability: float
    speaker: int = NO_SPEAKER


@dataclass
class Segment:
    """Words without a long pause between them.

    Attributes:
        no_speech: probability that nothing was said in the window they were read in, by the recogniser.
    """

    words: list[Word]
    no_speech: float

    @property
    def start_s(self) -> float:
        return self.words[0].start_s

    @property
    def end_s(self) -> float:
        return self.words[-1].end_s

    @property
    def text(self) -> str:
        return "".join(word.word for word in self.words).strip()


@dataclass
class Dropped:
    """Text that was heard and not believed, or audio that cannot be used: why, and how much is lost."""

    start_s: float
    end_s: float
    reason: str
    detail: str


@dataclass
class Transcript:
    """One channel of a recording, or the mix of all (`channel` is None)."""

    channel: int | None = None
    duration_s: float = 0.0
    language: str | None = None
    language_probability: float = 0.0
    speech: list[Span] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    speakers: list[SpeakerSpan] = field(default_factory=list)

    @property
    def words(self) -> list[Word]:
        return [word for segment in self.segments for word in segment.words]

    def as_json(self) -> dict[str, Any]:
        """Plain values; times and scores rounded to what they are good for."""
        return _plain(self)


def runs_of_words(words: Sequence[Word], max_pause_s: float) -> Iterator[list[Word]]:
    """Words in the order of their starts, cut where a pause is longer."""
    run: list[Word] = []
    for word in words:
        if run and word.start_s - run[-1].end_s > max_pause_s:
            yield run
            run = []
        run.append(word)
    if run:
        yield run


def union(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(start_s, end_s) of all spans, in order; those that touch are one."""
    joined: list[tuple[float, float]] = []
    for start_s, end_s in sorted(spans):
        if joined and start_s <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end_s)
        else:
            joined.append((start_s, end_s))
    return joined


def wordless(transcript: Transcript, room_s: float = _WORD_ROOM_S) -> list[Span]:
    """Stretches of speech that no word came of, believed or not; words take the room around them, too."""
    entries: list[Word | Dropped] = [*transcript.words, *transcript.dropped]
    heard = union([(entry.start_s - room_s, entry.end_s + room_s) for entry in entries])
    stretches: list[Span] = []
    at = 0
    for span in transcript.speech:
        reached_s = span.start_s
        while at < len(heard) and heard[at][1] <= reached_s:
            at += 1
        for start_s, end_s in itertools.islice(heard, at, None):
            if start_s >= span.end_s:
                break
            if start_s > reached_s:
                stretches.append(Span(reached_s, start_s))
            reached_s = max(reached_s, end_s)
        if reached_s < span.end_s:
            stretches.append(Span(reached_s, span.end_s))
    return stretches


def unheard(transcript: Transcript) -> list[Dropped]:
    """Speech that no word came of, as one entry: laughter, mumbling, what the recogniser passed over."""
    stretches = wordless(transcript)
    total_s = sum(stretch.duration_s for stretch in stretches)
    if total_s < _UNHEARD_S:
        return []
    longest = max(stretches, key=lambda stretch: stretch.duration_s)
    detail = f"{len(stretches)} stretches of speech without words, {total_s:.1f} s in all; this is the longest, {longest.duration_s:.1f} s"
    return [Dropped(longest.start_s, longest.start_s + total_s, "unheard", detail)]


def mean_log_probability(words: Sequence[Word]) -> float:
    """How sure the recogniser was of words, nats a word."""
    return sum(math.log(max(word.probability, 1e-6)) for word in words) / max(1, len(words))


def compression(text: str) -> float:
    """Bytes of a text over its bytes after zlib: above 2.4 it repeats itself (Whisper's own measure and threshold)."""
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else 0.0


def transcript_from_json(raw: object, what: str) -> Transcript:
    """The inverse of `Transcript.as_json`.

    Raises:
        Rejected: "schema", with the key.
    """
    values = dict(check_object(raw, Transcript, what))
    values["speech"] = _objects(values.get("speech"), Span, what)
    values["dropped"] = _objects(values.get("dropped"), Dropped, what)
    values["speakers"] = _objects(values.get("speakers"), SpeakerSpan, what)
    segments = []
    for entry in values.get("segments") or []:
        segment = dict(check_object(entry, Segment, f"{what}, a segment"))
        segments.append(Segment(**{**segment, "words": _objects(segment["words"], Word, what)}))
    return Transcript(**{**values, "segments": segments})


def _objects(raw: object, schema: type, what: str) -> list[Any]:
    if not isinstance(raw, list):
        raise Rejected("schema", f"{what}: expected a list of {schema.__name__}, got {type(raw).__name__}")
    return [schema(**check_object(entry, schema, f"{what}, a {schema.__name__}")) for entry in raw]


def _plain(value: Any) -> Any:
    """Objects as their fields, floats rounded."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in vars(value).items()} if is_dataclass(value) else value
