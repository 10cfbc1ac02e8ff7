"""Checkpoint folders: whole or refused, no pickle, loadable anywhere, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from csm.cli.train import train
from csm.config import ModelConfig, OptimConfig, TrainConfig
from csm.model.csm import CSM
from csm.training.checkpoint import (
    FolderCheckpointIO,
    _decode,
    _encode,
    checkpoint_step,
    find_fault,
    list_checkpoints,
    newest_valid_checkpoint,
)
from tests.test_training_module import read_rows, run_config


def _adamw_run(model: ModelConfig, run_dir: Path, **trainer: object) -> TrainConfig:
    settings = {"max_steps": 10, "log_every": 3, "validate_every": 4, "checkpoint_every": 5, "accumulate": 2, **trainer}
    config = run_config(model, run_dir, **settings)
    return replace(config, optim=OptimConfig(lr=0.01, warmup_steps=2), loss=replace(config.loss, amortization=0.25, frame_dropout=0.3))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten tiny AdamW steps, checkpoints at 5 and 10; read only."""
    from tests.conftest import tiny_config

    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(_adamw_run(tiny_config(), run_dir))
    return run_dir


@pytest.fixture
def broken_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run whose newest checkpoint lost a file, as after a crash at step 10."""
    run_dir = tmp_path / "broken"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "checkpoints/step_000010/optimizer.safetensors").unlink()
    return run_dir


def test_checkpoint_is_a_folder_of_safetensors_and_json_with_a_manifest(finished_run: Path) -> None:
    folder = finished_run / "checkpoints/step_000010"
    names = set(_files(folder))
    assert names == {"config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    assert not list(finished_run.rglob("*.tmp"))
    assert find_fault(folder) is None


def test_checkpoint_is_a_model_to_load(finished_run: Path) -> None:
    model = CSM.from_pretrained(finished_run)
    with safe_open(finished_run / "checkpoints/step_000010/model.safetensors", "pt") as file:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, file.get_tensor(name))


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished_run: Path, broken_run: Path, capsys: pytest.CaptureFixture) -> None:
    config = _adamw_run(CSM.from_pretrained(finished_run).config, broken_run)
    train(replace(config, resume="auto"))
    said = capsys.readouterr().out
    assert "step_000010: not usable, optimizer.safetensors is missing" in said
    assert "resuming" in said and "step_000005" in said
    assert _files(broken_run / "checkpoints") == _files(finished_run / "checkpoints")
    assert (broken_run / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
    assert [row["step"] for row in read_rows(broken_run)] == ["3", "4", "6", "8", "9", "10"]


def test_named_checkpoint_resumes_its_own_run_or_a_new_one(finished_run: Path, broken_run: Path, tmp_path: Path) -> None:
    model = CSM.from_pretrained(finished_run).config
    config = replace(_adamw_run(model, tmp_path / "new"), resume=str(broken_run / "checkpoints/step_000005"))
    assert train(config) == tmp_path / "new"
    assert [row["step"] for row in read_rows(tmp_path / "new")] == ["6", "8", "9", "10"]
    assert train(replace(config, run_dir=None)) == broken_run
    weights = "checkpoints/step_000010/model.safetensors"
    assert (broken_run / weights).read_bytes() == (tmp_path / "new" / weights).read_bytes()


def test_more_steps_can_be_asked_of_a_finished_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = tmp_path / "longer"
    shutil.copytree(finished_run, run_dir)
    config = _adamw_run(CSM.from_pretrained(finished_run).config, run_dir)
    train(replace(config, resume="auto"))
    assert "already at step 10 of 10" in capsys.readouterr().out
    longer = replace(config, resume="auto", trainer=replace(config.trainer, max_steps=12), optim=replace(config.optim, weight_decay=0.5))
    train(longer)
    assert "optim.weight_decay: 0.05 -> 0.5; trainer.max_steps: 10 -> 12" in capsys.readouterr().out
    state = json.loads((run_dir / "checkpoints/step_000012/state.json").read_text())
    assert [group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "state.json").write_text("{}"), "state.json has 2 bytes"),
        (lambda folder: _flip_last_byte(folder / "model.safetensors"), "model.safetensors differs from the manifest's sha256"),
    ],
)
def test_damage_is_found_and_said(damage, expected: str, finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000010"
    shutil.copytree(finished_run / "checkpoints/step_000010", folder)
    damage(folder)
    fault = find_fault(folder)
    assert fault is not None and expected in fault
    with pytest.raises(ValueError, match="not usable"):
        FolderCheckpointIO(CSM.from_pretrained(finished_run)).load_checkpoint(folder)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_run_without_one_whole_checkpoint_is_refused(broken_run: Path, finished_run: Path) -> None:
    (broken_run / "checkpoints/step_000005/manifest.json").unlink()
    config = _adamw_run(CSM.from_pretrained(finished_run).config, broken_run)
    assert newest_valid_checkpoint(broken_run / "checkpoints", lambda line: None) is None
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        train(replace(config, resume="auto"))


def test_resume_auto_starts_fresh_where_nothing_is(tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(replace(run_config(tiny_model_config, tmp_path / "new", max_steps=1), resume="auto"))
    assert "starting fresh" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_refused(finished_run: Path, tmp_path: Path) -> None:
    from tests.conftest import tiny_config

    config = replace(_adamw_run(tiny_config(8), tmp_path / "new"), resume=str(finished_run / "checkpoints/step_000005"))
    with pytest.raises(ValueError, match=r"is of another model: audio_embeddings\.weight is \(132, 32\), this run's .* has \(264, 32\)"):
        train(config)


def test_old_checkpoints_go_and_the_best_stays(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    # A rate that ruins the model: the first validation is the best.
    config = run_config(tiny_model_config, tmp_path, max_steps=6, checkpoint_every=1, validate_every=1, keep_checkpoints=2)
    train(replace(config, optim=OptimConfig(name="sgd", lr=8.0, warmup_steps=0, clip_norm=0.0)))
    losses = {int(row["step"]): float(row["val/loss"]) for row in read_rows(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    assert (tmp_path / "checkpoints/best.txt").read_text() == f"step_{best:06d}\n"
    assert (tmp_path / "checkpoints/last.txt").read_text() == "step_000006\n"
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "checkpoints")] == sorted({best, 5, 6})


def test_state_survives_encoding() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"a": [1, 2.5, None, True, "x"], "b": {0: {"step": torch.tensor(3.0)}, 1: (0.9, 0.95)}, "inf": float("inf")}
    encoded = json.loads(json.dumps(_encode(state, "s", tensors)))
    decoded = _decode(encoded, tensors)
    assert torch.equal(decoded["b"][0].pop("step"), state["b"][0].pop("step"))
    assert decoded == state
    with pytest.raises(TypeError, match="s.f: function cannot be written"):
        _encode({"f": lambda: None}, "s", tensors)
