"""One optimizer step: what it divides by, that splitting changes nothing, and how a run of steps ends."""

from __future__ import annotations

import csv
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from csm.cli.hydra_entry import compose
from csm.cli.run_parts import build_model
from csm.cli.train import train
from csm.config import DataConfig, LoggerConfig, LossConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.loss import csm_loss
from csm.model.csm import CSM
from csm.training.callbacks import Clock, Validation
from csm.training.checkpoint import FolderCheckpointIO
from csm.training.metrics import Metrics
from csm.training.module import CSMModule
from csm.training.saving import Checkpoints
from csm.training.signals import StopOnSignal
from csm.training.steps import StepLoader
from csm.training.trainer import build_trainer
from tests.isolation import run_isolated


def run_config(model: ModelConfig, run_dir: Path, **trainer: object) -> TrainConfig:
    """A run of a few tiny steps on made-up rows."""
    settings = {"max_steps": 4, "log_every": 1, "validate_every": 0, "checkpoint_every": 0, "deterministic": True, **trainer}
    return TrainConfig(
        run_dir=str(run_dir),
        model=model,
        data=DataConfig(kind="random", seq_len=48, rows_per_batch=4, max_val_batches=2),
        loss=LossConfig(amortization=1.0),
        optim=OptimConfig(name="sgd", lr=0.5, warmup_steps=0, schedule="constant"),
        trainer=TrainerConfig(**settings),
    )


