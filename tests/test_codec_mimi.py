"""Mimi over transformers: batched equals single, streamed equals whole, and clear words when there are no weights."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import MimiConfig, MimiModel

from csm.codec import codec_from_folder, load_codec
from csm.codec.mimi import MimiCodec, batches_by_length
from csm.codec.mimi_encoder import balanced_packs, map_in_threads

SLIDING_WINDOW = 10  # positions of attention, 5 frames: short, so that clips here reach past it


def tiny_mimi(seed: int = 0, **settings: object) -> MimiModel:
    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=32, num_filters=4, upsample_groups=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=8,
        intermediate_size=64, codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=8,
        sliding_window=SLIDING_WINDOW, layer_scale_initial_scale=0.5,
    )  # fmt: skip
    model = MimiModel(MimiConfig(**{**sizes, **settings}))
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_()
    return model


@pytest.fixture(scope="module")
def codec() -> MimiCodec:
    return MimiCodec(tiny_mimi())


def clips() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.1 * torch.randn(length, generator=generator) for length in (30_000, 1_920, 5_000, 60_001, 1)]


def test_codes_have_a_frame_for_every_begun_80_ms(codec):
    assert [tuple(codes.shape) for codes in codec.encode(clips())] == [(8, 16), (8, 1), (8, 3), (8, 32), (8, 1)]


def test_batched_codes_equal_single_codes(codec):
    together = codec.encode(clips())
    for clip, codes in zip(clips(), together, strict=True):
        assert torch.equal(codec.encode([clip])[0], codes)


@pytest.mark.parametrize("way", ["_encode_packed", "_encode_padded"])
def test_both_ways_to_encode_give_the_codes_of_transformers(codec, way):
    """Packed on a CPU, padded on a GPU. Where two entries are nearly as close, float32 rounding may choose: none is here."""
    lengths = [16, 1, 3, 32, 25]
    whole = [0.1 * torch.randn(length * 1920, generator=torch.Generator().manual_seed(length)) for length in lengths]
    with torch.inference_mode():
        expected = [codec.model.encode(clip[None, None], num_quantizers=8).audio_codes[0] for clip in whole]
        found = getattr(codec, way)(whole, lengths)
    assert max(codes.unique().numel() for codes in expected) > 8
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_residual_layers": 2},  # the second of them dilated
        {"upsampling_ratios": [15, 4, 4, 4]},
        {"upsampling_ratios": [12, 10, 8]},
        {"num_key_value_heads": 2},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_shapes_of_mimi_give_the_codes_of_transformers_one_by_one_and_together(settings):
    codec = MimiCodec(tiny_mimi(**settings))
    whole = [clip[: len(clip) // 1920 * 1920] for clip in clips() if len(clip) >= 1920]
    with torch.inference_mode():
        expected = [codec.model.encode(clip[None, None], num_quantizers=8).audio_codes[0] for clip in whole]
    for theirs, ours, alone in zip(expected, codec.encode(whole), [codec.encode([clip])[0] for clip in whole], strict=True):
        assert torch.equal(theirs, ours) and torch.equal(ours, alone)


def test_more_clips_than_a_pack_holds_keep_their_order(codec, monkeypatch):
    expected = [codec.encode([clip])[0] for clip in clips()]
    monkeypatch.setattr("csm.codec.mimi.MAX_PACKED_FRAMES", 17)  # less than all of them, and than the longest alone
    for ours, theirs in zip(codec.encode(clips()), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_inference", [False, True])
@pytest.mark.parametrize("num_clips", [1, 5])
def test_any_number_of_threads_gives_the_same_codes_and_stays_as_it_was(codec, num_clips, is_inference):
    generator = torch.Generator().manual_seed(4)
    clips = [torch.randn(1920 * (3 + 2 * index) + 7, generator=generator) * 0.1 for index in range(num_clips)]
    before = torch.get_num_threads()
    found = {}
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            with torch.inference_mode(is_inference):
                found[num_threads] = codec.encode(clips)
            assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
    for clip, *codes in zip(clips, *found.values(), strict=True):
        assert codes[0].shape[1] == -(-len(clip) // 1920)
        assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_threads_are_given_back_when_a_piece_fails():
    def fail(item):
        assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
        raise ValueError(f"item {item}")

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match="item 0"):
            map_in_threads(fail, range(4))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_packs_hold_every_clip_once_and_are_alike(num_threads):
    lengths = [90, 10, 60, 250, 30, 30, 20, 40, 70, 100, 5]
    packs = balanced_packs(lengths, 250, num_threads)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert len(packs) >= min(num_threads, len(lengths)) and all(packs)
    frames = [sum(lengths[index] for index in pack) for pack in packs]
    assert max(frames) <= max(250, min(frames) + max(lengths))
    assert balanced_packs([7], 250, num_threads) == [[0]]


def test_batches_hold_like_lengths_within_the_cap():
    lengths = [10, 700, 30, 740, 5, 900]
    batches = batches_by_length(lengths)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    assert all(len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= 750 for batch in batches)
    assert all(2 * min(lengths[i] for i in batch) > max(lengths[i] for i in batch) for batch in batches)
    assert batches_by_length([9, 7, 8]) == [[0, 2, 1]]


def test_streamed_decode_equals_transformers_decode(codec):
    """To float32 rounding: the same sums in another order. Measured 1.3e-5 on samples that reach 17."""
    codes = codec.encode(clips())[3]
    assert codes.shape[1] > 2 * SLIDING_WINDOW
    expected = codec.model.decode(codes[None]).audio_values[0, 0]
    torch.testing.assert_close(codec.decode(codes), expected, atol=1e-4, rtol=0)


def test_any_chunking_of_pushes_gives_the_same_samples(codec):
    codes = codec.encode(clips())[0]
    stream = codec.stream()
    parts = [stream.push(codes[:, start:stop]) for start, stop in ((0, 3), (3, 4), (4, 16))]
    assert [part.shape[0] for part in parts] == [3 * 1920, 1920, 12 * 1920]
    assert torch.equal(torch.cat([*parts, stream.finish()]), codec.decode(codes))
    with pytest.raises(ValueError, match="finished"):
        stream.push(codes)


def test_fewer_codebooks_are_the_first_ones(codec):
    few = MimiCodec(codec.model, num_codebooks=3)
    assert torch.equal(few.encode(clips())[0], codec.encode(clips())[0][:3])
    assert few.decode(few.encode(clips())[2]).shape == (3 * 1920,)
    assert few.digest != codec.digest
    with pytest.raises(ValueError, match="1 to 8 codebooks"):
        MimiCodec(codec.model, num_codebooks=9)


def test_no_frame_is_all_zero():
    model = tiny_mimi()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer[0] = 0.0
            buffer[1:] += 100.0  # whatever comes in, entry 0 is the closest
    codec = MimiCodec(model)
    table = codec._quantizers()[-1].codebook.embed
    nearest = 1 + int((table[1:] - table[0]).norm(dim=1).argmin())
    codes = codec.encode(clips())[0]
    assert (codes[:-1] == 0).all()
    assert (codes[-1] == nearest).all()


def test_bad_input_is_refused_with_what_was_expected(codec):
    with pytest.raises(ValueError, match=r"expected float32 \[S\]"):
        codec.encode([torch.zeros(2, 100)])
    with pytest.raises(ValueError, match=r"expected \[\d, F\]"):
        codec.stream().push(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        codec.encode([torch.tensor([0.0, float("nan")])])
    with pytest.raises(ValueError, match=r"expected \[8, F\]"):
        codec.decode(torch.zeros(9, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 0 to 63"):
        codec.decode(torch.full((8, 2), 64))


def test_a_model_of_another_frame_rate_is_refused():
    with pytest.raises(ValueError, match="12.5 frames/s"):
        MimiCodec(MimiConfig(hidden_size=32, num_filters=4, upsample_groups=32, num_hidden_layers=1, upsampling_ratios=[8, 6, 5, 2]))


def test_saved_codec_gives_the_same_codes_and_samples(codec, tmp_path):
    codec.save(tmp_path)
    again = codec_from_folder(tmp_path)
    codes = codec.encode(clips())[0]
    assert again.digest == codec.digest
    assert torch.equal(again.encode(clips())[0], codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


def test_folder_of_transformers_weights_is_loaded_and_saved_by_name(codec, tmp_path):
    codec.model.save_pretrained(tmp_path / "mimi")
    loaded = load_codec("mimi", tmp_path / "mimi", num_codebooks=8)
    assert loaded.digest == codec.digest
    loaded.save(tmp_path / "codec")
    assert not (tmp_path / "codec" / "codec.safetensors").exists()
    assert codec_from_folder(tmp_path / "codec").digest == codec.digest


def test_other_weights_than_the_saved_ones_are_refused(codec, tmp_path):
    codec.save(tmp_path)
    description = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps({**description, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="not the weights the codes were made with"):
        codec_from_folder(tmp_path)


def test_missing_weights_are_named_with_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="hf download nobody/nothing config.json model.safetensors"):
        load_codec("mimi", "nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json and model\.safetensors"):
        load_codec("mimi", tmp_path / "empty")
