"""Turns to codes and samples: batches, cuts at turn boundaries, numbers of speakers, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csm.codec import Codec, SpectralCodec
from csm.config import EncodeConfig
from csm.frames import num_frames_from_samples
from csm.text import ByteTokenizer, WordTokenizer
from data_prep.encode import Conversation, cut_turns, encode_all, samples_of
from data_prep.failures import Failure, Rejected
from data_prep.ingest import Ingested
from data_prep.manifest import ManifestTurn, Recording
from data_prep.shard import Sample, check_sample

TEXT = ByteTokenizer()


def noise(duration_s: float, seed: int = 0, rows: int = 1) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, round(duration_s * 24_000))) * 0.1).astype(np.float32)


def conversation(
    *turns: tuple[int, str, float, float], audio: np.ndarray | None = None, digest: str = "d" * 16, **settings: object
) -> Conversation:
    """Cut turns given as (speaker, text, start_s, end_s)."""
    audio = noise(max(end for *_, end in turns)) if audio is None else audio
    listed = [ManifestTurn(text, speaker, f"s{speaker}", start, end) for speaker, text, start, end in turns]
    return cut_turns(Recording(digest, "a.wav", 1, 1.0, listed), Ingested(audio, 0.0, [0.0]), EncodeConfig(**settings))  # type: ignore[arg-type]


def pieces(
    conversations: list[Conversation], codec: Codec, tokenizer: object = TEXT, **settings: object
) -> tuple[list[Sample], list[Failure]]:
    config = EncodeConfig(**settings)  # type: ignore[arg-type]
    outcomes = [o for c in encode_all(conversations, codec) for o in samples_of(c, tokenizer, config)]  # type: ignore[arg-type]
    return [o for o in outcomes if isinstance(o, Sample)], [o for o in outcomes if isinstance(o, Failure)]


@pytest.fixture(scope="module")
def small_mimi() -> Codec:
    from transformers import MimiConfig

    from csm.codec.mimi import MimiCodec

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_filters=4, upsample_groups=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    tables = dict(codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=4)
    codec = MimiCodec(MimiConfig(intermediate_size=64, **sizes, **tables))
    for name, buffer in codec.model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    return codec


@pytest.fixture(params=["spectral", "mimi"])
def any_codec(request: pytest.FixtureRequest) -> Codec:
    return request.getfixturevalue({"spectral": "small_codec", "mimi": "small_mimi"}[request.param])


def test_turns_encoded_together_equal_turns_encoded_alone(any_codec: Codec) -> None:
    """Batches reach over recordings and hold every length; each turn's codes are those of its own audio alone."""
    recordings = [
        conversation((0, "a", 0.0, 1.0), (1, "b", 1.0, 1.31), (0, "c", 1.5, 4.0), audio=noise(4.0, seed), digest=f"{seed:016x}")
        for seed in range(4)
    ]
    samples, failures = pieces(recordings, any_codec)
    assert not failures and len(samples) == 4
    for sample, recording in zip(samples, recordings, strict=True):
        alone = [any_codec.encode([recording.clip(turn)])[0].numpy() for turn in recording.turns]
        np.testing.assert_array_equal(sample.codes, np.concatenate(alone, axis=1))
        check_sample(sample.key, sample.meta, sample.codes, any_codec.index_entry(), where="here")