def read_rows(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = (run_dir / "checkpoints" / "last.txt").read_text().strip()
    return load_file(run_dir / "checkpoints" / last / "model.safetensors")


def fit(config: TrainConfig, *callbacks: Callback) -> CSMModule:
    """The core of a run without its folder's files, for tests that step in."""
    model = build_model(config)
    module = CSMModule(model, config)
    data = CSMDataModule(config.data, config.model, seed=config.seed, accumulate=config.trainer.accumulate)
    run_dir = Path(config.run_dir or "")
    run_dir.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(config, run_dir, callbacks=callbacks, loggers=[], checkpoint_io=FolderCheckpointIO(model))
    data.trainer = trainer
    loader = StepLoader(
        data.train_dataloader(),
        accumulate=config.trainer.accumulate,
        amortization=config.loss.amortization,
        num_steps=lambda: config.trainer.max_steps - module.step,
    )
    trainer.fit(module, train_dataloaders=loader)
    return module


def test_step_counts_are_those_the_loss_uses(tiny_model_config: ModelConfig) -> None:
    data = CSMDataModule(DataConfig(kind="random", seq_len=48, rows_per_batch=2), tiny_model_config, accumulate=3)
    step = next(iter(StepLoader(data.train_dataloader(), accumulate=3, amortization=0.25, num_steps=lambda: 1)))
    losses = [csm_loss(CSM(tiny_model_config), batch, amortization=0.25) for batch in step.batches]
    assert len(step.batches) == 3
    assert step.num_c0_targets == sum(int(loss.c0_count) for loss in losses)
    assert step.num_depth_targets == sum(int(loss.depth_count) for loss in losses)
    assert step.num_frames == sum(batch.num_frames for batch in step.batches)
    assert len(step.keys) == 6


def test_accumulation_changes_neither_losses_nor_weights(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    whole = run_config(tiny_model_config, tmp_path / "whole")
    split = run_config(tiny_model_config, tmp_path / "split", accumulate=4)
    split.data = replace(split.data, rows_per_batch=1)
    for config in (whole, split):
        train(config)
    for one, other in zip(read_rows(tmp_path / "whole"), read_rows(tmp_path / "split"), strict=True):
        for key in ("train/loss", "train/c0", "train/depth", "grad_norm"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=2e-5)  # float32 sums in another order
    weights, others = final_weights(tmp_path / "whole"), final_weights(tmp_path / "split")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, others[name], atol=2e-6, rtol=1e-4)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(run_config(tiny_model_config, tmp_path / name, validate_every=2), seed=seed))
    files = {name: (tmp_path / name / "metrics.csv").read_bytes() for name in "abc"}
    weights = {name: (tmp_path / name / "checkpoints/step_000004/model.safetensors").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    assert weights["a"] == weights["b"] != weights["c"]


def test_rows_hold_what_was_logged_and_wall_clock_only_where_allowed(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    train(run_config(tiny_model_config, tmp_path / "a", log_every=3, validate_every=2, max_steps=5))
    train(run_config(tiny_model_config, tmp_path / "b", log_every=3, validate_every=2, max_steps=5, deterministic=False))
    rows = read_rows(tmp_path / "a")
    assert [row["step"] for row in rows] == ["2", "3", "4", "5"]
    assert [bool(row["train/loss"]) for row in rows] == [False, True, False, True]
    assert [bool(row["val/c0"]) for row in rows] == [True, False, True, True]
    assert {row["frames_per_s"] for row in rows} == {""}
    assert float(read_rows(tmp_path / "b")[1]["frames_per_s"]) > 0
    validated = rows[0]
    codebooks = [float(validated[f"val/codebook_{k:02d}"]) for k in range(tiny_model_config.num_codebooks)]
    assert codebooks[0] == pytest.approx(float(validated["val/c0"]))
    assert sum(codebooks[1:]) / len(codebooks[1:]) == pytest.approx(float(validated["val/depth"]), rel=1e-5)


def test_model_is_in_training_mode_at_every_step(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    modes = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: object, module: CSMModule, *_: object) -> None:  # type: ignore[override]
            modes.append(module.model.training)

    config = run_config(tiny_model_config, tmp_path, validate_every=1)
    data = CSMDataModule(config.data, config.model)
    fit(config, Watch(), Validation(data.val_dataloader, config, Clock()))
    assert modes == [True] * 4


def test_signal_ends_the_run_after_its_step_with_a_checkpoint(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer: object, module: CSMModule, *_: object) -> None:  # type: ignore[override]
            if module.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    config = run_config(tiny_model_config, tmp_path, max_steps=20)
    clock = Clock()
    validation = Validation(list, config, clock)
    metrics = Metrics(tmp_path, config, validation, clock, tiny_model_config.num_codebooks)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    module = fit(config, Interrupt(), validation, metrics, Checkpoints(tmp_path, config, validation, clock), StopOnSignal())
    assert module.step == 3
    assert (tmp_path / "checkpoints" / "last.txt").read_text() == "step_000003\n"
    assert signal.signal(signal.SIGTERM, before) == signal.SIG_DFL


@pytest.mark.slow
def test_two_ranks_see_the_losses_of_one(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    overrides = [
        "data=random", "data.seq_len=48", "loss.amortization=1.0", "optim=sgd", "optim.lr=0.2", "optim.warmup_steps=0", "ema.decay=0.5",
        "trainer.max_steps=8", "trainer.log_every=1", "trainer.validate_every=4", "trainer.deterministic=true",
        "spikes.action=skip", "spikes.window=4", "spikes.loss_sigmas=1", "spikes.norm_ratio=0",  # ordinary noise is a spike
        "loss.frame_dropout=0", "trainer.precision=32",  # the demo hides frames by a draw of each rank's own
        "model.backbone.num_layers=1", "model.backbone.width=32", "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1",
        "model.depth_decoder.width=16", "model.depth_decoder.ffn_width=24", "trainer.accelerator=cpu",
    ]  # fmt: skip
    train(compose("train", [*overrides, f"run_dir={tmp_path / 'one'}", "data.rows_per_batch=4", "data.max_val_batches=2"], TrainConfig))
    pair = [f"run_dir={tmp_path / 'two'}", "data.rows_per_batch=2", "data.max_val_batches=4", "trainer=ddp", "trainer.devices=2"]
    done = run_isolated([sys.executable, "train.py", *overrides, *pair], timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two] == [str(step) for step in range(1, 9)]
    for mine, other in zip(one, two, strict=True):
        for key in ("train/loss", "train/c0", "train/depth", "grad_norm", "hours_heard", "skipped", "val/loss"):
            assert bool(mine[key]) == bool(other[key]), key
            assert not mine[key] or float(mine[key]) == pytest.approx(float(other[key]), rel=2e-5), key
    num_skipped = int(two[-1]["skipped"])
    assert 0 < num_skipped < 6
    assert len(re.findall(r"skipped, spike.*worst in rank [01], micro-batch 1 of 1, samples: random-", done.stdout)) == num_skipped
    for name, weight in final_weights(tmp_path / "one").items():
        torch.testing.assert_close(weight, final_weights(tmp_path / "two")[name], atol=2e-6, rtol=1e-4)


def test_logger_none_writes_no_metrics(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    train(replace(run_config(tiny_model_config, tmp_path, max_steps=1), logger=LoggerConfig(name="none")))
    assert not (tmp_path / "metrics.csv").exists()
    assert (tmp_path / "checkpoints" / "last.txt").is_file()
