"""From words to turns: pauses, speakers, listeners' noises, and what is said at the same time."""

from __future__ import annotations

import pytest

from csm.config import SegmentConfig
from data_prep import segment
from data_prep.manifest import ManifestTurn
from data_prep.transcript import Dropped, Segment, Span, SpeakerSpan, Transcript, Word, transcript_from_json, unheard


def said(text: str, start_s: float, speaker: int, word_s: float = 0.3, pause_s: float = 0.05) -> list[Word]:
    words = []
    for word in text.split():
        words.append(Word(f" {word}", start_s, start_s + word_s, 0.9, speaker))
        start_s += word_s + pause_s
    return words


def heard(*parts: list[Word], channel: int | None = None, duration_s: float = 120.0) -> Transcript:
    segments = [Segment(part, no_speech=0.0) for part in parts]
    return Transcript(channel=channel, duration_s=duration_s, language="en", language_probability=1.0, segments=segments)


def turns_of(transcripts: list[Transcript], config: SegmentConfig) -> list[ManifestTurn]:
    turns, dropped = segment.turns_of(transcripts, config)
    assert not dropped
    return turns


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


@pytest.mark.parametrize(
    ("parts", "marked"),
    [
        ([said("are you coming", 0.0, 0), said("Yeah.", 1.2, 1), said("good then we go", 3.5, 0)], []),  # an answer: nobody goes on at once
        ([said("are you coming?", 0.0, 0), said("Yeah.", 1.2, 1), said("good then we go", 1.7, 0)], []),  # an answer: it was asked
        ([said("and then he said", 0.0, 0), said("Yeah.", 1.5, 1), said("that we should go", 2.2, 0)], ["Yeah."]),
        ([said("and then he said that we should go", 0.0, 0), said("Uh-huh.", 0.7, 1)], ["Uh-huh."]),
        ([said("and then he said that we should go", 0.0, 0), said("to the zoo", 0.7, 1)], []),
        ([said("Mm-hmm.", 0.0, 0), said("and then he said", 1.0, 1)], []),
    ],
)
def test_a_listeners_noise_is_told_from_an_answer(parts, marked):
    assert [turn.text for turn in turns_of([heard(*parts)], SegmentConfig()) if turn.backchannel] == marked


def test_what_is_said_at_the_same_time_is_marked_in_words_and_as_the_diarizer_heard_it():
    transcript = heard(said("one two three four", 0.0, 0), said("five six", 1.0, 1), said("seven eight nine", 5.0, 0))
    transcript.speakers = [SpeakerSpan(0, 5.0, 6.0), SpeakerSpan(1, 5.7, 7.0)]
    turns = turns_of([transcript], SegmentConfig())
    assert [(turn.text, turn.overlap) for turn in turns] == [("one two three four", True), ("five six", True), ("seven eight nine", True)]
    assert [round(turn.quality["overlap_share"], 2) for turn in turns] == [0.26, 0.54, 0.3]
    alone = turns_of([heard(said("one two", 0.0, 0), said("three", 0.75, 1))], SegmentConfig())
    assert not any(turn.overlap or turn.quality["overlap_share"] for turn in alone)


def test_a_listeners_noise_in_a_pause_is_not_talked_over_though_the_turn_goes_on_around_it():
    transcript = heard(said("and then he said", 0.0, 0), said("Yeah.", 1.6, 1), said("that we should go", 2.4, 0))
    turns = turns_of([transcript], SegmentConfig())
    assert [(turn.backchannel, turn.overlap) for turn in turns] == [(False, True), (True, False)]
    assert turns[1].quality["overlap_share"] == 0.0


def test_what_the_recogniser_writes_without_a_space_belongs_to_the_word_before():
    pieces = [Word(" Mm", 0.0, 0.2, 0.9, 0), Word("-hmm,", 0.2, 0.5, 0.6, 0), Word(" 50", 0.6, 0.8, 0.9, 0), Word("%.", 0.8, 1.0, 0.9, 1)]
    (turn,) = turns_of([heard(pieces)], SegmentConfig())
    assert [word["word"] for word in turn.words] == [" Mm-hmm,", " 50%."] and turn.words[0]["probability"] == 0.6
    assert " ".join(word["word"].strip() for word in turn.words) == turn.text == "Mm-hmm, 50%."
    characters = heard([Word(character, index * 0.2, index * 0.2 + 0.2, 0.9, 0) for index, character in enumerate("你好吗")])
    characters.language = "zh"
    (turn,) = turns_of([characters], SegmentConfig())
    assert turn.text == "你好吗" and len(turn.words) == 3


def test_words_that_are_none_are_told_and_not_lost():
    turns, dropped = segment.turns_of([heard(said("hello you", 0.0, 0), [Word(" -", 9.0, 9.4, 0.2, 0)])], SegmentConfig())
    assert told(turns) == [(0, "hello you")] and [(entry.reason, entry.detail) for entry in dropped] == [("no_words", "'-'")]


def test_speech_without_words_is_told_with_its_seconds():
    transcript = heard(said("one two", 1.0, 0))
    transcript.speech = [Span(0.8, 2.0), Span(10.0, 13.0), Span(20.0, 22.0)]
    transcript.dropped = [Dropped(20.2, 21.8, "repeats", "")]
    (entry,) = unheard(transcript)
    assert (entry.start_s, entry.end_s, entry.reason) == (10.0, 13.0, "unheard")
    transcript.speech = [Span(0.8, 2.0), Span(5.0, 5.8)]
    assert unheard(transcript) == []


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
