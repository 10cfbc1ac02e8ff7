"""Real models on short sound: where speech is, which words, who says them, how good it sounds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import soxr

from csm.config import DiarizeConfig, TranscribeConfig
from csm.listening.asr import find_packaged_whisper
from csm.listening.naturalness import dnsmos
from data_prep import packaged_whisper, quality, segmentation
from data_prep.diarize import Diarizer, assign_speakers
from data_prep.script import VOICES
from data_prep.synthesis import Synthesizer, random_for
from data_prep.transcribe import Transcriber, disbelief, find_speech, passed_over, windows_of
from data_prep.transcript import NO_SPEAKER, Segment, Span, SpeakerSpan, Transcript, Word
from tests.test_prep_conversations import LINES


@pytest.fixture(scope="module")
def talk() -> tuple[np.ndarray, list[tuple[float, float, int]]]:
    """Two people taking turns, 16 kHz, and (start_s, end_s, speaker) of each turn."""
    synthesizer, parts, truth, position_s = Synthesizer(), [], [], 0.0
    for index, line in enumerate(LINES):
        clip = synthesizer.speak(line, VOICES[(0, 3)[index % 2]], random_for(5, "talk", index)).astype(np.float32) / 32_768
        clip = soxr.resample(clip, 24_000, 16_000)
        parts += [np.zeros(9_600, np.float32), clip]
        position_s += 0.6
        truth.append((position_s, position_s + len(clip) / 16_000, index % 2))
        position_s = truth[-1][1]
    audio = np.concatenate([*parts, np.zeros(16_000, np.float32)])
    return audio + np.random.default_rng(0).normal(0, 3e-4, len(audio)).astype(np.float32), truth


@pytest.fixture(scope="module")
def transcriber() -> Transcriber:
    return Transcriber(TranscribeConfig(model=str(find_packaged_whisper()), language="en"))


def test_speech_is_found_where_it_is(talk):
    audio, truth = talk
    spans = find_speech(audio, TranscribeConfig(pad_s=0.0))
    assert len(spans) == len(truth)
    for span, (start_s, end_s, _) in zip(spans, truth, strict=True):
        assert abs(span.start_s - start_s) < 0.2 and abs(span.end_s - end_s) < 0.25


def test_words_are_heard_with_the_times_at_which_they_are_said(talk, transcriber):
    audio, truth = talk
    transcript = transcriber.transcribe(audio)
    text = " ".join(word.word.strip().lower() for word in transcript.words)
    assert "what is the number" in text and "thank you" in text
    at = next(index for index, word in enumerate(transcript.words) if "thank" in word.word.lower())
    assert abs(transcript.words[at].start_s - truth[4][0]) < 0.2
    assert all(before.end_s <= after.start_s + 0.1 for before, after in zip(transcript.words, transcript.words[1:], strict=False))


def test_whisper_writes_as_the_prompt_does(talk):
    audio, _ = talk
    config = TranscribeConfig(model=str(find_packaged_whisper()), language="en", prompt="Seven four two. Two three. Zero.")
    spelt, plain = (
        " ".join(segment.text.strip() for segment in Transcriber(c).transcribe(audio).segments)
        for c in (config, replace(config, prompt=""))
    )
    assert "three three one" in spelt and "331" not in spelt
    assert "331" in plain and "three three one" not in plain


def test_talk_is_the_prompt_where_that_was_measured_to_help():
    packaged = Transcriber(TranscribeConfig())
    assert packaged._prompt("en").startswith("Well, I was talking") and packaged._prompt("de") is None
    assert Transcriber(TranscribeConfig(prompt=""))._prompt("en") is None
    assert Transcriber(TranscribeConfig(model=str(find_packaged_whisper())))._prompt("en") is None, "tiny.en"
    assert Transcriber(TranscribeConfig(prompt=" Hej. "))._prompt("sv") == "Hej."


def test_the_language_is_that_of_more_than_the_first_sound(talk):
    audio, truth = talk
    first = Span(truth[0][0] - 0.3, truth[0][0])  # before anybody speaks
    packaged = Transcriber(TranscribeConfig())
    of_the_first, of_all = packaged._language(audio, [first]), packaged._language(audio, [first, Span(truth[0][0], truth[5][1])])
    assert of_all[0] == "en" and of_all[1] > of_the_first[1] + 0.1


@pytest.fixture
def let_first_reading_be(transcriber, monkeypatch):
    """Of the transcriber: (a change of the words of every segment) -> the windows of each reading, as they come."""

    def change_words(change: Callable[[list[list[Word]]], list[list[Word]]]) -> list[list[Span]]:
        read, windows_read = transcriber._reader.read, []

        def reads(audio, windows, language, prompt):
            windows_read.append(list(windows))
            segments = read(audio, windows, language, prompt)
            if len(windows_read) > 1:
                return segments
            return [Segment(words, 0.0) for words in change([segment.words for segment in segments]) if words]

        monkeypatch.setattr(transcriber._reader, "read", reads)
        return windows_read

    return change_words


def without(words: list[list[Word]], start_s: float, end_s: float) -> list[list[Word]]:
    return [[word for word in of_segment if not start_s - 0.2 < word.start_s < end_s] for of_segment in words]


@pytest.mark.parametrize("is_covered", [False, True])
def test_a_sentence_that_the_first_reading_passes_over_is_read_again(talk, transcriber, let_first_reading_be, is_covered):
    """Also where the word before it is said to last until its end, as Whisper's attention may have it."""
    audio, truth = talk
    start_s, end_s, _ = truth[4]
    first = transcriber.transcribe(audio)

    def forget(words: list[list[Word]]) -> list[list[Word]]:
        kept = without(words, start_s, end_s)
        before = [word for of_segment in kept for word in of_segment if word.start_s < start_s]
        if is_covered:
            before[-1].end_s = end_s
        return kept

    windows_read = let_first_reading_be(forget)
    again = transcriber.transcribe(audio)
    assert any(start_s - 0.5 < window.start_s < window.end_s < end_s + 0.5 for window in windows_read[1])
    assert [word.word.strip().lower() for word in again.words] == [word.word.strip().lower() for word in first.words]
    assert [word.start_s for word in again.words] == sorted(word.start_s for word in again.words)


