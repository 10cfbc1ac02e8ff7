"""Style tags: from a manifest or shards into the text, some left out, and what they say is learnt."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.cli.finetune import finetune
from csm.config import AdapterConfig, DataConfig, FinetuneConfig, OptimConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.data.shards import Sample, iter_samples
from csm.data.styles import style_tag
from csm.evaluation.likelihood import score_samples
from csm.generation.generator import Generator
from csm.model.pretrained import load_model, resolve_checkpoint
from csm.text import tokenizer_from_folder
from data_prep.manifest import ManifestTurn
from tests.conftest import tiny_config
from tests.test_prep_manifest import found_in, manifest, wav

HAPPY, SAD = {"style": "Very happy"}, {"emotion": {"label": "sad", "probability": 0.8}}


@pytest.fixture
def texts_of(write_conversations: Callable[..., Path], word_tokenizer, tmp_path: Path) -> Callable[..., list[str]]:
    """`texts_of(dropout)`: what training rows say of 200 turns, a happy, a sad, and one of no style in turn."""
    folder = tmp_path / "data"
    for split in ("train", "validation"):
        write_conversations(folder / split, [[(1, "one", 4, HAPPY), (2, "two", 4, SAD), (0, "three", 4, {"emotion": None})]] * 200)
    tokenizer = word_tokenizer.with_added(["(very-happy)", "(sad)"])

    def texts(**changes: object) -> list[str]:
        data = DataConfig(kind="shards", path=str(folder), seq_len=64, rows_per_batch=1, **changes)  # type: ignore[arg-type]
        module = CSMDataModule(data, tiny_config(), tokenizer)
        found: list[str] = []
        for batch in module.train_dataloader():
            ids = batch.tokens[..., -1][batch.mask[..., -1]].tolist()
            ends = [i for i, token in enumerate(ids) if token == tokenizer.eos_id]
            found += [tokenizer.decode(ids[start + 1 : end]) for start, end in zip([-1, *ends], ends, strict=False)]
        return found

    return texts


def test_texts_have_their_tags_and_some_go_without(texts_of: Callable[..., list[str]]) -> None:
    assert set(texts_of()) == {"[1]one", "[2]two", "[0]three"}, "off unless asked for"
    assert set(texts_of(tag_styles=True, tag_dropout=0.0)) == {"[1](very-happy) one", "[2](sad) two", "[0]three"}
    texts = texts_of(tag_styles=True, tag_dropout=0.25)
    assert set(texts) == {"[1](very-happy) one", "[1]one", "[2](sad) two", "[2]two", "[0]three"}
    without = sum(text in ("[1]one", "[2]two") for text in texts) / sum("three" not in text for text in texts)
    assert without == pytest.approx(0.25, abs=0.08)
    assert texts == texts_of(tag_styles=True, tag_dropout=0.25), "which ones is the same in every run"


def test_manifests_name_styles_and_emotions(tmp_path: Path) -> None:
    wav(tmp_path / "a.wav", duration_s=1.0)
    turns = [
        {"text": "one", "start_s": 0, "end_s": 0.4, "style": "very happy"},
        {"text": "two", "start_s": 0.5, "end_s": 1, "emotion": "sad"},
    ]
    manifest(tmp_path, {"audio": "a.wav", "turns": turns})
    (recording,), failures = found_in(tmp_path)
    assert not failures
    assert recording.turns[0] == ManifestTurn("one", start_s=0, end_s=0.4, style="very happy")
    assert recording.turns[1].emotion == {"label": "sad", "probability": 1.0}
    for label in ("hap)py", "", "[1]", 3):
        manifest(tmp_path, {"audio": "a.wav", "text": "one", "style": label})
        recordings, failures = found_in(tmp_path)
        assert not recordings and "style" in failures[0].detail


def test_a_style_goes_before_an_emotion() -> None:
    assert style_tag({**HAPPY, **SAD}) == "(very-happy)" and style_tag(SAD) == "(sad)"
    assert style_tag({"emotion": None}) is None and style_tag({}) is None


@pytest.mark.slow
def test_a_style_is_learnt_as_a_tag_one_can_speak_with(speaking_checkpoint: Path, tmp_path: Path) -> None:
    """Equal words, a hum in one style and a hiss in the other: with the wrong tag the recordings are less likely."""
    rows: list[dict[str, str]] = []
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for index in range(40):
        style = ("low", "high")[index % 2]
        noise = np.random.default_rng(index).standard_normal(8_000)
        sound = {"low": np.sin(np.arange(8_000) * (0.03 + 0.0005 * index)), "high": np.diff(noise, append=0.0)}[style]
        soundfile.write(recordings / f"{index:02d}.wav", sound.astype(np.float32) * 0.2, 24_000)
        rows.append({"audio": f"{index:02d}.wav", "text": "one two", "style": style})
    manifest(recordings, *rows)
    config = FinetuneConfig(
        run_dir=str(tmp_path / "run"),
        base=str(speaking_checkpoint),
        adapter=AdapterConfig(kind="lora", rank=4, alpha=8.0),
        data=DataConfig(kind="shards", path=str(recordings), seq_len=64, rows_per_batch=4, max_val_batches=0, tag_styles=True),
        optim=OptimConfig(lr=2e-2, warmup_steps=0, schedule="constant", weight_decay=0.0),
        trainer=TrainerConfig(max_steps=60, validate_every=20, checkpoint_every=20),
        val_share=0.3,
        speaker=1,
    )
    best = resolve_checkpoint(finetune(config))
    tokenizer, model = tokenizer_from_folder(best), load_model(best)
    samples = list(iter_samples(tmp_path / "run" / "data" / "validation"))

    def nats(tag_of: Callable[[str], str]) -> float:
        said = [tagged(sample, tag_of(sample.meta["turns"][0]["style"])) for sample in samples]
        return score_samples(model, tokenizer, said, seed=0, name="said").c0.value

    right, wrong = nats(lambda style: style), nats({"low": "high", "high": "low"}.__getitem__)
    assert right < wrong - 0.2, f"{right:.3f} nats with the right tags, {wrong:.3f} with the wrong ones"
    summary = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert summary["nats"]["new"]["result"]["c0"] == pytest.approx(right, abs=0.02), "the result is scored with its tags"
    generator = Generator.from_pretrained(best, watermark="off")
    assert generator.generate_codes("(high) one two", speaker=1, max_duration_s=0.4, seed=0).shape[0]
    with pytest.raises(ValueError, match=r"\(angry\)"):
        generator.generate_codes("(angry) one two", speaker=1)


def tagged(sample: Sample, style: str) -> Sample:
    return replace(sample, turns=[replace(turn, text=f"({style}) {turn.text}") for turn in sample.turns])
