"""Starting from a checkpoint: its weights, shapes, tokenizer and codec; with an adapter beside frozen weights."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from csm import CSM
from csm.cli.train import train
from csm.config import AdapterConfig, DataConfig, EmaConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from csm.model.adapter_files import load_adapter
from csm.model.lora import base_state_dict, merge_adapter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable[..., Path], small_codec) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    words = ("one two", "three", "four five six", "seven")
    for split, count in (("train", 24), ("validation", 4)):
        talk = [[(0, words[i % 4], 8 + i % 5), (1, words[(i + 1) % 4], 6)] for i in range(count)]
        write_conversations(folder / split, talk, digest=small_codec.digest)
    return folder


@pytest.fixture
def config(corpus: Path, speaking_checkpoint: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        base=str(speaking_checkpoint),
        model=ModelConfig(num_codebooks=8),  # not the base's: it brings its own
        data=DataConfig(kind="shards", path=str(corpus), seq_len=64, rows_per_batch=2, max_val_batches=2),
        optim=OptimConfig(lr=5e-3, warmup_steps=0, schedule="constant"),
        trainer=TrainerConfig(max_steps=4, log_every=1, validate_every=4, checkpoint_every=2, deterministic=True),
    )


def checkpoint(run_dir: Path, name: str = "last") -> Path:
    return run_dir / "checkpoints" / (run_dir / "checkpoints" / f"{name}.txt").read_text().strip()


def rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def with_adapter(config: TrainConfig, **adapter: object) -> TrainConfig:
    return replace(config, adapter=AdapterConfig(kind=str(adapter.pop("kind", "lora")), rank=2, alpha=4.0, **adapter))  # type: ignore[arg-type]


def test_a_run_begins_as_its_base_and_speaks_like_it(config: TrainConfig, speaking_checkpoint: Path) -> None:
    frozen = replace(config, optim=replace(config.optim, lr=1e-12, weight_decay=0.0))
    last = checkpoint(train(frozen))
    base, now = load_file(speaking_checkpoint / "model.safetensors"), load_file(last / "model.safetensors")
    assert set(base) == set(now) and all(torch.allclose(base[name], now[name], atol=1e-9) for name in base)
    for name in ("tokenizer.json", "codec/codec.json", "codec/codec.safetensors"):
        assert (last / name).read_bytes() == (speaking_checkpoint / name).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_run_leaves_a_model_to_use_and_an_adapter_apart(config: TrainConfig, speaking_checkpoint: Path, kind: str) -> None:
    last = checkpoint(train(with_adapter(config, kind=kind, also_train=["codebook0_head"])))
    base = CSM.from_pretrained(speaking_checkpoint)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    load_adapter(base, last / "adapter")
    merge_adapter(base)
    merged, saved = base_state_dict(base), load_file(last / "model.safetensors")
    assert all(torch.equal(merged[name], saved[name]) for name in saved), "model.safetensors is base and adapter, merged"
    changed = {name for name in saved if not torch.equal(saved[name], before[name])}
    assert "codebook0_head.weight" in changed and "backbone.layers.0.attn.q_proj.weight" in changed
    assert "text_embeddings.weight" not in changed and not any("norm" in name for name in changed)
    assert json.loads((last / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(speaking_checkpoint)
    moments = load_file(last / "optimizer.safetensors")
    assert sum(tensor.numel() for tensor in moments.values()) < sum(tensor.numel() for tensor in saved.values()), (
        "moments of the adapter only"
    )


@pytest.mark.parametrize("with_average", [False, True])
def test_an_adapter_run_that_stopped_ends_with_the_same_bytes(config: TrainConfig, tmp_path: Path, with_average: bool) -> None:
    config = with_adapter(config, also_train=["text_embeddings"], dropout=0.0)
    if with_average:
        config = replace(config, ema=EmaConfig(decay=0.9))
    whole = train(replace(config, run_dir=str(tmp_path / "whole")))
    parts = replace(config, run_dir=str(tmp_path / "parts"))
    train(replace(parts, trainer=replace(parts.trainer, max_steps=2, validate_every=0)))
    train(replace(parts, resume="auto"))
    assert rows(tmp_path / "parts") == rows(whole)
    for name in ("model.safetensors", "adapter/adapter_model.safetensors", "optimizer.safetensors"):
        assert (checkpoint(tmp_path / "parts") / name).read_bytes() == (checkpoint(whole) / name).read_bytes(), name


def test_an_adapter_does_not_go_on_beside_other_weights(config: TrainConfig, speaking_checkpoint: Path, tmp_path: Path) -> None:
    config = with_adapter(config)
    train(replace(config, trainer=replace(config.trainer, max_steps=2, validate_every=0)))
    other = tmp_path / "other"
    shutil.copytree(speaking_checkpoint, other)
    CSM(CSM.from_pretrained(other).config, seed=99).save_pretrained(other)
    with pytest.raises(ValueError, match="other weights"):
        train(replace(config, base=str(other), resume="auto"))


def test_a_checkpoint_with_an_adapter_and_a_run_without_one_are_told_apart(config: TrainConfig) -> None:
    short = replace(config, trainer=replace(config.trainer, max_steps=2, validate_every=0))
    train(with_adapter(short))
    with pytest.raises(ValueError, match="adapter"):
        train(replace(config, resume="auto"))
    other = with_adapter(config, targets=["q_proj"])
    with pytest.raises(ValueError, match="adapter"):
        train(replace(other, resume="auto"))


def test_an_adapter_without_a_base_and_a_base_that_is_not_there_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base"):
        TrainConfig(adapter=AdapterConfig(kind="lora"))
    with pytest.raises((FileNotFoundError, ValueError), match="nowhere"):
        train(replace(config, base=str(tmp_path / "nowhere")))


def test_shards_of_another_codec_than_the_bases_are_refused(
    config: TrainConfig, write_conversations: Callable[..., Path], tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        write_conversations(tmp_path / "other" / split, [[(0, "one", 9)]] * 4, digest="e" * 64)
    with pytest.raises(ValueError, match="codec"):
        train(replace(config, data=replace(config.data, path=str(tmp_path / "other"))))
