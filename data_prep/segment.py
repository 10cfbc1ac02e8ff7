"""From words with speakers to turns: who says what from when to when.

Words of one speaker make an utterance until a pause or another speaker's utterance comes between; utterances that follow one
another are joined where the pause is short, and cut where they are too long. Short listeners' noises are kept and marked, for
they are what a conversation model should learn, and so is what is said at the same time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace

from csm.config import SegmentConfig
from csm.listening.transcripts import normalise_transcript
from data_prep.failures import Rejected
from data_prep.manifest import ManifestTurn, normalised
from data_prep.transcript import (
    QUESTION_MARKS,
    SENTENCE_ENDS,
    Dropped,
    Transcript,
    Word,
    compression,
    mean_log_probability,
    runs_of_words,
    union,
)

# What listeners say without taking the turn; English, and what Whisper writes for it.
BACKCHANNELS = frozenset(
    "mhm mmhmm mm hmm hm uhhuh uh huh yeah yep yes ok okay right sure oh ah aha really wow i see exactly true of course".split()
)
_ENDS_S = 0.3  # before its end a speaker is heard to be ending: what comes then may be an answer
_NEAR_S = 0.5  # a listener's noise comes while another speaks, or this shortly after
_GOES_ON_S = 1.0  # and the other goes on this soon after it; else it was an answer
_SPACELESS = ("zh", "ja", "th", "lo", "my", "yue")  # Whisper's words are characters there
_MIN_OVERLAP_S = 0.05  # shared by two turns: less is how exactly words' ends are known


def turns_of(transcripts: Sequence[Transcript], config: SegmentConfig) -> tuple[list[ManifestTurn], list[Dropped]]:
    """The turns of a recording in the order of their starts, and what was heard in it that gives none.

    Args:
        transcripts: of the mix, or one a channel; then a channel is a speaker.
    """
    utterances: list[_Utterance] = []
    for transcript in transcripts:
        utterances += _utterances(transcript, config)
    utterances.sort(key=_Utterance.place)
    for utterance in utterances:
        utterance.backchannel = _is_backchannel(utterance, utterances, config)
    spoken = [utterance.place() for utterance in utterances]
    parts = [part for utterance in _joined(utterances, config) for part in _cut(utterance, config)]
    parts.sort(key=_Utterance.place)
    _mark_overlap(parts, spoken, transcripts)
    _pad(parts, max((transcript.duration_s for transcript in transcripts), default=0.0), config)
    turns, dropped = [], []
    for part in parts:
        try:
            text = normalised(part.text)
        except Rejected as error:  # control characters: no recogniser writes them, but a foreign model may
            dropped.append(Dropped(part.start_s, part.end_s, "bad_text", error.detail))
            continue
        text = normalise_transcript(text) if config.text == "spoken" else text
        if normalise_transcript(text):
            turns.append(part.turn(text))
        else:
            dropped.append(Dropped(part.start_s, part.end_s, "no_words", f"{part.text!r}"))
    return turns, dropped


class _Utterance:
    """Words of one speaker in one go."""

    def __init__(self, words: list[Word], channel: int | None, backchannel: bool = False) -> None:
        self.words, self.channel, self.backchannel = words, channel, backchannel
        self.start_s, self.end_s = words[0].start_s, max(word.end_s for word in words)
        self.overlap_s = 0.0
        self.heard_s = max(self.end_s - self.start_s, 1e-6)  # without the room that is put around it

    @property
    def speaker(self) -> int:
        return max(self.words[0].speaker, 0)

    @property
    def text(self) -> str:
        return "".join(word.word for word in self.words).strip()

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    def place(self) -> tuple[float, float, int]:
        return self.start_s, self.end_s, self.speaker

    def turn(self, text: str) -> ManifestTurn:
        return ManifestTurn(
            text=text,
            speaker=self.speaker,
            start_s=round(self.start_s, 4),
            end_s=round(self.end_s, 4),
            channel=self.channel,
            words=[{key: value for key, value in asdict(word).items() if key != "speaker"} for word in self.words],
            overlap=self.overlap_s >= _MIN_OVERLAP_S,
            backchannel=self.backchannel,
            quality={
                "asr_log_probability": round(mean_log_probability(self.words), 4),
                "asr_compression": round(compression(self.text), 4),
                "overlap_share": round(min(1.0, self.overlap_s / self.heard_s), 4),
            },
        )


def _utterances(transcript: Transcript, config: SegmentConfig) -> Iterable[_Utterance]:
    by_speaker: dict[int, list[Word]] = {}
    for segment in transcript.segments:
        words = segment.words if transcript.language in _SPACELESS else _whole_words(segment.words, config.max_pause_s)
        for word in words:
            by_speaker.setdefault(word.speaker, []).append(word)
    for speaker in sorted(by_speaker):
        words = sorted(by_speaker[speaker], key=lambda word: word.start_s)
        yield from (_Utterance(run, transcript.channel) for run in runs_of_words(words, config.max_pause_s))


def _whole_words(words: Sequence[Word], max_pause_s: float) -> Iterator[Word]:
    """Words with what the recogniser wrote behind them without a space (" Mm", "-hmm"), so that spaces between words give the text."""
    latest: Word | None = None
    for word in words:
        if latest is not None and not word.word.startswith(" ") and word.start_s - latest.end_s <= max_pause_s:
            probability = min(latest.probability, word.probability)
            latest = replace(latest, word=latest.word + word.word, end_s=max(latest.end_s, word.end_s), probability=probability)
            continue
        if latest is not None:
            yield latest
        latest = word
    if latest is not None:
        yield latest


def _is_backchannel(utterance: _Utterance, others: Sequence[_Utterance], config: SegmentConfig) -> bool:
    """Whether it is a short noise of known form inside of another's longer utterance, or between two of them."""
    words = normalise_transcript(utterance.text.replace("-", "")).split()
    if not 1 <= len(words) <= config.max_backchannel_words or not all(word in BACKCHANNELS for word in words):
        return False
    for other in others:
        if other.speaker == utterance.speaker or other.duration_s <= utterance.duration_s:
            continue
        if not other.start_s <= utterance.start_s <= other.end_s + _NEAR_S:
            continue
        latest = max((word for word in other.words if word.start_s <= utterance.start_s), key=lambda word: word.start_s)
        if latest.word.strip().endswith(QUESTION_MARKS):  # this is the answer
            continue
        if utterance.start_s < other.end_s - _ENDS_S:
            return True
        if _goes_on(other, utterance, others):
            return True
    return False


