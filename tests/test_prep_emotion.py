"""Labels of turns by a transformers audio classifier: random weights, the real classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch

from csm.codec import SpectralCodec
from csm.config import CodecConfig, EncodeConfig, PrepConfig
from csm.data.shards import iter_samples
from csm.listening.emotion import EmotionClassifier
from data_prep.turns import prepare_turns

LABELS = {0: "calm", 1: "glad", 2: "cross"}


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8, 8), conv_kernel=(10, 8),
        conv_stride=(5, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        classifier_proj_size=8, num_labels=3, id2label=LABELS, label2id={label: index for index, label in LABELS.items()},
    )  # fmt: skip
    model = Wav2Vec2ForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight *= 1_000  # random layers make all sounds alike
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tmp_path: Path, small_codec: SpectralCodec) -> Callable[..., PrepConfig]:
    """Two turns in each of four recordings, one of them labelled by its manifest."""
    (tmp_path / "in").mkdir()
    small_codec.save(tmp_path / "codec")
    with (tmp_path / "in/manifest.jsonl").open("w") as lines:
        for index in range(4):
            tones = np.sin(np.cumsum(np.repeat([0.02, 0.2], 24_000)) * (1 + index)) * 0.1
            soundfile.write(tmp_path / f"in/{index}.wav", tones, 24_000)
            turns = [dict(speaker=0, text="a", start_s=0.0, end_s=0.9), dict(speaker=1, text="b", start_s=1.0, end_s=1.9)]
            if index == 0:
                turns[1]["emotion"] = {"label": "told", "probability": 1.0}
            lines.write(json.dumps({"audio": f"{index}.wav", "turns": turns}) + "\n")

    def make(emotion: str | None, **more: object) -> PrepConfig:
        codec = CodecConfig("spectral", str(tmp_path / "codec"), small_codec.num_codebooks)
        encode = EncodeConfig(emotion=emotion, keep_audio=True)
        return PrepConfig(
            name="turns",
            input=str(tmp_path / "in"),
            output=str(tmp_path / "out"),
            num_workers=1,
            val_share=0.0,
            codec=codec,
            encode=encode,
            **more,
        )  # type: ignore[arg-type]

    return make


def emotions(output: Path) -> dict[str, list[dict | None]]:
    found = {}
    for sample in iter_samples(output / "train"):
        found[sample.meta["source"]] = [turn["emotion"] for turn in sample.meta["turns"]]
    return found


def test_every_turn_gets_the_classifiers_label(classifier: Path, settings: Callable[..., PrepConfig], tmp_path: Path) -> None:
    from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

    assert prepare_turns(settings(str(classifier))) == 0
    found = emotions(tmp_path / "out")
    assert found["0.wav"][1] == {"label": "told", "probability": 1.0}
    labels = [entry for entries in found.values() for entry in entries]
    assert len(labels) == 8 and len({entry["probability"] for entry in labels}) > 4  # of the turn's own sound
    model, extractor = AutoModelForAudioClassification.from_pretrained(classifier), AutoFeatureExtractor.from_pretrained(classifier)
    audio = np.random.default_rng(7).standard_normal(24_000).astype(np.float32)
    features = extractor(soxr.resample(audio, 24_000, 16_000), sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**features).logits[0].softmax(dim=0)
    label, probability = EmotionClassifier(str(classifier)).classify(audio)
    assert label == LABELS[int(expected.argmax())] and abs(probability - float(expected.max())) < 1e-3


def test_no_classifier_no_label_and_another_one_labels_again(classifier: Path, settings: Callable[..., PrepConfig], tmp_path: Path) -> None:
    assert prepare_turns(settings(None)) == 0
    assert emotions(tmp_path / "out")["1.wav"] == [None, None]
    with pytest.raises(ValueError, match="emotion=None, this asks for"):
        prepare_turns(settings(str(classifier), stages=["encode"]))
    assert prepare_turns(settings(str(classifier))) == 0
    assert emotions(tmp_path / "out")["1.wav"][0]["label"] in LABELS.values()


def test_a_model_that_is_not_there_is_told_with_the_way_to_it(
    settings: Callable[..., PrepConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"emotion=some/classifier: .* HF_HUB_OFFLINE is set; .*hf download some/classifier"):
        prepare_turns(settings("some/classifier"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no config.json there"):
        prepare_turns(settings(str(tmp_path / "empty")))
