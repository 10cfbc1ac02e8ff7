"""The offline codec: framing, exact phases, streaming, loudness, and what lies on disk."""

from __future__ import annotations

import json
import math

import pytest
import torch

from csm.codec import SpectralCodec, codec_from_folder, load_codec, mel
from csm.codec.residual_kmeans import fit_codebooks, quantise


def buzz(duration_s: float, seed: int, level: float = 0.2) -> torch.Tensor:
    """Speech-like: harmonics of a gliding pitch under a moving formant, syllables, a little noise. [S] float32."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(4, generator=generator).tolist()
    time = torch.arange(round(duration_s * 24_000)) / 24_000
    pitch_hz = 90 + 120 * draw[0] + 20 * torch.sin(2 * math.pi * (0.5 + draw[1]) * time)
    phase = 2 * math.pi * torch.cumsum(pitch_hz / 24_000, 0)
    formant_hz = 900 + 500 * torch.sin(2 * math.pi * (1 + draw[2]) * time)
    sound = sum(torch.cos(k * phase) * torch.exp(-(((k * pitch_hz - formant_hz) / 700) ** 2)) for k in range(1, 25))
    syllables = (0.5 - 0.5 * torch.cos(2 * math.pi * (2 + 2 * draw[3]) * time)).square()
    return level * (0.3 * sound * syllables + 0.01 * torch.randn(time.shape[0], generator=generator))


@pytest.fixture(scope="module")
def training_clips() -> list[torch.Tensor]:
    return [buzz(1.5, seed) for seed in range(24)]


@pytest.fixture(scope="module")
def codec(training_clips) -> SpectralCodec:
    return SpectralCodec.fit(training_clips, num_codebooks=4, codebook_size=32)


def test_codes_cover_the_clip_and_keep_zero_free(codec):
    codes = codec.encode([buzz(1.0, 90), buzz(0.08, 91), torch.zeros(1), torch.zeros(1921)])
    assert [tuple(c.shape) for c in codes] == [(4, 13), (4, 1), (4, 1), (4, 2)]
    assert codec.vocab_size == 33
    assert all(int(c.min()) >= 1 and int(c.max()) <= 32 and c.dtype == torch.int64 for c in codes)


def test_batched_codes_equal_single_codes(codec):
    clips = [buzz(0.3 + 0.37 * i, 50 + i) for i in range(6)]
    for clip, codes in zip(clips, codec.encode(clips), strict=True):
        assert torch.equal(codec.encode([clip])[0], codes)


@pytest.mark.parametrize("num_samples", [1_681, 1_920, 3_000, 9_600, 9_601, 11_300, 24_123])
def test_codes_at_a_phase_equal_codes_of_the_cut_clip(codec, num_samples):
    clip = buzz(2.0, 7)[:num_samples]
    for phase, codes in enumerate(codec.encode_phases([clip], 8)[0]):
        assert torch.equal(codes, codec.encode([clip[240 * phase :]])[0]), f"phase {phase}"


def test_phases_of_a_clip_too_short_for_them_are_refused(codec):
    assert len(codec.encode_phases([torch.zeros(241)], 2)[0]) == 2
    with pytest.raises(ValueError, match="use fewer"):
        codec.encode_phases([torch.zeros(240)], 2)


def test_a_frame_depends_only_on_its_neighbourhood(codec):
    clip = buzz(2.0, 3)
    changed = clip.clone()
    changed[10 * 1920 + mel.MARGIN_SAMPLES :] = 0.0
    assert torch.equal(codec.encode([changed])[0][:, :10], codec.encode([clip])[0][:, :10])


@pytest.mark.parametrize("chunks", [(1,) * 13, (13,), (2, 5, 1, 5)])
def test_any_chunking_of_pushes_gives_the_same_samples(codec, chunks):
    codes = codec.encode([buzz(1.0, 60)])[0]
    stream = codec.stream()
    parts = [stream.push(part) for part in codes.split(list(chunks), dim=1)]
    parts.append(stream.finish())
    joined = torch.cat(parts)
    assert joined.shape == (13 * 1920,)
    assert torch.equal(joined, codec.decode(codes))


def test_sound_comes_from_the_second_frame_on(codec):
    codes = codec.encode([buzz(1.0, 60)])[0]
    stream = codec.stream()
    assert [stream.push(codes[:, i : i + 1]).shape[0] for i in range(4)] == [0, 1528, 1920, 1920]
    assert stream.finish().shape[0] == 2312
    with pytest.raises(ValueError, match="finished"):
        stream.finish()


def test_no_frames_decode_to_no_samples(codec):
    assert codec.decode(torch.zeros(4, 0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("level", [0.05, 0.4])
def test_round_trip_keeps_spectrum_and_loudness(training_clips, level):
    scaled = [clip * (level / 0.2) for clip in training_clips]
    codec = SpectralCodec.fit(scaled, num_codebooks=8, codebook_size=64)
    clip = scaled[0]
    heard = codec.decode(codec.encode([clip])[0])[: clip.shape[0]]
    assert abs(10 * math.log10(float(heard.square().mean() / clip.square().mean()))) < 1.0  # dB
    before, after = (mel.log_mels([mel.hop_windows(x)]) for x in (clip, heard))
    assert float((before - after).clamp(-3, 3).square().mean().sqrt()) < 0.5  # nats


def test_all_zero_frames_are_silence(codec):
    silence = codec.decode(torch.zeros(4, 6, dtype=torch.int64))
    assert float(silence.abs().max()) < 1e-2


def test_the_same_clips_and_seed_give_the_same_codec(codec, training_clips):
    again = SpectralCodec.fit(training_clips, num_codebooks=4, codebook_size=32)
    other = SpectralCodec.fit(training_clips, num_codebooks=4, codebook_size=32, seed=1)
    assert again.digest == codec.digest != other.digest
    codes = codec.encode(training_clips[:1])[0]
    assert torch.equal(again.decode(codes), codec.decode(codes))


def test_later_codebooks_reduce_the_error():
    rows = torch.randn(2_000, 16, generator=torch.Generator().manual_seed(0))
    codebooks = fit_codebooks(rows, 4, 32, seed=0)
    errors = []
    for num_codebooks in range(1, 5):
        codes = quantise(rows, codebooks[:num_codebooks])
        rebuilt = sum(codebooks[k][codes[:, k]] for k in range(num_codebooks))
        errors.append(float((rows - rebuilt).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.6 * errors[0]


def test_a_corpus_smaller_than_the_codebooks_still_fits():
    codec = SpectralCodec.fit([buzz(0.5, 1)], num_codebooks=2, codebook_size=16)
    assert codec.decode(codec.encode([buzz(0.5, 1)])[0]).shape == (7 * 1920,)


def test_saved_codec_is_the_same_codec(codec, tmp_path):
    codec.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec.json", "codec.safetensors"]
    again = codec_from_folder(tmp_path)
    codes = codec.encode([buzz(0.5, 5)])[0]
    assert again.index_entry() == codec.index_entry()
    assert torch.equal(again.encode([buzz(0.5, 5)])[0], codes)
    assert torch.equal(again.decode(codes), codec.decode(codes))


def test_fewer_codebooks_are_the_first_ones(codec, tmp_path):
    codec.save(tmp_path)
    few = load_codec("spectral", tmp_path, num_codebooks=2)
    assert torch.equal(few.encode([buzz(0.5, 5)])[0], codec.encode([buzz(0.5, 5)])[0][:2])
    assert few.digest != codec.digest
    with pytest.raises(ValueError, match="1 to 4"):
        load_codec("spectral", tmp_path, num_codebooks=5)


def test_a_folder_that_does_not_hold_together_is_refused(codec, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no codec\.json"):
        codec_from_folder(tmp_path)
    codec.save(tmp_path)
    description = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps({**description, "digest": "0" * 64}))
    with pytest.raises(ValueError, match="not the weights the codes were made with"):
        codec_from_folder(tmp_path)
    (tmp_path / "codec.json").write_text(json.dumps({**description, "name": "opus"}))
    with pytest.raises(ValueError, match="expected spectral or mimi"):
        codec_from_folder(tmp_path)
    codec.save(tmp_path)
    weights = (tmp_path / "codec.safetensors").read_bytes()
    (tmp_path / "codec.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        codec_from_folder(tmp_path)


def test_bad_input_is_refused_with_what_was_expected(codec):
    with pytest.raises(ValueError, match=r"expected float32 \[S\]"):
        codec.encode([torch.zeros(1, 100)])
    with pytest.raises(ValueError, match=r"expected \[\d, F\]"):
        codec.stream().push(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        codec.encode([torch.tensor([0.0, float("inf")])])
    with pytest.raises(ValueError, match=r"expected \[4, F\]"):
        codec.decode(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 0 to 32"):
        codec.decode(torch.full((4, 2), 33))
    with pytest.raises(ValueError, match="at least one clip"):
        SpectralCodec.fit([])
    with pytest.raises(ValueError, match="expected spectral or mimi"):
        load_codec("opus")
    with pytest.raises(ValueError, match=r"codec\.source"):
        load_codec("spectral")
