"""Rows and codes are one another's inverse, and a batch lays documents out without mixing them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csm import frames
from csm.frames import Batch, Rows, Turn
from csm.text import ByteTokenizer

TEXT = ByteTokenizer()
num_codebooks_st = st.sampled_from([2, 4, 8, 32])


@st.composite
def turns_st(draw: st.DrawFn, max_turns: int = 4, *, num_codebooks: int | None = None, with_silent_turns: bool = True) -> list[Turn]:
    """Turns of one conversation: random texts, codes with zeros in them but no all-zero frame, some without codes."""
    num_codebooks = draw(num_codebooks_st) if num_codebooks is None else num_codebooks
    turns = []
    for _ in range(draw(st.integers(1, max_turns))):
        num_frames = draw(st.integers(1, 6))
        seed = draw(st.integers(0, 2**16))
        codes = torch.randint(0, 3, (num_codebooks, num_frames), generator=torch.Generator().manual_seed(seed))
        codes[draw(st.integers(0, num_codebooks - 1))] += 1  # every frame has a code that is not zero
        has_audio = not with_silent_turns or draw(st.booleans())
        turns.append(
            Turn(
                speaker=draw(st.integers(0, 9)),
                text=draw(st.text(max_size=8)),
                codes=codes if has_audio else None,
                learn_c0=draw(st.booleans()),
                learn_depth=draw(st.booleans()),
            )
        )
    return turns


def _num_codebooks(turns: list[Turn]) -> int:
    return next((turn.codes.shape[0] for turn in turns if turn.codes is not None), 4)


@settings(max_examples=60)
@given(turns_st())
def test_rows_then_codes_is_the_identity(turns: list[Turn]) -> None:
    rows = frames.rows_from_turns(turns, TEXT, _num_codebooks(turns))
    spoken = [turn.codes for turn in turns if turn.codes is not None]
    found = frames.codes_from_rows(rows.tokens, rows.mask)
    assert len(found) == len(spoken)
    assert all(torch.equal(a, b) for a, b in zip(found, spoken, strict=True))


@settings(max_examples=60)
@given(turns_st())
def test_rows_hold_text_then_frames_then_one_eos(turns: list[Turn]) -> None:
    num_codebooks = _num_codebooks(turns)
    rows = frames.rows_from_turns(turns, TEXT, num_codebooks)
    position = 0
    for turn in turns:
        ids = TEXT.encode_turn(turn.speaker, turn.text)
        text = slice(position, position + len(ids))
        assert rows.tokens[text, -1].tolist() == ids
        assert rows.mask[text, -1].all()
        assert not rows.mask[text, :-1].any()
        assert not (rows.tokens[text, :-1]).any()
        assert not rows.learn_c0[text].any()
        assert not rows.learn_depth[text].any()
        position = text.stop
        if turn.codes is None:
            continue
        audio = slice(position, position + turn.codes.shape[1] + 1)
        assert torch.equal(rows.tokens[audio, :-1][:-1], turn.codes.T)
        assert rows.mask[audio, :-1].all()
        assert not rows.mask[audio, -1].any()
        assert frames.is_eos_row(rows.tokens, rows.mask)[audio].tolist() == [False] * turn.codes.shape[1] + [True]
        assert set(rows.learn_c0[audio].tolist()) == {turn.learn_c0}
        assert set(rows.learn_depth[audio].tolist()) == {turn.learn_depth}
        position = audio.stop
    assert position == len(rows)


def test_the_frames_of_an_unfinished_turn_are_read_back() -> None:
    codes = torch.tensor([[1, 0, 3], [0, 2, 0]])
    rows = frames.audio_rows(codes, with_eos=False)
    assert len(rows) == 3
    assert torch.equal(frames.codes_from_rows(rows.tokens, rows.mask)[0], codes)


def test_an_empty_turn_keeps_its_place() -> None:
    rows = frames.Rows.concatenate(
        [frames.audio_rows(torch.zeros(3, 0, dtype=torch.int64)), frames.audio_rows(torch.ones(3, 2, dtype=torch.int64))]
    )
    assert [codes.shape for codes in frames.codes_from_rows(rows.tokens, rows.mask)] == [(3, 0), (3, 2)]


def test_codes_of_shards_are_taken_as_they_are_stored() -> None:
    rows = frames.audio_rows(torch.tensor([[2047, 1], [5, 6]], dtype=torch.int16))
    assert rows.tokens.dtype == torch.int64
    assert rows.tokens[0, :2].tolist() == [2047, 5]


def test_an_all_zero_frame_is_refused() -> None:
    codes = torch.ones(4, 5, dtype=torch.int64)
    codes[:, 3] = 0
    with pytest.raises(ValueError, match="frame 3 of 5 .* means EOS"):
        frames.audio_rows(codes)


def test_codes_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(1, 4, 5\), expected \[K, F\]"):
        frames.audio_rows(torch.ones(1, 4, 5, dtype=torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_codes_that_are_not_whole_numbers_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="expected whole numbers"):
        frames.audio_rows(torch.ones(4, 5).to(dtype))


def test_negative_codes_are_refused() -> None:
    codes = torch.ones(4, 5, dtype=torch.int64)
    codes[2, 1] = -1
    with pytest.raises(ValueError, match="-1"):
        frames.audio_rows(codes)


def test_a_turn_of_another_codec_is_refused() -> None:
    with pytest.raises(ValueError, match="4 codebooks, the model expects 8"):
        frames.rows_from_turn(Turn(0, "a", codes=torch.ones(4, 2, dtype=torch.int64)), TEXT, 8)


def test_a_text_id_of_zero_is_no_eos() -> None:
    rows = frames.text_rows([0, 1], num_codebooks=4)
    assert not frames.is_eos_row(rows.tokens, rows.mask).any()


@settings(max_examples=40)
@given(st.lists(st.lists(turns_st(2, num_codebooks=4), min_size=0, max_size=3), min_size=1, max_size=3), st.integers(0, 5))
def test_packing_keeps_every_document_whole(packed_turns: list[list[list[Turn]]], num_extra: int) -> None:
    packed = [[frames.rows_from_turns(turns, TEXT, 4) for turns in row] for row in packed_turns]
    if not any(packed):
        with pytest.raises(ValueError, match="at least one document"):
            Batch.from_documents(packed)
        return
    longest = max(sum(map(len, row)) for row in packed)
    batch = Batch.from_documents(packed, seq_len=longest + num_extra, keys=["a"])
    assert batch.tokens.shape == batch.mask.shape == (len(packed), longest + num_extra, 5)
    for row_index, row in enumerate(packed):
        for document_index, document in enumerate(row):
            (positions,) = (batch.document_ids[row_index] == document_index).nonzero(as_tuple=True)
            assert positions.tolist() == list(range(int(positions[0]), int(positions[0]) + len(document)))
            assert torch.equal(batch.tokens[row_index, positions], document.tokens)
            assert torch.equal(batch.mask[row_index, positions], document.mask)
            assert torch.equal(batch.learn_c0[row_index, positions], document.learn_c0)
            assert torch.equal(batch.learn_depth[row_index, positions], document.learn_depth)
        padding = batch.document_ids[row_index] == frames.PADDING_DOCUMENT
        assert int(padding.sum()) == longest + num_extra - sum(map(len, row))
        assert not batch.mask[row_index, padding].any()
        assert not batch.learn_c0[row_index, padding].any()
        assert not batch.learn_depth[row_index, padding].any()


def test_a_frame_that_opens_its_document_is_never_learnt() -> None:
    document = frames.audio_rows(torch.ones(4, 3, dtype=torch.int64))
    batch = Batch.from_documents([[document, document]])
    assert batch.learn_c0.tolist() == [[False, True, True, True] * 2]
    assert torch.equal(batch.learn_c0, batch.learn_depth)


def test_documents_longer_than_a_row_are_refused() -> None:
    document = frames.text_rows([1] * 9, 4)
    with pytest.raises(ValueError, match="9 positions do not fit rows of 8"):
        Batch.from_documents([[document]], seq_len=8)


def test_a_batch_counts_its_frames_without_eos() -> None:
    document = Rows.concatenate([frames.text_rows([1, 2], 4), frames.audio_rows(torch.ones(4, 3, dtype=torch.int64))])
    assert Batch.from_documents([[document, document], [document]], seq_len=20).num_frames == 9


def test_a_batch_moves_with_its_keys() -> None:
    batch = Batch.from_documents([[frames.text_rows([1, 2], 4)]], keys=["0123-0"])
    moved = batch.to("meta")
    assert moved.keys == ["0123-0"]
    assert {t.device.type for t in (moved.tokens, moved.mask, moved.document_ids, moved.learn_c0, moved.learn_depth)} == {"meta"}


@given(st.integers(0, 10**9))
def test_frames_cover_the_samples_and_no_frame_is_idle(num_samples: int) -> None:
    num_frames = frames.num_frames_from_samples(num_samples)
    assert frames.num_samples_from_frames(num_frames) >= num_samples
    assert frames.num_samples_from_frames(num_frames) - num_samples < frames.SAMPLES_PER_FRAME


@given(st.integers(0, 10**7))
def test_seconds_of_frames_are_those_frames_again(num_frames: int) -> None:
    assert frames.frames_from_seconds(frames.seconds_from_frames(num_frames)) == num_frames


@pytest.mark.parametrize(("num_samples", "num_frames"), [(0, 0), (1, 1), (1919, 1), (1920, 1), (1921, 2), (240_000, 125)])
def test_a_started_frame_counts(num_samples: int, num_frames: int) -> None:
    assert frames.num_frames_from_samples(num_samples) == num_frames


def test_the_clock_is_mimis() -> None:
    assert frames.SAMPLE_RATE_HZ / frames.FRAME_RATE_HZ == frames.SAMPLES_PER_FRAME
    assert frames.frames_from_seconds(10.0) == 125
    assert frames.seconds_from_frames(125) == 10.0


def test_a_conversation_without_turns_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one turn"):
        frames.rows_from_turns([], TEXT, 4)


def test_a_conversation_is_its_text_rows_and_audio_rows_joined() -> None:
    codes = torch.randint(1, 9, (4, 3), generator=torch.Generator().manual_seed(0))
    turns = [frames.Turn(0, "one"), frames.Turn(1, "two", codes=codes, learn_c0=False), frames.Turn(0, "one", codes=codes + 1)]
    parts = []
    for turn in turns:
        parts.append(frames.text_rows(TEXT.encode_turn(turn.speaker, turn.text), 4))
        if turn.codes is not None:
            parts.append(frames.audio_rows(turn.codes, learn_c0=turn.learn_c0, learn_depth=turn.learn_depth))
    whole, joined = frames.rows_from_turns(turns, TEXT, 4), frames.Rows.concatenate(parts)
    for name in ("tokens", "mask", "learn_c0", "learn_depth"):
        assert torch.equal(getattr(whole, name), getattr(joined, name)) and getattr(whole, name).dtype == getattr(joined, name).dtype