def test_a_sentence_around_a_listeners_word_is_read_again_as_one(talk, transcriber, let_first_reading_be):
    """And the word in its middle, which the second reading has too, is there once."""
    audio, truth = talk
    start_s, end_s, _ = truth[3]
    first = transcriber.transcribe(audio)
    inside = [word for word in first.words if start_s - 0.2 < word.start_s < end_s]
    middle_s = (start_s + end_s) / 2
    alone = min(inside, key=lambda word: abs(word.start_s + word.end_s - 2 * middle_s))
    alone = replace(alone, start_s=middle_s - 0.05, end_s=middle_s + 0.05)
    windows_read = let_first_reading_be(lambda words: [*without(words, start_s, end_s), [alone]])
    again = transcriber.transcribe(audio)
    (window,) = (window for window in windows_read[1] if window.start_s < middle_s < window.end_s)
    assert start_s - 0.5 < window.start_s < start_s + 0.2 and end_s - 0.2 < window.end_s < end_s + 0.5
    before, after = ([word.word.strip(" .?").lower() for word in transcript.words] for transcript in (first, again))
    assert [after.count(word) for word in ("the", "number", "is")] == [before.count(word) for word in ("the", "number", "is")] == [2, 2, 2]


@pytest.mark.parametrize(("alone", "num_stretches"), [((3.9, 4.1), 1), ((3.9, 4.8), 2), ((3.3, 3.4), 1), ((2.95, 3.0), 1)])
def test_only_a_word_in_the_middle_of_what_was_passed_over_is_read_across(alone, num_stretches):
    """(3.3, 3.4) leaves nothing of its left side: what follows it is read alone; 0.9 s is more than a word."""
    transcript = Transcript(speech=[Span(1.0, 6.0)])
    words = [Word(" so", 1.0, 2.7, 0.9), Word(" yeah", *alone, 0.9)]
    transcript.segments = [Segment([word], 0.0) for word in words]
    stretches = passed_over(transcript)
    assert len(stretches) == num_stretches
    assert stretches[-1].end_s == 6.0
    assert (stretches[0].start_s < alone[0]) == (alone[0] > 3.5)


@pytest.mark.slow
def test_what_is_read_again_fits_a_window_and_nothing_of_it_is_left_out(talk, transcriber, let_first_reading_be, monkeypatch):
    audio, _ = talk
    windows_read = let_first_reading_be(lambda words: [])
    monkeypatch.setattr(transcriber, "config", replace(transcriber.config, max_window_s=1.4))
    speech = transcriber.transcribe(audio).speech
    assert any(span.duration_s > 1.4 for span in speech), "the talk has a stretch longer than a window"
    assert all(window.duration_s <= 1.4 + 1e-6 for window in windows_read[1])
    heard_s = sum(window.duration_s for window in windows_read[1])
    assert heard_s <= len(audio) / 16_000, "none of it twice: faster-whisper refuses more windows than there is recording"
    assert heard_s >= sum(span.duration_s for span in speech if span.duration_s >= 0.5)