def test_small_batches_give_the_same_codes(any_codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    def codes() -> list[np.ndarray]:
        recordings = [conversation((0, "a", 0.0, 0.7), (1, "b", 0.7, 2.0), audio=noise(2.0, seed)) for seed in range(3)]
        return [sample.codes for sample in pieces(recordings, any_codec)[0]]

    together = codes()
    monkeypatch.setattr("data_prep.encode.BATCH_S", 0.5)
    for one, other in zip(codes(), together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_silence_inside_a_turn_gives_no_all_zero_frame(any_codec: Codec) -> None:
    audio = noise(3.0)
    audio[:, 12_000:60_000] = 0.0
    (sample,), _ = pieces([conversation((0, "a", 0.0, 3.0), audio=audio)], any_codec)
    assert not (sample.codes == 0).all(axis=0).any()


def test_conversation_is_cut_between_turns_so_that_each_part_fits(small_codec: SpectralCodec) -> None:
    turns = [(i % 2, "word " * 3, 2.0 * i, 2.0 * i + 1.5) for i in range(10)]
    samples, failures = pieces([conversation(*turns)], small_codec, max_positions=120)
    assert not failures
    kept = [turn for sample in samples for turn in sample.meta["turns"]]
    assert [turn["text"] for turn in kept] == ["word " * 3] * 10
    for sample in samples:
        num_positions = sum(
            len(TEXT.encode_turn(t["speaker"], t["text"])) + t["frames"][1] - t["frames"][0] + 1 for t in sample.meta["turns"]
        )
        assert num_positions <= 120
        assert sample.meta["turns"][0]["start_s"] == 0.0 and sample.meta["turns"][0]["speaker"] == 0
        assert sample.meta["duration_s"] == sample.meta["turns"][-1]["end_s"]
    assert [sample.key for sample in samples] == [f"{'d' * 16}-{start}" for start in (0, 6000, 12000, 18000)]


def test_speakers_are_numbered_as_they_speak_or_keep_their_numbers(small_codec: SpectralCodec) -> None:
    turns = [(7, "a", 0.0, 1.0), (3, "b", 1.0, 2.0), (7, "c", 2.0, 3.0)]
    (sample,), _ = pieces([conversation(*turns)], small_codec)
    assert [turn["speaker"] for turn in sample.meta["turns"]] == [0, 1, 0]
    assert [turn["speaker_name"] for turn in sample.meta["turns"]] == ["s7", "s3", "s7"]
    (sample,), _ = pieces([conversation(*turns)], small_codec, renumber_speakers=False)
    assert [turn["speaker"] for turn in sample.meta["turns"]] == [7, 3, 7]


@pytest.mark.parametrize(("bad", "reason"), [((0, "b", 1.0, 1.1), "short_turn"), ((0, "b", 1.0, 4.0), "long_turn")], ids=["short", "long"])
def test_turn_of_a_wrong_length_is_dropped_counted_and_ends_the_context(
    bad: tuple[int, str, float, float], reason: str, small_codec: SpectralCodec
) -> None:
    samples, failures = pieces([conversation((1, "a", 0.0, 1.0), bad, (1, "c", 4.0, 5.0), max_turn_s=2.0)], small_codec)
    assert [(f.turn, f.stage, f.reason) for f in failures] == [(1, "encode", reason)]
    assert failures[0].duration_s == pytest.approx(bad[3] - bad[2])
    assert [[turn["text"] for turn in sample.meta["turns"]] for sample in samples] == [["a"], ["c"]]


def test_silent_turn_is_dropped(small_codec: SpectralCodec) -> None:
    audio = noise(2.0)
    audio[:, 24_000:] = 0.0
    samples, failures = pieces([conversation((0, "a", 0.0, 1.0), (1, "nothing", 1.0, 2.0), audio=audio)], small_codec)
    assert len(samples) == 1 and [(f.turn, f.reason) for f in failures] == [(1, "silent")]


def test_turn_that_no_window_holds_is_dropped(small_codec: SpectralCodec) -> None:
    samples, failures = pieces([conversation((0, "a" * 200, 0.0, 1.0), (1, "b", 1.0, 2.0))], small_codec, max_positions=100)
    assert [(f.turn, f.reason) for f in failures] == [(0, "long_turn")]
    assert [sample.meta["turns"][0]["text"] for sample in samples] == ["b"]


def test_words_the_tokenizer_does_not_know_are_dropped_by_turn(small_codec: SpectralCodec, word_tokenizer: WordTokenizer) -> None:
    turns = [(0, "one two", 0.0, 1.0), (1, "Eleven", 1.0, 2.0), (0, "three", 2.0, 3.0)]
    samples, failures = pieces([conversation(*turns)], small_codec, word_tokenizer)
    assert [(f.turn, f.reason) for f in failures] == [(1, "unknown_text")] and "'Eleven'" in failures[0].detail
    assert [[turn["text"] for turn in sample.meta["turns"]] for sample in samples] == [["one two"], ["three"]]


@pytest.mark.parametrize("times", [(0.0, 5.2), (5.0, 6.0)], ids=["ends_late", "starts_late"])
def test_times_outside_of_the_recording_reject_it(times: tuple[float, float]) -> None:
    with pytest.raises(Rejected, match="bad_times: turn 0 is from"):
        conversation((0, "a", *times), audio=noise(5.0))


def test_a_rounded_end_is_taken_as_the_end(small_codec: SpectralCodec) -> None:
    (sample,), _ = pieces([conversation((0, "a", 0.0, 2.05), audio=noise(2.0))], small_codec)
    assert sample.codes.shape[1] == num_frames_from_samples(48_000)


def test_overlapping_turns_are_both_marked_and_kept(small_codec: SpectralCodec) -> None:
    turns = [(0, "long", 0.0, 3.0), (1, "mm", 1.0, 1.5), (1, "after", 2.5, 4.0), (0, "alone", 4.0, 5.0)]
    (sample,), _ = pieces([conversation(*turns)], small_codec)
    assert [turn["overlap"] for turn in sample.meta["turns"]] == [True, True, True, False]


def test_turns_of_channels_are_cut_from_their_own(small_codec: SpectralCodec) -> None:
    audio = noise(2.0, rows=2)
    turns = [ManifestTurn("a", 0, None, 0.0, 1.0, channel=0), ManifestTurn("b", 1, None, 0.5, 2.0, channel=1)]
    cut = cut_turns(Recording("d" * 16, "a.wav", 1, 2.0, turns), Ingested(audio, 0.0, [0.0, 0.0]), EncodeConfig())
    np.testing.assert_array_equal(cut.clip(cut.turns[0]).numpy(), audio[0, :24_000])
    np.testing.assert_array_equal(cut.clip(cut.turns[1]).numpy(), audio[1, 12_000:])


def test_kept_audio_is_the_samples_own_stretch(small_codec: SpectralCodec) -> None:
    turns = [(0, "a", 1.0, 2.0), (1, "b", 3.0, 4.0)]
    (sample,), _ = pieces([conversation(*turns, audio=(audio := noise(5.0)))], small_codec, keep_audio=True)
    assert sample.audio is not None
    np.testing.assert_array_equal(sample.audio, audio[0, 24_000:96_000])
    assert [turn["start_s"] for turn in sample.meta["turns"]] == [0.0, 2.0]


def test_samples_that_begin_together_have_keys_of_their_own(small_codec: SpectralCodec) -> None:
    turns = [(0, "a" * 60, 0.0, 1.0), (1, "b" * 60, 0.0, 1.0)]
    samples, _ = pieces([conversation(*turns)], small_codec, max_positions=100)
    assert [sample.key[-2:] for sample in samples] == ["-0", "-1"]


def test_order_of_conversations_is_kept(small_codec: SpectralCodec) -> None:
    recordings = [conversation((0, "a", 0.0, 0.5), digest=f"{seed:016x}") for seed in (3, 1, 2)]
    assert [sample.key[15] for sample in pieces(recordings, small_codec)[0]] == ["3", "1", "2"]
