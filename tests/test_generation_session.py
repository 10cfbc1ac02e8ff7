"""A conversation that keeps its cache says what a one-shot request with the same turns says."""

from __future__ import annotations

import pytest
import torch

from csm import Turn
from csm.generation import Generator


@pytest.fixture(scope="module")
def speaker(speaking_model, small_codec, word_tokenizer) -> Generator:
    return Generator(speaking_model, small_codec, word_tokenizer, None)


def test_a_session_equals_one_shot_requests(speaker, make_codes):
    session = speaker.session()
    turns = [Turn(0, "one two", codes=make_codes())]
    session.add(turns[0])
    for seed, (text, number) in enumerate([("three", 1), ("four five", 0), ("six", 1)]):
        options = dict(seed=seed, max_duration_s=0.5)
        said = session.say(text, number, **options)
        spoken = speaker.last.codes
        assert torch.equal(said, speaker.generate(text, number, context=turns, **options))
        turns.append(Turn(number, text, codes=spoken.T))
        if seed == 1:
            turns.append(Turn(1, "nine", codes=make_codes(num_frames=3)))
            session.add(turns[-1])
    assert [(turn.speaker, turn.text) for turn in session.turns] == [(turn.speaker, turn.text) for turn in turns]


def test_a_reply_takes_in_only_what_is_new(speaker, make_codes, monkeypatch):
    session = speaker.session()
    session.add(Turn(0, "one two", codes=make_codes(num_frames=30)))
    session.say("three", 1, seed=0, max_duration_s=0.5)
    lengths = []
    prefill = session._decoder.prefill
    monkeypatch.setattr(session._decoder, "prefill", lambda tokens, mask: (lengths.append(tokens.shape[1]), prefill(tokens, mask)))
    session.say("four", 0, seed=0, max_duration_s=0.5)
    assert lengths == [2 + 4]  # the newest frame and the EOS row of the last reply; BOS, speaker, word, EOS


def test_old_turns_are_dropped_whole_when_the_window_is_full(speaker, make_codes):
    session = speaker.session()
    turns = [Turn(0, "one", codes=make_codes(num_frames=35)) for _ in range(2)]
    for turn in turns:
        session.add(turn)
    options = dict(temperature=0, max_duration_s=1.6)
    said = session.say("two", 1, **options)
    turns.append(Turn(1, "two", codes=speaker.last.codes.T))
    again = session.say("three", 0, **options)
    assert speaker.last.num_dropped_turns == 1
    assert torch.equal(again, speaker.generate("three", 0, context=turns[1:], **options))
    assert len(session.turns) == 3 and said.shape[0] > 0


def test_a_reply_left_early_is_remembered_as_far_as_it_was_made(speaker):
    session = speaker.session()
    stream = session.stream("one two", 0, seed=1, max_duration_s=1.0)
    next(stream)
    stream.close()
    (turn,) = session.turns
    assert 1 <= turn.codes.shape[1] <= 2
    options = dict(seed=2, max_duration_s=0.5)
    assert torch.equal(session.say("three", 1, **options), speaker.generate("three", 1, context=[turn], **options))


def test_mistakes_leave_the_session_as_it_was(speaker, make_codes):
    session = speaker.session()
    session.add(Turn(0, "one", codes=make_codes()))
    for mistake in (lambda: session.add(Turn(0, "two")), lambda: session.say("hello"), lambda: session.say("one " * 500)):
        with pytest.raises(ValueError):
            mistake()
    assert len(session.turns) == 1
    options = dict(seed=2, max_duration_s=0.5)
    assert torch.equal(session.say("two", **options), speaker.generate("two", context=session.turns[:1], **options))
