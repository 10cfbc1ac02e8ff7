"""From words to turns: pauses, speakers, listeners' noises, and what is said at the same time."""

from __future__ import annotations

import pytest

from csm.config import FilterConfig, SegmentConfig
from data_prep.filter import apart, refused_recording, refused_turn
from data_prep.manifest import ManifestTurn
from data_prep.segment import turns_of
from data_prep.transcript import Segment, Transcript, Word, transcript_from_json


def said(text: str, start_s: float, speaker: int, word_s: float = 0.3, pause_s: float = 0.05) -> list[Word]:
    words = []
    for word in text.split():
        words.append(Word(f" {word}", start_s, start_s + word_s, 0.9, speaker))
        start_s += word_s + pause_s
    return words


def heard(*parts: list[Word], channel: int | None = None, duration_s: float = 120.0) -> Transcript:
    segments = [Segment(part, no_speech=0.0) for part in parts]
    return Transcript(channel=channel, duration_s=duration_s, language="en", language_probability=1.0, segments=segments)


def told(turns: list[ManifestTurn]) -> list[tuple[int, str]]:
    return [(turn.speaker, turn.text) for turn in turns]


def test_a_speaker_goes_on_after_a_short_pause_and_begins_anew_after_a_long_one():
    transcript = heard(said("hello there", 0.0, 0), said("how are you", 1.6, 0), said("later now", 10.0, 0))
    assert told(turns_of([transcript], SegmentConfig())) == [(0, "hello there how are you"), (0, "later now")]


def test_another_speaker_in_between_ends_a_turn():
    transcript = heard(said("one two", 0.0, 0), said("three four", 0.8, 1), said("five", 1.7, 0))
    assert told(turns_of([transcript], SegmentConfig())) == [(0, "one two"), (1, "three four"), (0, "five")]


def test_a_listeners_noise_is_kept_and_marked_and_does_not_end_the_turn():
    transcript = heard(said("so then we went to", 0.0, 0), said("Mm-hmm.", 1.5, 1), said("the other place", 2.0, 0))
    turns = turns_of([transcript], SegmentConfig())
    assert [(turn.text, turn.backchannel) for turn in turns] == [("so then we went to the other place", False), ("Mm-hmm.", True)]


def test_a_short_answer_after_a_question_in_silence_is_no_listeners_noise():
    transcript = heard(said("are you coming with us", 0.0, 0), said("Yes.", 4.0, 1))
    assert not any(turn.backchannel for turn in turns_of([transcript], SegmentConfig()))


def test_a_long_turn_is_cut_at_the_end_of_a_sentence_and_nothing_is_lost():
    words = said("a b c d e. f g h i j k l", 0.0, 0, word_s=1.0)
    turns = turns_of([heard(words)], SegmentConfig(max_turn_s=8.0))
    assert [turn.text for turn in turns] == ["a b c d e.", "f g h i j k l"]
    assert all(turn.end_s - turn.start_s <= 8.2 for turn in turns)


def test_words_between_pauses_longer_than_any_turn_still_come_out_once():
    words = said(" ".join(f"w{index}" for index in range(50)), 0.0, 0, word_s=1.5)
    turns = turns_of([heard(words)], SegmentConfig(max_turn_s=5.0))
    assert " ".join(turn.text for turn in turns).split() == [f"w{index}" for index in range(50)]


def test_channels_are_speakers_and_may_speak_at_once():
    turns = turns_of([heard(said("hello hello hello", 0.0, 0), channel=0), heard(said("who is it", 0.5, 1), channel=1)], SegmentConfig())
    assert [(turn.channel, turn.text) for turn in turns] == [(0, "hello hello hello"), (1, "who is it")]


def test_room_around_a_turn_is_nobody_elses():
    turns = turns_of([heard(said("one", 1.0, 0), said("two", 1.34, 1))], SegmentConfig(pad_s=0.1))
    first, second = turns
    assert (
        first.start_s == pytest.approx(0.9)
        and first.end_s == pytest.approx(1.32, abs=1e-3)
        and second.start_s == pytest.approx(1.32, abs=1e-3)
    )


def test_text_is_as_heard_or_as_spoken_and_words_keep_what_was_heard():
    transcript = heard([Word(" It's", 0.0, 0.3, 0.9, 0), Word(" 742.", 0.3, 1.0, 0.9, 0)])
    (turn,) = turns_of([transcript], SegmentConfig())
    assert turn.text == "It's 742."
    (turn,) = turns_of([transcript], SegmentConfig(text="spoken"))
    assert turn.text == "its seven four two"
    assert [word["word"] for word in turn.words] == [" It's", " 742."]


def test_transcripts_survive_json_and_another_schema_is_refused_by_name():
    transcript = heard(said("one two", 0.0, 0))
    assert transcript_from_json(transcript.as_json(), "x").as_json() == transcript.as_json()
    with pytest.raises(ValueError, match="unknown key 'sppech'"):
        transcript_from_json({**transcript.as_json(), "sppech": []}, "x")


def turn(**changed: object) -> ManifestTurn:
    quality = {
        "snr_db": 20.0,
        "bandwidth_hz": 8000.0,
        "clipping": 0.0,
        "speech_share": 0.9,
        "asr_log_probability": -0.2,
        "asr_compression": 1.0,
    }
    values: dict = dict(text="one two three", speaker=0, start_s=0.0, end_s=1.5, quality=quality)
    quality |= {key: value for key, value in changed.items() if key in quality}
    return ManifestTurn(**(values | {key: value for key, value in changed.items() if key not in quality}))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"snr_db": -3.0}, "snr_db"),
        ({"bandwidth_hz": 3000.0}, "bandwidth_hz"),
        ({"clipping": 0.02}, "clipping"),
        ({"speech_share": 0.1}, "speech_share"),
        ({"asr_log_probability": -1.5}, "log_probability"),
        ({"asr_compression": 3.0}, "compression"),
        ({"text": " ".join(["word"] * 20)}, "words_per_s"),
        ({"end_s": 20.0}, "words_per_s"),
        ({"text": "mm-hmm", "end_s": 5.0, "backchannel": True}, None),
    ],
)
def test_each_threshold_takes_out_what_it_is_for_and_says_so(changed, reason):
    why = refused_turn(turn(**changed), FilterConfig())
    assert (why and why.reason) == reason


@pytest.mark.parametrize(
    ("language", "probability", "dnsmos", "reason"),
    [
        ("en", 0.9, 3.0, None),
        ("fr", 0.9, 3.0, "language"),
        ("en", 0.3, 3.0, "language"),
        ("en", 0.9, 1.5, "dnsmos"),
        ("en", 0.9, None, None),
    ],
)
def test_recordings_of_other_languages_or_bad_sound_are_left_out_whole(language, probability, dnsmos, reason):
    why = refused_recording(language, probability, dnsmos, FilterConfig(languages=["en"]))
    assert (why and why.reason) == reason


def test_what_is_talked_over_in_one_channel_is_context_and_not_learnt():
    turns = [turn(), turn(speaker=1, start_s=1.0, end_s=1.4), turn(start_s=2.0, end_s=3.5)]
    assert [kept.learn for _, kept, _ in apart(turns, FilterConfig())] == [False, False, True]
    by_channel = [turn(channel=0), turn(channel=1, speaker=1, start_s=1.0, end_s=1.4)]
    assert all(kept.learn for _, kept, _ in apart(by_channel, FilterConfig()))
