"""The average of the weights: its arithmetic, who sees it, what checkpoints hold, and that a resume changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from csm.cli.train import train
from csm.config import EmaConfig, ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.model.csm import CSM
from csm.training.callbacks import Clock, Validation
from csm.training.ema import WeightAverage, put_back_trained_weights
from csm.training.module import CSMModule
from csm.training.samples import SpokenSamples
from tests.test_training_guards import Scale
from tests.test_training_module import final_weights, fit, read_rows, run_config

FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


def _run(model: ModelConfig, run_dir: Path, ema: EmaConfig, **trainer: object) -> TrainConfig:
    config = run_config(model, run_dir, **trainer)
    return replace(config, ema=ema, optim=OptimConfig(lr=0.05, warmup_steps=0, schedule="constant"))


def _linear(value: float, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    model = torch.nn.Linear(2, 2, dtype=dtype)
    _fill(model, value)
    return model


def _fill(model: torch.nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def _average_of(average: WeightAverage, model: torch.nn.Module) -> float:
    with average.applied():
        return float(next(model.parameters()).detach()[0, 0])


def test_average_is_that_of_its_formula_and_early_updates_forget_faster() -> None:
    model = _linear(0.0)
    average = WeightAverage(model, EmaConfig(decay=0.5))
    expected = None
    for step, decay in enumerate((0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5), start=1):
        _fill(model, float(step))
        average.update(step)
        expected = float(step) if expected is None else decay * expected + (1 - decay) * step
        assert _average_of(average, model) == pytest.approx(expected, rel=1e-6)
    assert float(next(model.parameters()).detach()[0, 0]) == 10.0  # and the model has its own weights again


def test_average_starts_and_is_updated_when_told() -> None:
    model = _linear(0.0)
    average = WeightAverage(model, EmaConfig(decay=0.999, every=4, start=6))
    seen = []
    for step in range(1, 17):
        _fill(model, float(step))
        average.update(step)
        seen.append(_average_of(average, model))
    assert seen[:7] == [1, 2, 3, 4, 5, 6, 7]  # none yet: the model's own
    assert seen[7:11] == [8.0] * 4 and 8.0 < seen[11] == seen[14] < seen[15]


def test_decay_is_of_a_step_however_seldom_it_is_updated() -> None:
    values = []
    for every in (1, 10):
        model = _linear(0.0)
        average = WeightAverage(model, EmaConfig(decay=0.99, every=every))
        average._num_updates = 10_000  # past the first updates, which forget faster
        average.update(0)
        _fill(model, 1.0)
        for step in range(1, 101):
            average.update(step)
        values.append(_average_of(average, model))
    assert values[0] == pytest.approx(values[1], rel=1e-4) == pytest.approx(1 - 0.99**100, rel=1e-4)


def test_average_of_bfloat16_weights_is_float32_and_does_not_stall() -> None:
    model = _linear(1.0, torch.bfloat16)
    average = WeightAverage(model, EmaConfig(decay=0.999))
    average._num_updates = 100_000
    average.update(0)
    _fill(model, 1.0625)
    for step in range(1, 11):
        average.update(step)  # each moves the average by 6e-5: bfloat16 knows nothing between 1 and 1.0078
    (stored, *_) = average.state_dict()["averages"].values()
    assert stored.dtype == torch.float32
    assert float(stored[0, 0]) == pytest.approx(1 + 0.0625 * (1 - 0.999**10), abs=1e-6)
    with average.applied():
        assert model.weight.dtype == torch.bfloat16
    assert model.weight.dtype == torch.bfloat16


def test_frozen_weights_are_left_alone() -> None:
    model = _linear(1.0)
    model.bias.requires_grad_(False)
    average = WeightAverage(model, EmaConfig(decay=0.9))
    average.update(1)
    assert list(average.state_dict()["averages"]) == ["weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_applied", [False, True])
def test_state_and_weights_come_back_whichever_the_model_held(dtype: torch.dtype, is_applied: bool) -> None:
    model = _linear(1.0, dtype)
    average = WeightAverage(model, EmaConfig(decay=0.9))
    for step in range(1, 4):
        _fill(model, 1.0 + step / 7)
        average.update(step)
    trained = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    before = average.state_dict()["averages"]
    if is_applied:
        with average.applied():
            state, saved = average.state_dict(), {name: weight.detach().clone() for name, weight in model.state_dict().items()}
        assert len(state["averages"]) == (0 if dtype == torch.float32 else 2)  # model.safetensors holds it exactly
    else:
        state, saved = average.state_dict(), trained.copy()
    averages = put_back_trained_weights(state, saved)
    again = WeightAverage(model, EmaConfig(decay=0.9))
    again.load_state_dict(state, averages)
    for name, weight in trained.items():
        assert torch.equal(saved[name], weight)
        assert torch.equal(again.state_dict()["averages"][name], before[name])


def test_validation_samples_and_files_are_the_averages_and_training_is_not_touched(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    class Keep(Callback):
        """Averages by hand, as the formula says."""

        def __init__(self) -> None:
            self.average: dict[str, torch.Tensor] = {}

        def on_train_batch_end(self, trainer: object, module: CSMModule, *_: object) -> None:  # type: ignore[override]
            weights = {name: weight.detach().clone() for name, weight in module.model.named_parameters()}
            decay = min(0.9, module.step / (9 + module.step)) if self.average else 0.0
            self.average = {name: decay * self.average.get(name, weight) + (1 - decay) * weight for name, weight in weights.items()}

    class Speaker(Callback):
        """Speaks silence, and keeps a weight it would have spoken with."""

        def on_train_start(self, trainer: object, module: CSMModule) -> None:  # type: ignore[override]
            self.weight, self.spoken = module.model.codebook0_head.weight, []

        def __call__(self, model: CSM, text: str, speaker: int, seed: int) -> torch.Tensor:
            self.spoken.append(self.weight.detach().clone())
            return torch.zeros(1920)

    spoken: list[torch.Tensor] = []
    results = {}
    for decay in (0.9, 0.0):
        config = _run(tiny_model_config, tmp_path / str(decay), EmaConfig(decay=decay), max_steps=6, validate_every=6, sample_every=6)
        config.trainer.sample_texts = ["one"]
        data = CSMDataModule(config.data, config.model, seed=config.seed)
        validation, keep, speaker = Validation(data.val_dataloader, config, Clock()), Keep(), Speaker()
        (tmp_path / str(decay)).mkdir()
        module = fit(config, speaker, validation, keep, SpokenSamples(tmp_path / str(decay), config, speaker, Clock()))
        spoken += speaker.spoken
        results[decay] = (module, validation.metrics["val/loss"], keep.average, data)
    module, loss, by_hand, data = results[0.9]
    plain, plain_loss, _, _ = results[0.0]
    for mine, other in zip(module.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    torch.testing.assert_close(spoken[0], by_hand["codebook0_head.weight"], atol=1e-6, rtol=1e-5)  # float32, six updates
    assert torch.equal(spoken[1], plain.model.codebook0_head.weight)
    averaged = CSM(tiny_model_config)
    averaged.load_state_dict(by_hand)
    again = CSMModule(averaged, module.config)
    again.trainer = module.trainer
    averaged.eval()
    sums = sum(again.measure_batch(batch) for batch in data.val_dataloader())
    assert loss == pytest.approx(again.summarise_validation(sums)["val/loss"], rel=1e-5)
    assert loss != pytest.approx(plain_loss, rel=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16-true"])
def test_resumed_run_equals_an_uninterrupted_one_and_users_get_the_average(
    precision: str, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    def config(name: str, max_steps: int, **trainer: object) -> TrainConfig:
        settings = {"max_steps": max_steps, "validate_every": 3, "checkpoint_every": 3, "precision": precision, **trainer}
        return replace(_run(tiny_model_config, tmp_path / name, EmaConfig(decay=0.9, start=2), **settings), resume="auto")

    train(config("whole", 6))
    train(config("parts", 3))
    train(config("parts", 6))
    assert (tmp_path / "parts/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    last = "checkpoints/step_000006"
    for name in FILES:
        assert (tmp_path / "parts" / last / name).read_bytes() == (tmp_path / "whole" / last / name).read_bytes(), name
    # What users load is what was validated, and not the last step's weights.
    model = CSM.from_pretrained(tmp_path / "whole", dtype=None).eval()
    state = load_file(tmp_path / "whole" / last / "optimizer.safetensors")
    trained = {name.split(".weights.", 1)[1]: tensor for name, tensor in state.items() if ".average.weights." in name}
    assert set(trained) == {name for name, _ in model.named_parameters()}
    assert not torch.equal(trained["codebook0_head.weight"], model.codebook0_head.weight)
    module = CSMModule(model, config("whole", 6))
    module.trainer = type("OneProcess", (), {"world_size": 1})()
    data = CSMDataModule(module.config.data, tiny_model_config, seed=0)
    sums = sum(module.measure_batch(batch) for batch in data.val_dataloader())
    assert module.summarise_validation(sums)["val/loss"] == pytest.approx(float(read_rows(tmp_path / "whole")[-1]["val/loss"]), rel=1e-6)


def test_run_may_turn_averaging_on_or_off_when_it_goes_on(
    tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    off, on = EmaConfig(), EmaConfig(decay=0.9)
    for name, first, second in (("off", off, off), ("on_off", on, off), ("off_on", off, on)):
        train(replace(_run(tiny_model_config, tmp_path / name, first, max_steps=3)))
        train(replace(_run(tiny_model_config, tmp_path / name, second, max_steps=6), resume="auto"))
    assert "drops the checkpoint's average" in capsys.readouterr().out
    never, dropped, started = (final_weights(tmp_path / name) for name in ("off", "on_off", "off_on"))
    assert all(torch.equal(never[name], weight) for name, weight in dropped.items())
    assert not all(torch.equal(never[name], weight) for name, weight in started.items())
    train_losses = [[row["train/loss"] for row in read_rows(tmp_path / name)] for name in ("off", "on_off", "off_on")]
    assert train_losses[0] == train_losses[1] == train_losses[2]


def test_dropped_step_does_not_move_the_average(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = _run(tiny_model_config, tmp_path, EmaConfig(decay=0.9), max_steps=5, on_non_finite="skip")
    module = fit(config, Scale({1, 3}, float("nan")))
    assert module.average is not None and module.num_skipped == 2
    assert module.average.state_dict()["num_updates"] == 2  # three steps learnt from; the first one starts it


def test_checkpoint_of_weights_alone_holds_the_average_alone(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    for name, is_saved in (("whole", True), ("alone", False)):
        train(_run(tiny_model_config, tmp_path / name, EmaConfig(decay=0.9), max_steps=3, save_optimizer=is_saved))
    whole, alone = final_weights(tmp_path / "whole"), final_weights(tmp_path / "alone")
    assert all(torch.equal(weight, alone[name]) for name, weight in whole.items())
    assert not load_file(tmp_path / "alone/checkpoints/step_000003/optimizer.safetensors")


def test_strategy_that_splits_weights_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ema\.decay=0\.9: expected 0 with trainer\.strategy=zero3"):
        TrainConfig(trainer=TrainerConfig(strategy="zero3"), ema=EmaConfig(decay=0.9))
