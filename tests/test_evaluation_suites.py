"""Suites hold the lines of a split, each once, in the suite it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest

from csm.evaluation.suites import CONTEXT, SINGLE, evenly_spaced, read_suites

TALK = [(0, "one two three", 5), (1, "four five", 4)]


def test_conversations_are_read_as_a_line_behind_its_context(tmp_path: Path, write_conversations) -> None:
    folder = write_conversations(tmp_path / "heldout", [[(2, "seven", 3)], TALK])
    suites = read_suites(folder, context=True)
    alone, answer = suites[SINGLE][0], suites[CONTEXT][0]
    assert (alone.text, alone.speaker, alone.voice, alone.context) == ("seven", 2, "2", [])
    assert (answer.text, answer.speaker) == ("four five", 1)
    assert [(turn.speaker, turn.text) for turn in answer.context] == [(0, "one two three")]
    assert answer.codes.shape == (4, 4) and answer.context[0].codes.shape == (4, 5)
    assert answer.reference_s == pytest.approx(4 * 0.08)  # without audio, the duration of its frames
    assert list(read_suites(folder, context=False)) == [SINGLE]


def test_a_suite_without_lines_is_refused(tmp_path: Path, write_conversations) -> None:
    only_alone = write_conversations(tmp_path / "alone", [[(2, "seven", 3)]])
    with pytest.raises(ValueError, match="context=false"):
        read_suites(only_alone, context=True)
    only_talk = write_conversations(tmp_path / "talk", [TALK])
    with pytest.raises(ValueError, match="of one turn"):
        read_suites(only_talk, context=True)


def test_the_corpus_gives_audio_of_the_answer_alone(demo_corpus_small: Path) -> None:
    suites = read_suites(demo_corpus_small / "heldout", context=True)
    assert len(suites[SINGLE]) == len(suites[CONTEXT]) == 12  # three strings, four voices
    for utterance in (*suites[SINGLE], *suites[CONTEXT]):
        assert utterance.audio is not None
        assert utterance.codes.shape[1] == -(-len(utterance.audio) // 1920)
    assert {turn.speaker for u in suites[CONTEXT] for turn in u.context} == {0, 1, 2, 3}
    assert all(turn.speaker != u.speaker for u in suites[CONTEXT] for turn in u.context)


def test_evenly_spaced_reaches_both_ends() -> None:
    assert evenly_spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert evenly_spaced([1, 2], 5) == [1, 2] == evenly_spaced([1, 2], 0)
