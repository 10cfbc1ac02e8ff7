"""Adapters kept beside one model: each speaks as a model with it alone, brings its own words, and leaves the base as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csm import CSM
from csm.cli import commands
from csm.config import AdapterConfig
from csm.generation.audio_files import read_provenance
from csm.generation.generator import Generator
from csm.model.adapter_files import save_adapter
from csm.model.lora import adapted_maps, attach_adapter, merge_adapter
from csm.model.pretrained import load_model
from csm.text import WordTokenizer
from tests.conftest import tiny_config


@pytest.fixture
def write_adapter(speaking_checkpoint: Path, tmp_path: Path) -> Callable[..., tuple[Path, CSM]]:
    """`write_adapter("anna", seed=1)`: an adapter's folder, and the base with it merged."""

    def write(name: str, *, seed: int, kind: str = "lora", tokenizer: WordTokenizer | None = None) -> tuple[Path, CSM]:
        model = load_model(speaking_checkpoint)
        also = [] if tokenizer is None else ["text_embeddings"]
        config = AdapterConfig(kind=kind, rank=2, also_train=also)
        attach_adapter(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for adapted in adapted_maps(model).values():
            adapted.adapters["default"].b.data = torch.randn(adapted.adapters["default"].b.shape, generator=generator) * 0.2
        if tokenizer is not None:
            model.text_embeddings.weight.data[-tokenizer.vocab_size :] += 0.3
        save_adapter(model, tmp_path / name, config)
        if tokenizer is not None:
            tokenizer.save(tmp_path / name)
        merge_adapter(model)
        return tmp_path / name, model

    return write


def codes(generator: Generator, speaker: int = 0) -> torch.Tensor:
    return generator.generate_codes("one two", speaker, max_duration_s=0.8, seed=4)


@pytest.mark.parametrize("compile", [False, True])
def test_switched_adapters_speak_as_models_of_their_own(
    speaking_checkpoint: Path, small_codec, word_tokenizer, write_adapter: Callable, compile: bool
) -> None:
    generator = Generator.from_pretrained(speaking_checkpoint, watermark="off", compile=compile)
    base = codes(generator)
    expected = {}
    for seed, (name, kind) in enumerate((("anna", "lora"), ("ben", "dora"))):
        folder, model = write_adapter(name, seed=seed, kind=kind)
        generator.add_adapter(name, folder)
        assert torch.equal(codes(generator), base), "one that is kept is not yet one that speaks"
        expected[name] = codes(Generator(model, small_codec, word_tokenizer, None, compile=compile))
    for name in ("anna", "ben", "anna"):
        generator.set_adapter(name)
        assert torch.equal(codes(generator), expected[name]) and not torch.equal(expected[name], base)
    generator.set_adapter(None)
    assert torch.equal(codes(generator), base)


def test_an_adapter_brings_the_speaker_it_was_taught(speaking_checkpoint: Path, word_tokenizer, write_adapter: Callable) -> None:
    generator = Generator.from_pretrained(speaking_checkpoint, watermark="off")
    folder, _ = write_adapter("anna", seed=1, tokenizer=word_tokenizer.with_added(["[4]"]))
    generator.add_adapter("anna", folder)
    with pytest.raises(ValueError, match="speakers 0-3"):
        codes(generator, speaker=4)
    generator.set_adapter("anna")
    assert codes(generator, speaker=4).shape[0]


def test_a_session_stays_with_its_adapter(speaking_checkpoint: Path, write_adapter: Callable) -> None:
    generator = Generator.from_pretrained(speaking_checkpoint, watermark="off")
    generator.add_adapter("anna", write_adapter("anna", seed=1)[0])
    session = generator.session()
    generator.set_adapter("anna")
    with pytest.raises(ValueError, match="the session began with adapter None, the generator has 'anna'"):
        session.say("one", max_duration_s=0.4)
    assert generator.session().say("one", max_duration_s=0.4, seed=1).numel()


def test_what_is_no_adapter_of_the_model_is_refused_and_the_model_stays(
    speaking_checkpoint: Path, write_adapter: Callable, tmp_path: Path
) -> None:
    generator = Generator.from_pretrained(speaking_checkpoint, watermark="off")
    before = codes(generator)
    generator.add_adapter("anna", write_adapter("anna", seed=1)[0])
    with pytest.raises(ValueError, match="there is one of that name"):
        generator.add_adapter("anna", tmp_path / "anna")
    with pytest.raises(ValueError, match=r"'ben': not one of those added \('anna'\)"):
        generator.set_adapter("ben")
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        generator.add_adapter("ben", speaking_checkpoint)
    wider = replace(tiny_config(), backbone=replace(tiny_config().backbone, ffn_width=64))
    other = CSM(wider, seed=0)
    config = AdapterConfig(kind="lora", rank=2)
    attach_adapter(other, config)
    save_adapter(other, tmp_path / "other", config)
    with pytest.raises(ValueError, match="of another model"):
        generator.add_adapter("other", tmp_path / "other")
    assert torch.equal(codes(generator), before)


def test_csm_generate_takes_adapters_and_lines_name_them(
    speaking_checkpoint: Path, write_adapter: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = [f"--adapter={name}={write_adapter(name, seed=seed)[0]}" for seed, name in enumerate(("anna", "ben"))]
    lines = [{"text": "one", "seed": 3, "out": f"{name}.wav", "adapter": name} for name in ("anna", "ben", None)]
    lines.append({"text": "one", "seed": 3, "out": "first.wav"})
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    start = ["generate", f"--checkpoint={speaking_checkpoint}", "--max-duration=0.8", "--threads=1"]
    assert commands.main([*start, *given, f"--batch={tmp_path / 'lines.jsonl'}", f"--out-dir={tmp_path / 'said'}"]) == 0
    said = {path.stem: path.read_bytes() for path in (tmp_path / "said").iterdir()}
    noted = {path.stem: read_provenance(path).get("adapter") for path in (tmp_path / "said").iterdir()}
    assert noted == {"anna": "anna", "ben": "ben", "None": None, "first": "anna"}
    assert said["anna"] == said["first"] and len(set(said.values())) == 3
    capsys.readouterr()
    assert commands.main([*start, "--adapter=anna", "--text=one", f"--out={tmp_path / 'a.wav'}"]) == 2
    assert "expected NAME=DIR" in capsys.readouterr().err
