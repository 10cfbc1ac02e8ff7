"""From words with speakers to turns: who says what from when to when.

Words of one speaker make an utterance until a pause or another speaker's utterance comes between; utterances that follow one
another are joined where the pause is short, and cut where they are too long. Short listeners' noises are kept and marked, for
they are what a conversation model should learn, and so is what is said at the same time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from csm.config import SegmentConfig
from csm.listening.transcripts import normalise_transcript
from data_prep.failures import Rejected
from data_prep.manifest import ManifestTurn, normalised
from data_prep.transcript import Transcript, Word, compression, mean_log_probability, runs_of_words

# What listeners say without taking the turn; English, and what Whisper writes for it.
BACKCHANNELS = frozenset(
    "mhm mmhmm mm hmm hm uhhuh uh huh yeah yep yes ok okay right sure oh ah aha really wow i see exactly true of course".split()
)
_NEAR_S = 0.5  # a listener's noise comes while another speaks, or this shortly after
_ENDINGS = (".", "?", "!", "…", "。", "？", "！")


def turns_of(transcripts: Sequence[Transcript], config: SegmentConfig) -> list[ManifestTurn]:
    """The turns of a recording in the order of their starts.

    Args:
        transcripts: of the mix, or one a channel; then a channel is a speaker.
    """
    utterances: list[_Utterance] = []
    for transcript in transcripts:
        utterances += _utterances(transcript, config)
    utterances.sort(key=lambda utterance: (utterance.start_s, utterance.end_s, utterance.speaker))
    for utterance in utterances:
        utterance.backchannel = _is_backchannel(utterance, utterances, config)
    joined = _joined(utterances, config)
    parts = [part for utterance in joined for part in _cut(utterance, config)]
    parts.sort(key=lambda utterance: (utterance.start_s, utterance.end_s, utterance.speaker))
    _pad(parts, max((transcript.duration_s for transcript in transcripts), default=0.0), config)
    turns = []
    for part in parts:
        try:
            text = normalised(part.text)
        except Rejected:  # control characters: no recogniser writes them, but a foreign model may
            text = ""
        text = normalise_transcript(text) if config.text == "spoken" else text
        if text:
            turns.append(part.turn(text))
    return turns


class _Utterance:
    """Words of one speaker in one go."""

    def __init__(self, words: list[Word], channel: int | None) -> None:
        self.words, self.channel = words, channel
        self.start_s, self.end_s = words[0].start_s, max(word.end_s for word in words)
        self.backchannel = False

    @property
    def speaker(self) -> int:
        return max(self.words[0].speaker, 0)

    @property
    def text(self) -> str:
        return "".join(word.word for word in self.words).strip()

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    def turn(self, text: str) -> ManifestTurn:
        return ManifestTurn(
            text=text,
            speaker=self.speaker,
            start_s=round(self.start_s, 4),
            end_s=round(self.end_s, 4),
            channel=self.channel,
            words=[{key: value for key, value in asdict(word).items() if key != "speaker"} for word in self.words],
            backchannel=self.backchannel,
            quality={
                "asr_log_probability": round(mean_log_probability(self.words), 4),
                "asr_compression": round(compression(self.text), 4),
            },
        )


def _utterances(transcript: Transcript, config: SegmentConfig) -> Iterable[_Utterance]:
    by_speaker: dict[int, list[Word]] = {}
    for word in transcript.words:
        by_speaker.setdefault(word.speaker, []).append(word)
    for speaker in sorted(by_speaker):
        words = sorted(by_speaker[speaker], key=lambda word: word.start_s)
        yield from (_Utterance(run, transcript.channel) for run in runs_of_words(words, config.max_pause_s))


def _is_backchannel(utterance: _Utterance, others: Sequence[_Utterance], config: SegmentConfig) -> bool:
    words = normalise_transcript(utterance.text.replace("-", "")).split()
    if not 1 <= len(words) <= config.max_backchannel_words or not all(word in BACKCHANNELS for word in words):
        return False
    return any(
        other.speaker != utterance.speaker
        and other.duration_s > utterance.duration_s
        and other.start_s - _NEAR_S <= utterance.start_s <= other.end_s + _NEAR_S
        for other in others
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
        return words[index - 1].word.strip().endswith(_ENDINGS), round(pause_s, 2), -abs(words[index].start_s - middle_s)

    inner = [index for index in range(1, len(words)) if words[index].start_s - utterance.start_s <= config.max_turn_s] or [1]
    at = max(inner, key=worth)
    first, rest = _Utterance(words[:at], utterance.channel), _Utterance(words[at:], utterance.channel)
    return [*_cut(first, config), *_cut(rest, config)]


def _pad(parts: Sequence[_Utterance], duration_s: float, config: SegmentConfig) -> None:
    """A little room around every turn, which is nobody else's: half of the pause at most."""
    edges = sorted({edge for part in parts for edge in (part.start_s, part.end_s)})
    for part in parts:
        before = max((edge for edge in edges if edge < part.start_s), default=0.0)
        after = min((edge for edge in edges if edge > part.end_s), default=max(duration_s, part.end_s))
        part.start_s -= min(config.pad_s, (part.start_s - before) / 2)
        part.end_s += min(config.pad_s, (after - part.end_s) / 2)