@pytest.mark.parametrize("sound", ["silence", "noise", "tone", "chords"])
def test_no_word_is_heard_where_nobody_speaks(sound, transcriber):
    time_s = np.arange(30 * 16_000) / 16_000
    chords = sum(np.sin(2 * np.pi * hz * time_s) * (0.5 + 0.5 * np.sin(2 * np.pi * 2 * time_s)) for hz in (220, 277.2, 329.6))
    audio = {
        "silence": np.zeros(len(time_s)),
        "noise": np.random.default_rng(0).normal(0, 0.05, len(time_s)),
        "tone": 0.2 * np.sin(2 * np.pi * 440 * time_s),
        "chords": 0.1 * chords,
    }[sound]
    assert transcriber.transcribe(audio.astype(np.float32)).words == []


def test_two_voices_are_two_speakers_and_words_are_given_to_them(talk):
    audio, truth = talk
    transcript = Transcript(speakers=Diarizer(DiarizeConfig()).diarize(audio))
    assert len({span.speaker for span in transcript.speakers}) == 2
    words = [Word(" x", (start_s + end_s) / 2 - 0.1, (start_s + end_s) / 2 + 0.1, 1.0) for start_s, end_s, _ in truth]
    transcript.segments = [Segment(words, 0.0)]
    assign_speakers(transcript)
    assert [word.speaker for word in words] == [speaker for _, _, speaker in truth]


def given(speakers: list[SpeakerSpan], *words: tuple[str, float, float]) -> list[int]:
    made = [Word(f" {text}", start_s, end_s, 1.0) for text, start_s, end_s in words]
    assign_speakers(Transcript(segments=[Segment(made, 0.0)], speakers=speakers))
    return [word.speaker for word in made]


def test_words_that_two_speakers_cover_go_with_those_around_them():
    talk = [SpeakerSpan(0, 1.5, 3.0), SpeakerSpan(1, 0.0, 2.0)]  # 1 begins, 0 comes in before 1 has ended
    words = [("so", 0.0, 0.4), ("then", 0.5, 0.9), ("again", 1.0, 1.4), ("sure.", 1.55, 1.9), ("why", 2.2, 2.4), ("not", 2.4, 2.9)]
    assert given(talk, *words) == [1, 1, 1, 1, 0, 0], "the sentence's end is where the speakers change"
    assert given([SpeakerSpan(0, 0.0, 1.05), SpeakerSpan(1, 1.05, 3.0)], ("a", 0.0, 0.5), ("b", 1.0, 1.4), ("c", 1.5, 2.0)) == [0, 1, 1]


def test_a_word_in_another_speakers_words_is_that_speakers_where_the_spans_say_so():
    talk = [SpeakerSpan(0, 0.0, 1.0), SpeakerSpan(1, 1.0, 1.5), SpeakerSpan(0, 1.5, 3.0)]
    assert given(talk, ("one", 0.5, 1.0), ("yes", 1.0, 1.5), ("two", 1.5, 2.0)) == [0, 1, 0]


def test_a_word_outside_of_all_spans_is_the_nearest_speakers():
    talk = [SpeakerSpan(0, 0.0, 1.0), SpeakerSpan(1, 3.0, 4.0)]
    assert given(talk, ("a", 1.1, 1.3), ("b", 2.7, 2.9), ("c", 5.0, 5.2)) == [0, 1, 1]
    assert given([], ("a", 0.0, 1.0)) == [NO_SPEAKER]


def test_one_voice_is_one_speaker_and_silence_is_nobody(talk):
    audio, truth = talk
    alone = np.concatenate([audio[int(start_s * 16_000) : int(end_s * 16_000)] for start_s, end_s, speaker in truth if speaker == 0])
    assert {span.speaker for span in Diarizer(DiarizeConfig()).diarize(alone)} == {0}
    assert Diarizer(DiarizeConfig()).diarize(np.zeros(32_000, np.float32)) == []


@pytest.mark.slow
def test_long_recordings_are_clustered_in_parts_that_are_linked(talk, monkeypatch):
    audio, _ = talk
    whole = Diarizer(DiarizeConfig()).diarize(np.tile(audio, 3))
    monkeypatch.setattr("data_prep.diarize._MAX_TOGETHER", 30)
    parts = Diarizer(DiarizeConfig()).diarize(np.tile(audio, 3))
    assert [(span.speaker, span.start_s) for span in parts] == [(span.speaker, span.start_s) for span in whole]