def _goes_on(other: _Utterance, noise: _Utterance, utterances: Sequence[_Utterance]) -> bool:
    return any(
        later.speaker == other.speaker and later is not other and other.end_s <= later.start_s <= noise.end_s + _GOES_ON_S
        for later in utterances
    )


def _joined(utterances: Sequence[_Utterance], config: SegmentConfig) -> list[_Utterance]:
    """Utterances of a speaker joined over short pauses, where nobody but a listener's noise comes between."""
    turns: list[_Utterance] = []
    latest: _Utterance | None = None  # that took the turn
    for utterance in utterances:
        if utterance.backchannel:
            turns.append(utterance)
            continue
        if (
            latest is not None
            and latest.speaker == utterance.speaker
            and latest.channel == utterance.channel
            and utterance.start_s - latest.end_s <= config.merge_gap_s
            and utterance.end_s - latest.start_s <= config.max_turn_s
        ):
            latest.words += utterance.words
            latest.end_s = max(latest.end_s, utterance.end_s)
            latest.heard_s = latest.duration_s
            continue
        latest = utterance
        turns.append(utterance)
    return turns


def _cut(utterance: _Utterance, config: SegmentConfig) -> list[_Utterance]:
    """Parts of at most `max_turn_s`, cut at the longest pause, after the end of a sentence where there is one."""
    if utterance.duration_s <= config.max_turn_s or len(utterance.words) < 2:
        return [utterance]
    words = utterance.words

    def worth(index: int) -> tuple[bool, float, float]:
        pause_s = words[index].start_s - words[index - 1].end_s
        middle_s = (utterance.start_s + utterance.end_s) / 2
        return words[index - 1].word.strip().endswith(SENTENCE_ENDS), round(pause_s, 2), -abs(words[index].start_s - middle_s)

    inner = [index for index in range(1, len(words)) if words[index].start_s - utterance.start_s <= config.max_turn_s] or [1]
    at = max(inner, key=worth)
    first, rest = _Utterance(words[:at], utterance.channel), _Utterance(words[at:], utterance.channel)
    return [*_cut(first, config), *_cut(rest, config)]


def _mark_overlap(parts: Sequence[_Utterance], spoken: Sequence[tuple[float, float, int]], transcripts: Sequence[Transcript]) -> None:
    """How much of each turn others talk over: in words, or as the diarizer heard it where no word of theirs was made out.

    A listener's noise in a pause of the other's turn is not talked over, though the turn goes on around it: `spoken` has the pauses.
    """
    by_diarizer: list[tuple[float, float]] = []
    for transcript in transcripts:
        by_diarizer += _together([(span.start_s, span.end_s, span.speaker) for span in transcript.speakers])
    of_turns = union(_together([part.place() for part in parts]) + by_diarizer)
    of_words = union(_together(spoken) + by_diarizer)
    for part in parts:
        shared = of_words if part.backchannel else of_turns
        for start_s, end_s in shared[bisect_right(shared, part.start_s, key=lambda span: span[1]) :]:
            if start_s >= part.end_s:
                break
            part.overlap_s += min(end_s, part.end_s) - max(start_s, part.start_s)


def _together(spans: Sequence[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """Where spans of different speakers overlap."""
    shared: list[tuple[float, float]] = []
    going: list[tuple[float, float, int]] = []
    for start_s, end_s, speaker in sorted(spans):
        going = [span for span in going if span[1] > start_s]
        shared += [(start_s, min(end_s, other[1])) for other in going if other[2] != speaker]
        going.append((start_s, end_s, speaker))
    return shared


def _pad(parts: Sequence[_Utterance], duration_s: float, config: SegmentConfig) -> None:
    """A little room around every turn, which is nobody else's: half of the pause at most."""
    edges = sorted({edge for part in parts for edge in (part.start_s, part.end_s)})
    for part in parts:
        first, last = bisect_left(edges, part.start_s), bisect_right(edges, part.end_s)
        before = edges[first - 1] if first else 0.0
        after = edges[last] if last < len(edges) else max(duration_s, part.end_s)
        part.start_s -= min(config.pad_s, (part.start_s - before) / 2)
        part.end_s += min(config.pad_s, (after - part.end_s) / 2)
