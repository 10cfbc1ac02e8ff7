"""Phonemes and naturalness: the decisions on known input, the loading on random weights of the real layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from csm.listening.acoustics import pauses_s
from csm.listening.naturalness import load_mos_models
from csm.listening.phonemes import PhonemeRecogniser, nearest_pronunciation
from csm.reachable import can_reach

SYMBOLS = ["<pad>", "<s>", "</s>", "<unk>", "l", "iː", "ɛ", "d", "b", "æ"]


def tiny_wav2vec2(**settings) -> Wav2Vec2Config:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (20, 16), "num_conv_pos_embeddings": 16,
                    "num_conv_pos_embedding_groups": 2}  # fmt: skip
    return Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **convolutions, **settings)


@pytest.fixture
def phoneme_network(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Wav2Vec2ForCTC(tiny_wav2vec2(vocab_size=len(SYMBOLS), pad_token_id=0)).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({symbol: index for index, symbol in enumerate(SYMBOLS)}), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ("p l iː z l iː d ð ə w eɪ", 0),
        ("p aɪ p s w ɜː m eɪ d ə v l ɛ d", 1),
        ("m eɪ d ə v l ɛ t", 1),  # a last sound misheard: still nearer
        ("t uː", None),  # nothing of either
        ("l iː d ɔːɹ l ɛ d", None),  # both
        ("", None),
    ],
)
def test_the_pronunciation_that_lies_in_what_was_heard(heard: str, expected: int | None) -> None:
    assert nearest_pronunciation(heard.split(), ["l iː d".split(), "l ɛ d".split()]) == expected


@pytest.mark.slow
def test_phonemes_are_the_network_s_own_greedy_path(phoneme_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recogniser = PhonemeRecogniser(str(phoneme_network))
    audio = (0.1 * np.random.default_rng(0).standard_normal(24_000)).astype(np.float32)
    phonemes = recogniser.transcribe(audio)
    assert set(phonemes) <= set(SYMBOLS[4:])
    assert recogniser.transcribe(audio) == phonemes and recogniser.transcribe(0.25 * audio) == phonemes, "loudness plays no part"
    assert recogniser.transcribe(np.zeros(24_000, np.float32)) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    can_reach.cache_clear()
    with pytest.raises(ValueError, match=r"phonemes: .* cannot be had here .*hf download nowhere/at-all"):
        PhonemeRecogniser("nowhere/at-all")


def test_who_cannot_be_had_is_named_with_the_way_to_get_it() -> None:
    models, missing = load_mos_models(["dnsmos", "utmos"])
    assert [model.name for model in models] == ["dnsmos"] and "pickle" in missing["utmos"]
    assert len(models[0].describe()["sha256"]) == 64
    with pytest.raises(ValueError, match=r"naturalness=\['mos'\]: expected some of dnsmos, distillmos, utmos"):
        load_mos_models(["mos"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dnsmos", "distillmos"])
def test_noise_costs_naturalness_and_loudness_does_not(name: str, demo_corpus_small: Path) -> None:
    from csm.evaluation.suites import read_suites

    clip = read_suites(demo_corpus_small / "heldout", context=False)["single"][0].audio
    (model,), missing = load_mos_models([name])
    assert missing == {} and len(model.describe()["sha256"]) == 64
    noise = 0.03 * np.random.default_rng(0).standard_normal(len(clip)).astype(np.float32)
    assert model.score(clip) > model.score(clip + noise) + 0.3
    assert model.score(clip) == pytest.approx(model.score(0.1 * clip), abs=0.05)
    assert model.score(np.zeros(24_000, np.float32)) is None


def test_pauses_are_silences_between_sounds() -> None:
    sound, silence = 0.1 * np.sin(np.arange(12_000) / 5).astype(np.float32), np.zeros(6_000, np.float32)
    assert pauses_s(np.concatenate([silence, sound, silence, sound, silence])) == [pytest.approx(0.25, abs=0.03)]
    assert pauses_s(np.concatenate([sound, silence[:1_200], sound])) == [], "50 ms is a stop, not a pause"
    assert pauses_s(silence) == [] and pauses_s(silence[:0]) == []
