"""Every option of the step by a plain override: that it does what it says, and that a run with it resumes bit for bit."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from csm.cli.hydra_entry import compose
from csm.cli.train import train
from csm.config import SCHEDULES, TrainConfig
from csm.model.products import has_bfloat16_products
from csm.training import trainer
from csm.training.device import settle_precision
from csm.training.module import CSMModule
from csm.training.optim import learning_rate
from tests.test_training_module import fit, read_rows

TINY = [
    "data=random", "data.seq_len=48", "data.rows_per_batch=2", "data.max_val_batches=1", "loss.frame_dropout=0",
    "model.num_codebooks=4", "codec.num_codebooks=4", "model.audio_vocab_size=33", "model.text_vocab_size=32",
    "model.backbone.num_layers=2", "model.backbone.width=32", "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1",
    "model.depth_decoder.width=16", "model.depth_decoder.ffn_width=24", "optim.lr=0.02", "optim.warmup_steps=2",
    "trainer.accelerator=cpu", "trainer.precision=32", "trainer.deterministic=true", "trainer.log_every=1", "trainer.max_steps=6",
    "trainer.checkpoint_every=3", "trainer.validate_every=3", "trainer.sample_every=0",
]  # fmt: skip


def overridden(run_dir: Path, *overrides: str) -> TrainConfig:
    """The configuration that `python train.py <overrides>` has, at tiny sizes."""
    return compose("train", [*TINY, f"run_dir={run_dir}", *overrides], TrainConfig)


class Keep(Callback):
    """Keeps the trainer, the first weights, and how often each layer of the backbone ran at the first step."""

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self.trainer, self.num_layer_calls = trainer, 0
        self.before = {name: weight.detach().clone() for name, weight in module.model.named_parameters()}
        for layer in module.model.backbone.layers:
            layer.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_layer_calls += 1

    def change(self, module: CSMModule) -> float:
        """Length of the way the weights went."""
        return float(sum((weight.detach() - self.before[name]).square().sum() for name, weight in module.model.named_parameters()).sqrt())


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=muon", "optim.schedule=wsd", "trainer.precision=bf16-mixed", "trainer.accumulate=2", "loss.z_loss=0.001"],
        ["optim=adamw", "optim.state_dtype=float32", "trainer.precision=bf16-true", "ema.decay=0.9", "optim.schedule=linear"],
        ["optim=adamw_lean", "ema.decay=0.9", "ema.every=2", "spikes.action=skip", "spikes.window=4", "spikes.loss_sigmas=0.5"],
        ["optim=adafactor", "trainer.activation_checkpointing=true", "loss.codebook_weights=[3,1,1]", "optim.schedule=constant"],
        ["optim=sgd", "loss.frame_dropout=0.3", "loss.amortization=0.5", "optim.clip_norm=0"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_option_resumes_bit_for_bit(overrides: list[str], tmp_path: Path) -> None:
    train(overridden(tmp_path / "whole", *overrides))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts/checkpoints/step_000006")  # as killed at step 6
    train(overridden(tmp_path / "parts", *overrides, "resume=auto"))
    last = "checkpoints/step_000006"
    for name in ("metrics.csv", f"{last}/model.safetensors", f"{last}/optimizer.safetensors", f"{last}/state.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    losses = [float(row["train/loss"]) for row in read_rows(tmp_path / "whole") if row["train/loss"]]  # none where it was dropped
    assert len(losses) >= 3 and all(0 < loss < 20 for loss in losses)


@pytest.mark.parametrize(("precision", "weights", "products"), [
    ("32", "float32", "float32"), ("bf16-mixed", "float32", "bfloat16"), ("bf16-true", "bfloat16", "bfloat16")
])  # fmt: skip
def test_precision_is_that_of_weights_and_products(precision: str, weights: str, products: str, tmp_path: Path) -> None:
    seen = set()

    class Watch(Callback):
        def on_train_start(self, trainer: object, module: CSMModule) -> None:  # type: ignore[override]
            module.model.backbone.layers[0].mlp.w1.register_forward_hook(lambda layer, x, out: seen.add(str(out.dtype)))

    module = fit(overridden(tmp_path, f"trainer.precision={precision}"), Watch())
    assert {str(weight.dtype) for weight in module.parameters()} == {f"torch.{weights}"}
    assert seen == {f"torch.{products}"}
    means, plain = module.take_window(), fit(overridden(tmp_path / "plain")).take_window()
    for key in ("train/loss", "train/c0", "train/depth"):
        assert means[key] == pytest.approx(plain[key], rel=0.02)  # bfloat16 has 8 bits


@pytest.mark.parametrize(("is_fast", "asked", "settled", "is_told"), [
    (True, "auto", "bf16-mixed", False), (False, "auto", "32", False), (False, "32", "32", False),
    (True, "bf16-true", "bf16-true", False), (False, "bf16-true", "bf16-true", True), (False, "bf16-mixed", "bf16-mixed", True)
])  # fmt: skip
def test_auto_precision_is_the_machines(
    is_fast: bool, asked: str, settled: str, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csm.training.device.has_bfloat16_products", lambda device_type: is_fast)
    said: list[str] = []
    config = settle_precision(overridden(tmp_path, f"trainer.precision={asked}"), said.append)
    assert config.trainer.precision == settled
    assert [f"trainer.precision={asked}" in line for line in said] == [True] * is_told


def test_muon_is_told_to_be_slow_without_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for is_fast in (True, False):
        monkeypatch.setattr("csm.training.device.has_bfloat16_products", lambda device_type, is_fast=is_fast: is_fast)
        settle_precision(overridden(tmp_path, "optim=muon"), said.append)
    assert len(said) == 1 and "optim=adamw is faster" in said[0]


def test_the_run_folder_says_what_auto_became(tmp_path: Path) -> None:
    train(overridden(tmp_path, "trainer.precision=auto", "trainer.max_steps=1"))
    expected = "bf16-mixed" if has_bfloat16_products("cpu") else "32"
    assert f"precision: {expected}\n" in (tmp_path / "config.yaml").read_text().replace("'", "")


def test_optimizers_are_those_asked_for_and_fused(tmp_path: Path) -> None:
    keep = Keep()
    fit(overridden(tmp_path, "optim.weight_decay=0.1"), keep)
    (adamw,) = keep.trainer.optimizers
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["fused"]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    module = fit(overridden(tmp_path, "optim=muon", "trainer.max_steps=5"), keep)
    muon, rest = keep.trainer.optimizers
    assert type(muon) is torch.optim.Muon and type(rest) is torch.optim.AdamW
    names = {id(parameter): name for name, parameter in module.model.named_parameters()}
    hidden = {names[id(parameter)] for group in muon.param_groups for parameter in group["params"]}
    assert hidden == {name for name in names.values() if ".layers." in name and "norm" not in name} | {"projection.weight"}
    rates = {group["lr"] for optimizer in (muon, rest) for group in optimizer.param_groups}
    assert rates == {learning_rate(module.config.optim, 4, 5)} == {module.learning_rate}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_of_every_step_is_the_schedules(schedule: str, tmp_path: Path) -> None:
    config = overridden(tmp_path, f"optim.schedule={schedule}", "optim.warmup_steps=2", "trainer.max_steps=8", "trainer.checkpoint_every=0")
    rates: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: object) -> None:  # type: ignore[override]
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(config, Watch())
    assert rates == [learning_rate(config.optim, step, 8) for step in range(8)]


@pytest.mark.parametrize(("clip_norm", "is_clipped"), [(0.01, True), (1000.0, False), (0.0, False)])
def test_gradient_is_clipped_to_the_norm_asked_for(clip_norm: float, is_clipped: bool, tmp_path: Path) -> None:
    settings = ["optim=sgd", "optim.weight_decay=0", "optim.lr=1", "optim.warmup_steps=0", "trainer.max_steps=1"]
    keep = Keep()
    module = fit(overridden(tmp_path, *settings, f"optim.clip_norm={clip_norm}"), keep)
    assert module.grad_norm > 0.1  # what is logged is the norm before clipping
    assert keep.change(module) == pytest.approx(clip_norm if is_clipped else module.grad_norm, rel=1e-4)


def test_z_loss_and_codebook_weights_are_in_the_loss(tmp_path: Path) -> None:
    def means(*overrides: str) -> dict[str, float]:
        return fit(overridden(tmp_path, "trainer.max_steps=1", "loss.amortization=1", *overrides)).take_window()

    plain, with_z = means(), means("loss.z_loss=0.1")
    assert plain["train/loss"] == pytest.approx(plain["train/c0"] + plain["train/depth"])
    # Fresh logits are near 0, so their logsumexp is near ln V.
    assert with_z["train/loss"] - plain["train/loss"] == pytest.approx(0.1 * math.log(33) ** 2, rel=0.05)
    first_only = means("loss.codebook_weights=[2,0,0]")
    assert first_only["train/depth"] == pytest.approx(first_only["train/codebook_01"])
    assert plain["train/depth"] == pytest.approx(sum(plain[f"train/codebook_0{k}"] for k in (1, 2, 3)) / 3)
    halved = means("loss.c0_weight=0.5", "loss.depth_weight=2")
    assert halved["train/loss"] == pytest.approx(0.5 * plain["train/c0"] + 2 * plain["train/depth"])


def test_activation_checkpointing_runs_every_layer_twice_for_the_same_losses(tmp_path: Path) -> None:
    counts, weights = [], []
    for is_on in ("false", "true"):
        keep = Keep()
        module = fit(overridden(tmp_path, f"trainer.activation_checkpointing={is_on}", "trainer.max_steps=2"), keep)
        counts.append(keep.num_layer_calls)
        weights.append(list(module.parameters()))
    assert counts == [2 * 2, 2 * 2 * 2]  # layers, steps, and each again in the backward pass
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(("has_gpu", "accelerator", "keeps"), [(False, "auto", True), (True, "auto", False), (True, "cpu", True)])
def test_runs_on_a_cpu_keep_freed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, accelerator: str, keeps: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(trainer, "keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    trainer.set_up_torch(overridden(tmp_path, f"trainer.accelerator={accelerator}"))
    assert bool(calls) == keeps


@pytest.mark.slow
def test_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    common = ("ema.decay=0.5", "trainer.max_steps=4", "trainer.validate_every=4", "loss.amortization=0.5", "trainer.accumulate=2")
    for is_on in ("false", "true"):
        train(overridden(tmp_path / is_on, f"trainer.compile={is_on}", *common))
    for one, other in zip(read_rows(tmp_path / "false"), read_rows(tmp_path / "true"), strict=True):
        for key in ("train/loss", "train/c0", "train/depth", "grad_norm", "val/loss"):
            assert bool(one[key]) == bool(other[key])
            if one[key]:
                assert float(one[key]) == pytest.approx(float(other[key]), rel=1e-4), key  # sums in another order
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # training and validation