def test_near_silence_after_speech_is_nobody(talk):
    audio, truth = talk
    start_s, end_s, _ = truth[0]
    said = audio[int(start_s * 16_000) : int(end_s * 16_000)]
    noise = np.random.default_rng(0).normal(0, 1e-4 * np.abs(said).max(), 32_000).astype(np.float32)
    activity = segmentation.local_activity(np.concatenate([said, noise])).of_the_audible()
    probability = activity.averaged(activity.probabilities.max(axis=2))
    gone = segmentation.frame_index(len(said) / 16_000 + 0.1)
    assert probability[:gone].max() > 0.5 and probability[gone:].max() == 0


def test_voices_that_are_all_unlike_leave_somebody():
    voices = np.eye(256, dtype=np.float32)[:60]
    assert len(Diarizer(DiarizeConfig())._centroids(voices, 0.25)) >= 1
    assert len(Diarizer(DiarizeConfig(max_speakers=2))._centroids(np.repeat(voices[:5], [9, 5, 7, 8, 6], axis=0), 0.25)) == 2
    assert len(Diarizer(DiarizeConfig(num_speakers=3))._centroids(voices[:3], 0.25)) == 3


def segment(text: str, probability: float = 0.9, word_s: float = 0.3, no_speech: float = 0.0) -> Segment:
    return Segment(
        [Word(f" {word}", index * word_s, (index + 1) * word_s, probability) for index, word in enumerate(text.split())], no_speech
    )


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (segment("we went there yesterday and it was fine"), None),
        (segment("thank you"), None),  # surely heard: people do say it
        (segment("thank you", probability=0.3), "known_phrase"),
        (segment("Thanks for watching!", probability=0.4), "known_phrase"),
        (segment("yes no " * 20), "repeats"),
        (segment("one two one two one two one two one three"), "repeats"),
        (segment("extraordinarily incomprehensible circumlocutions", word_s=0.1), "too_fast"),
        (segment("what is it", probability=0.2, no_speech=0.9), "no_speech"),
        (segment("what is it", probability=0.2, no_speech=0.1), None),
        (segment("... -"), "no_words"),
    ],
)
def test_what_whisper_makes_up_is_told_from_what_people_say(entry, reason):
    why = disbelief(entry, TranscribeConfig())
    assert (why and why[0]) == reason


def test_windows_are_cut_in_silences_and_hold_all_speech():
    speech = [Span(0.0, 10.0), Span(11.0, 20.0), Span(21.0, 35.0), Span(40.0, 110.0)]
    windows = windows_of(speech, TranscribeConfig(max_window_s=28.0))
    assert all(window.duration_s <= 28.0 for window in windows)
    assert windows[0] == Span(0.0, 20.0)
    assert all(any(window.start_s <= span.start_s < window.end_s for window in windows) for span in speech)


def test_whisper_base_is_put_together_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = packaged_whisper.find_base()
    assert folder is not None and folder.is_relative_to(tmp_path)
    assert hashlib.sha256((folder / "model.bin").read_bytes()).hexdigest() == packaged_whisper.WEIGHTS_SHA256
    changed = (folder / "model.bin").stat().st_mtime_ns
    assert packaged_whisper.find_base() == folder and (folder / "model.bin").stat().st_mtime_ns == changed
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_other_weights_are_refused(tmp_path):
    wrong = tmp_path / "pytorch_model.bin"
    wrong.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"expected 0b5b3216d60a2d32"):
        segmentation.SegmentationNet(wrong)


def test_quality_tells_bandwidth_noise_and_clipping(talk):
    audio = soxr.resample(talk[0], 16_000, 24_000)
    assert 6_000 < quality.bandwidth_hz(audio) <= 8_200
    telephone = soxr.resample(soxr.resample(audio, 24_000, 8_000), 8_000, 24_000)
    assert quality.bandwidth_hz(telephone) < 4_200
    noise = np.random.default_rng(1).normal(0, 0.02, len(audio)).astype(np.float32)
    clean, noisy = (
        quality.turn_quality(clip, 0.0, len(clip) / 24_000, [Span(0.0, 100.0)], quality.noise_level_db(clip))
        for clip in (audio, audio + noise)
    )
    assert clean["snr_db"] > noisy["snr_db"] + 15 and clean["speech_share"] == 1.0
    assert quality.turn_quality(np.ones(2_400, np.float32), 0.0, 0.1, [], -60.0)["clipping"] == 1.0


def test_dnsmos_hears_noise(talk):
    audio = soxr.resample(talk[0], 16_000, 24_000)
    noise = np.random.default_rng(1).normal(0, 0.03, len(audio)).astype(np.float32)
    assert dnsmos(audio, 5.0)["dnsmos"] > dnsmos(audio + noise, 5.0)["dnsmos"] + 0.4
