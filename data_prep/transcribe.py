"""Speech to words: where speech is, what is said there and when each word begins, and which of it is not believed.

Speech is found by the segmentation network, because Whisper makes up words for silence and only a gate before it stops that.
Stretches of speech are read together in windows of up to 28 s, several at a time. Each recording is read by itself, on
as many threads as torch has, so a transcript does not depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from csm.config import TranscribeConfig
from csm.listening.acoustics import peak
from csm.listening.asr import find_packaged_whisper
from data_prep.packaged_whisper import WEIGHTS_SHA256 as BASE_SHA256
from data_prep.packaged_whisper import find_base
from data_prep.segmentation import FRAME_S, RATE_HZ, Activity, frame_time, local_activity, samples_between
from data_prep.segmentation import WEIGHTS as SEGMENTATION
from data_prep.transcript import Dropped, Segment, Span, Transcript, Word, compression, mean_log_probability, runs_of_words, wordless

# What Whisper writes for sounds that are no speech: endings of the films and videos that it learnt from.
_PHRASES = frozenset(
    "thank you|thanks for watching|thank you for watching|thanks for listening|please subscribe|subscribe to my channel|you|bye|"
    "subtitles by the amara org community|see you next time|see you in the next video|i'll see you next time|music|applause".split("|")
)
_PHRASE_LOG_PROBABILITY = -0.6  # a known phrase that is heard less surely than this is made up
# Whisper's attention puts words too early, each model by its own; of the packaged base, against times known from a synthesiser.
_EARLY_S = {BASE_SHA256: 0.09}
# What is taken for said before a window, by model and language: with it base hears talk for what it is (docs/data.md has the numbers).
_TALK = {
    (BASE_SHA256, "en"): "Well, I was talking to my friend yesterday. Did you? Yeah, we had a good time. Mm-hmm, okay, that sounds nice.",
}
_PAUSE_S = 0.7  # what is believed or not is what is said between such pauses
_SHORTEST_WORD_S = 0.04
_LONGEST_WORD_S = 1.0  # of 4,780 words of made talks none took more than 0.75 s but those that cover what was passed over
_SHORTEST_LEFT_S = 0.15  # of such a word, beside what was passed over
_MISSED_ROOM_S, _MISSED_S = 0.3, 0.5  # beyond this much around words, speech of this length should have some: it is read again
_SIDE_S, _AMID_S = 0.25, 1.3  # what of it is on each side of a word in its middle, at least; that word with room around it, at most
_HEARD_AROUND_S = 0.2
_SURE_LOG_PROBABILITY = -1.0  # of a second reading; on made talks sentences passed over came at -0.04 to -0.91, noises below -3.5
_BATCHES_TOGETHER = 8  # faster-whisper holds the features of all windows that it is given, a megabyte each
_LOUD_SHARE = 0.02  # of the loudest tenth of a second of a recording: quieter "speech" is cross-talk or hiss


class Transcriber:
    """Whisper behind a gate. Deterministic on a CPU."""

    def __init__(self, config: TranscribeConfig, device: str | None = None) -> None:
        """Load the models.

        Raises:
            FileNotFoundError: if there is no Whisper; the message says what to install.
        """
        self.config, self.device = config, device or config.device
        self.source = str(find_whisper()) if config.model == "auto" else config.model
        weights = Path(self.source) / "model.bin"
        self.digest = _file_digest(str(weights)) if weights.is_file() else self.source
        self._reader = _reader(self.source, config, self.device)

    @property
    def settings(self) -> dict[str, Any]:
        """Models by digest, programs by version: what a transcript depends on besides the configuration."""
        return {"whisper": self.digest, "speech": SEGMENTATION.sha256, "version": 8, **self._reader.settings}

    def transcribe(self, audio: np.ndarray, activity: Activity | None = None) -> Transcript:
        """The words of 16 kHz audio, float32 [S], with times in seconds; what is not believed is in `dropped`.

        Args:
            activity: `local_activity` of it, where that is known already.
        """
        speech = find_speech(audio, self.config, self.device, activity)
        if not speech:
            return Transcript()
        windows = windows_of(speech, self.config)
        language, probability = (self.config.language, 1.0) if self.config.language else self._language(audio, windows)
        segments = self._reader.read(audio, windows, language, self._prompt(language))
        early_s = _EARLY_S.get(self.digest, 0.0) if self._reader.times_by_attention else 0.0

        def placed(segments: Sequence[Segment]) -> list[Segment]:
            return [snapped(segment, speech, len(audio) / RATE_HZ, early_s) for segment in segments]

        transcript = Transcript(language=language, language_probability=probability, speech=speech)
        believed: list[Segment] = []
        for segment in segments:
            why = disbelief(segment, self.config)
            if why is None:
                believed.append(segment)
            else:
                transcript.dropped.append(Dropped(segment.start_s, segment.end_s, *why))
        transcript.segments = placed(_mended(believed, lambda word: None))
        again = self._second_reading(audio, transcript, language)
        transcript.segments = placed([*_mended(believed, lambda word: clear_of(word, again)), *again])
        transcript.segments.sort(key=lambda segment: segment.start_s)
        return transcript

    def _language(self, audio: np.ndarray, windows: Sequence[Span]) -> tuple[str, float]:
        """What is spoken in the first half minute of speech, and how probable that is."""
        whisper = self._reader.whisper
        if not whisper.model.is_multilingual:
            return "en", 1.0
        speech = np.concatenate([samples_between(audio, window.start_s, window.end_s) for window in windows[:30]])
        language, probability, _ = whisper.detect_language(speech)
        return language, float(probability)

    def _prompt(self, language: str) -> str | None:
        prompt = _TALK.get((self.digest, language)) if self.config.prompt == "auto" else self.config.prompt
        return (prompt or "").strip() or None

    def _second_reading(self, audio: np.ndarray, transcript: Transcript, language: str) -> list[Segment]:
        """What is said where the first reading has no word: in a long window Whisper leaves out whole sentences.

        Each stretch is a window of its own now, and only what is heard surely is believed.
        """
        stretches = passed_over(transcript)
        if not stretches:
            return []
        parts = [part for stretch in stretches for part in _cut(stretch, self.config.max_window_s - 2 * _HEARD_AROUND_S)]
        windows = _padded(parts, _HEARD_AROUND_S, len(audio) / RATE_HZ)
        sure = [
            segment
            for segment in self._reader.read(audio, windows, language, self._prompt(language))
            if disbelief(segment, self.config) is None and mean_log_probability(segment.words) > _SURE_LOG_PROBABILITY
        ]
        had = sorted(transcript.words, key=lambda word: word.start_s)
        return [segment for segment in (news_of(segment, had) for segment in sure) if segment.words]


class _Reader(Protocol):
    settings: dict[str, Any]
    whisper: Any  # faster-whisper's WhisperModel
    times_by_attention: bool  # Whisper's, not an aligner's

    def read(self, audio: np.ndarray, windows: Sequence[Span], language: str, prompt: str | None) -> list[Segment]:
        """What is said in the windows, with `prompt` taken for said before each."""


def _reader(source: str, config: TranscribeConfig, device: str) -> _Reader:
    if config.reader == "whisperx":
        from data_prep.whisperx_reader import WhisperXReader

        return WhisperXReader(source, config, device, _PAUSE_S)
    return _FasterWhisperReader(source, config, device)


class _FasterWhisperReader:
    times_by_attention = True

    def __init__(self, source: str, config: TranscribeConfig, device: str) -> None:
        from faster_whisper import BatchedInferencePipeline

        self.config = config
        self.whisper = _whisper(source, device, config.compute_type)
        self.pipeline = BatchedInferencePipeline(self.whisper)
        self.settings = {"reader": f"faster-whisper {version('faster-whisper')}, ctranslate2 {version('ctranslate2')}"}

    def read(self, audio: np.ndarray, windows: Sequence[Span], language: str, prompt: str | None) -> list[Segment]:
        segments = []
        together = _BATCHES_TOGETHER * self.config.batch_size
        for first in range(0, len(windows), together):
            found, _ = self.pipeline.transcribe(
                audio,
                language=language,
                batch_size=self.config.batch_size,
                beam_size=self.config.beam_size,
                initial_prompt=None if prompt is None else f" {prompt}",  # a space, as before any word
                temperature=0.0,
                word_timestamps=True,
                without_timestamps=True,
                vad_filter=False,
                clip_timestamps=[{"start": window.start_s, "end": window.end_s} for window in windows[first : first + together]],
                hallucination_silence_threshold=None,
                condition_on_previous_text=False,
            )
            for entry in found:
                words = [Word(word.word, float(word.start), float(word.end), float(word.probability)) for word in entry.words or []]
                segments += [Segment(run, float(entry.no_speech_prob)) for run in runs_of_words(words, _PAUSE_S)]
        return segments


def find_speech(audio: np.ndarray, config: TranscribeConfig, device: str = "cpu", activity: Activity | None = None) -> list[Span]:
    """Where anybody speaks in 16 kHz audio, in order, padded, not touching; `activity` as in `Transcriber.transcribe`."""
    if len(audio) == 0:
        return []
    activity = local_activity(audio, device) if activity is None else activity
    probability = activity.averaged(activity.probabilities.max(axis=2))
    spans: list[Span] = []
    begun: int | None = None
    for index, value in enumerate([*probability.tolist(), 0.0]):
        if begun is None and value > config.speech_onset:
            begun = index
        elif begun is not None and value < config.speech_offset:
            spans.append(Span(float(frame_time(begun)) - FRAME_S / 2, float(frame_time(index)) - FRAME_S / 2))
            begun = None
    duration_s = len(audio) / RATE_HZ
    joined: list[Span] = []
    for span in spans:
        if joined and span.start_s - joined[-1].end_s <= config.fill_gap_s:
            joined[-1].end_s = span.end_s
        else:
            joined.append(span)
    quiet = _LOUD_SHARE * peak(audio)
    long_enough = [span for span in joined if span.duration_s >= config.min_speech_s]
    loud = [span for span in long_enough if peak(samples_between(audio, span.start_s, span.end_s + 1 / RATE_HZ)) > quiet]
    return _padded(loud, config.pad_s, duration_s)


def _padded(spans: Sequence[Span], pad_s: float, duration_s: float) -> list[Span]:
    """With room before and after, inside of the recording; those that would overlap meet in the middle."""
    padded = [Span(max(0.0, span.start_s - pad_s), min(duration_s, span.end_s + pad_s)) for span in spans]
    for before, after in zip(padded, padded[1:], strict=False):
        if after.start_s < before.end_s:
            before.end_s = after.start_s = (before.end_s + after.start_s) / 2
    return padded


def windows_of(speech: Sequence[Span], config: TranscribeConfig) -> list[Span]:
    """Stretches of speech joined to windows of at most `max_window_s`, cut in silences; a longer stretch is cut evenly."""
    windows: list[Span] = []
    for span in speech:
        for part in _cut(span, config.max_window_s):
            if windows and part.end_s - windows[-1].start_s <= config.max_window_s:
                windows[-1].end_s = part.end_s
            else:
                windows.append(part)
    return windows


def _cut(span: Span, longest_s: float) -> list[Span]:
    """Even parts of a stretch, none longer than that."""
    edges = np.linspace(span.start_s, span.end_s, int(np.ceil(span.duration_s / longest_s)) + 1).tolist()
    return [Span(start_s, end_s) for start_s, end_s in zip(edges, edges[1:], strict=False)]


def disbelief(segment: Segment, config: TranscribeConfig) -> tuple[str, str] | None:
    """Why a segment is taken for made up, as (reason, detail); None when it is believed."""
    text, duration_s = segment.text, max(segment.end_s - segment.start_s, 1e-3)
    words = _plain(text).split()
    if not words:
        return "no_words", f"{text!r}"
    if compression(text) > config.max_compression:
        return "repeats", f"compresses {compression(text):.1f} times: {text[:80]!r}"
    sureness = mean_log_probability(segment.words)
    unique_share = len(Counter(words)) / len(words)
    if len(words) >= 10 and unique_share < config.min_unique_share:
        return "repeats", f"{unique_share:.0%} of its {len(words)} words differ: {text[:80]!r}"
    if len(text) / duration_s > config.max_characters_per_s:
        return "too_fast", f"{len(text) / duration_s:.0f} characters a second: {text[:80]!r}"
    if segment.no_speech > config.max_no_speech and sureness < config.min_log_probability:
        return "no_speech", f"no speech at {segment.no_speech:.2f}, log-probability {sureness:.2f}: {text[:80]!r}"
    if _plain(text) in _PHRASES and sureness < _PHRASE_LOG_PROBABILITY:
        return "known_phrase", f"log-probability {sureness:.2f}: {text[:80]!r}"
    return None


def snapped(segment: Segment, speech: Sequence[Span], duration_s: float, early_s: float = 0.0) -> Segment:
    """Words begin where speech does: Whisper lets the first one after a pause begin in the pause. Their ends it hears better.

    None lies outside of the recording.

    Args:
        speech: in order, without overlap.
        early_s: by which starts are too early throughout.
    """
    words = []
    for word in segment.words:
        start_s, end_s = max(word.start_s, min(word.start_s + early_s, word.end_s - _SHORTEST_WORD_S)), word.end_s
        at = bisect_left(speech, end_s, key=lambda span: span.end_s)
        if at < len(speech) and start_s < speech[at].start_s < end_s:
            start_s = min(speech[at].start_s, max(start_s, end_s - _SHORTEST_WORD_S))
        start_s = max(0.0, min(start_s, duration_s - _SHORTEST_WORD_S))
        words.append(Word(word.word, start_s, min(max(end_s, start_s + _SHORTEST_WORD_S), duration_s), word.probability))
    return Segment(words, segment.no_speech)


def passed_over(transcript: Transcript) -> list[Span]:
    """Stretches of speech without words that are long enough for some.

    A word in the middle of one is a listener's as a rule, said under the sentence that was passed over: both sides are read as one.
    """
    sides: list[Span] = []
    for stretch in wordless(transcript, _MISSED_ROOM_S):
        before = sides[-1] if sides else None
        if (
            before is not None
            and min(before.duration_s, stretch.duration_s) >= _SIDE_S
            and stretch.start_s - before.end_s <= _AMID_S
            and any(span.start_s <= before.start_s and stretch.end_s <= span.end_s for span in transcript.speech)
        ):
            before.end_s = stretch.end_s
        else:
            sides.append(stretch)
    return [stretch for stretch in sides if stretch.duration_s >= _MISSED_S]


def news_of(segment: Segment, had: Sequence[Word]) -> Segment:
    """Without the words that are in `had`, in order of their starts, at the same time."""
    begin, end = (bisect_left(had, at_s, key=lambda word: word.start_s) for at_s in (segment.start_s - _LONGEST_WORD_S, segment.end_s))
    near = [(_plain(word.word), word.start_s, word.end_s) for word in had[begin:end]]
    words = [
        word
        for word in segment.words
        if not any(start_s < word.end_s and word.start_s < end_s and _plain(word.word) == text for text, start_s, end_s in near)
    ]
    return Segment(words, segment.no_speech)


def is_stretched(word: Word) -> bool:
    """Whether it lasts longer than any word does: Whisper's attention lets one cover the sentence beside it that was passed over."""
    return word.end_s - word.start_s > _LONGEST_WORD_S


def clear_of(word: Word, again: Sequence[Segment]) -> Word | None:
    """What of a stretched word is before or after what was heard there in a second reading; None when that is too little."""
    beside = [segment for segment in again if segment.start_s < word.end_s and word.start_s < segment.end_s]
    if not beside:
        return word
    start_s, end_s = min(segment.start_s for segment in beside), max(segment.end_s for segment in beside)
    if start_s - word.start_s >= _SHORTEST_LEFT_S:
        return replace(word, end_s=start_s)
    return replace(word, start_s=end_s) if word.end_s - end_s >= _SHORTEST_LEFT_S else None


def _mended(segments: Sequence[Segment], mend: Callable[[Word], Word | None]) -> list[Segment]:
    """Stretched words mended or, by None, left out; a segment is cut where that leaves a pause."""
    mended = [[mend(word) if is_stretched(word) else word for word in segment.words] for segment in segments]
    return [
        Segment(run, segment.no_speech)
        for segment, words in zip(segments, mended, strict=True)
        for run in runs_of_words([word for word in words if word is not None], _PAUSE_S)
    ]


def find_whisper() -> Path:
    """The packaged Whisper: `base` where both parts of it are installed, else `tiny.en`.

    Raises:
        FileNotFoundError: if there is neither.
    """
    return find_base() or find_packaged_whisper()


@lru_cache(maxsize=1)
def _whisper(source: str, device: str, compute_type: str) -> Any:
    from faster_whisper import WhisperModel

    try:
        return WhisperModel(source, device=device, compute_type=compute_type, cpu_threads=torch.get_num_threads())
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"transcribe.model={source}: no Whisper could be loaded there ({error}); give a folder or a hub id") from error


@lru_cache(maxsize=4)
def _file_digest(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(text: str) -> str:
    return " ".join(re.sub(r"[^\w' ]+", " ", text.lower()).split())
