"""The guard: what stops or is dropped, that a dropped step leaves no trace, and that it judges alike after a resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from csm.cli.train import train
from csm.config import ModelConfig, OptimConfig, SpikeConfig, TrainConfig
from csm.training.guards import MAX_CONSECUTIVE_SKIPS, StepGuard, StepNumbers, describe_samples
from csm.training.module import CSMModule
from csm.training.steps import Step
from tests.test_training_module import final_weights, fit, read_rows, run_config


class Scale(Callback):
    """Multiplies one gradient at the given steps (from 0)."""

    def __init__(self, steps: set[int], factor: float) -> None:
        self.steps, self.factor = steps, factor

    def on_train_start(self, trainer: object, module: CSMModule) -> None:  # type: ignore[override]
        weight = module.model.codebook0_head.weight
        weight.register_hook(lambda gradient: gradient * self.factor if module.step in self.steps else gradient)


class Watch(Callback):
    """Keeps weights and optimizer state after every step."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer: object, module: CSMModule, *_: object) -> None:  # type: ignore[override]
        (optimizer,) = trainer.optimizers  # type: ignore[attr-defined]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        self.states.append([tensor.detach().clone() for tensor in (*module.parameters(), *moments)])

    def is_unchanged_by(self, step: int) -> bool:
        return all(torch.equal(one, other) for one, other in zip(self.states[step - 1], self.states[step], strict=True))


def _adamw(config: TrainConfig) -> TrainConfig:
    return replace(config, optim=OptimConfig(lr=0.01, warmup_steps=0, schedule="constant"))


def _numbers(step: int, loss: float = 5.0, grad_norm: float = 1.0) -> StepNumbers:
    return StepNumbers(step, loss, loss / 2, loss / 2, grad_norm)


def _guard(said: list[str], on_non_finite: str = "stop", **settings: object) -> StepGuard:
    """After ten steps of losses 5.0 and 5.1, gradient norms 1.0."""
    guard = StepGuard(SpikeConfig(**{"window": 16, **settings}), on_non_finite, said.append)  # type: ignore[arg-type]
    for step in range(10):
        assert guard.lets_pass(_numbers(step, 5.0 + 0.1 * (step % 2)), lambda: "")
    return guard


def test_non_finite_gradient_stops_the_run_and_names_the_samples(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^not finite: step 2: gradient norm nan .*samples: random-0-4, random-0-5.*on_non_finite=skip$"):
        fit(run_config(tiny_model_config, tmp_path), Scale({1}, float("nan")))


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_dropped_step_leaves_weights_and_optimizer_state_as_they_were(
    factor: float, tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = _adamw(run_config(tiny_model_config, tmp_path, on_non_finite="skip"))
    watch = Watch()
    module = fit(config, Scale({2}, factor), watch)
    assert (module.step, module.num_skipped) == (4, 1)
    assert watch.is_unchanged_by(2) and not watch.is_unchanged_by(3)
    assert f"skipped, not finite: step 3: gradient norm {factor}" in capsys.readouterr().out


def test_gradient_spike_is_dropped_counted_and_leaves_no_trace(
    tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = _adamw(run_config(tiny_model_config, tmp_path, max_steps=7))
    watch = Watch()
    module = fit(replace(config, spikes=SpikeConfig(action="skip", window=8)), Scale({5}, 1e6), watch)
    assert (module.num_skipped, module.guard.num_spikes) == (1, 1)
    assert watch.is_unchanged_by(5) and not watch.is_unchanged_by(6)
    assert "skipped, spike, gradient norm" in (said := capsys.readouterr().out) and "samples: random-0-20" in said


def test_warning_names_the_batch_and_changes_nothing(tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = []
    for action in ("warn", "off"):
        config = replace(_adamw(run_config(tiny_model_config, tmp_path, max_steps=7)), spikes=SpikeConfig(action=action, window=8))
        weights.append(list(fit(config, Scale({5}, 1e6)).model.parameters()))
    assert capsys.readouterr().out.count("learnt from all the same; samples: random-0-20") == 1
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


def test_bad_micro_batch_is_the_one_named(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    class PoisonWord(Callback):
        """The first micro-batch reads word 1 only, the second word 2, whose embedding is NaN."""

        def on_train_batch_start(self, trainer: object, module: CSMModule, batch: Step, *_: object) -> None:  # type: ignore[override]
            for word, rows in enumerate(batch.batches, start=1):
                rows.tokens[..., -1][rows.mask[..., -1]] = word
            with torch.no_grad():
                module.model.text_embeddings.weight[2] = float("nan")

    config = run_config(tiny_model_config, tmp_path, accumulate=2)
    config.data = replace(config.data, rows_per_batch=2)
    with pytest.raises(ValueError, match="worst in rank 0, micro-batch 2 of 2, samples: random-0-2, random-0-3;"):
        fit(config, PoisonWord())


def test_skipping_has_a_cap(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = run_config(tiny_model_config, tmp_path, on_non_finite="skip", max_steps=50)
    with pytest.raises(ValueError, match=rf"^{MAX_CONSECUTIVE_SKIPS + 1} steps in a row, the last not finite: step 9"):
        fit(config, Scale(set(range(3, 50)), float("nan")))


@pytest.mark.parametrize(
    ("settings", "numbers", "found"),
    [
        ({}, _numbers(11, loss=5.1), None),
        ({}, _numbers(11, loss=5.5), "spike, loss 5.5 against 5.05 "),
        ({"loss_sigmas": 0.0}, _numbers(11, loss=50.0), None),
        ({}, _numbers(11, grad_norm=9.0), None),
        ({}, _numbers(11, grad_norm=11.0), "spike, gradient norm 11 against a median of 1 "),
        ({"norm_ratio": 0.0}, _numbers(11, grad_norm=11.0), None),
        ({"window": 64}, _numbers(11, loss=50.0), None),  # ten steps are too few to say
        ({"action": "off"}, _numbers(11, loss=50.0), None),
    ],
)
def test_what_a_spike_is(settings: dict, numbers: StepNumbers, found: str | None) -> None:
    said: list[str] = []
    assert _guard(said, **settings).lets_pass(numbers, lambda: "samples: a")
    assert [line[: len(found or "")] for line in said] == ([found] if found else [])


def test_spike_stops_the_run_when_asked() -> None:
    with pytest.raises(ValueError, match=r"spike, loss 9 against .*samples: a; lower optim\.lr.*resume=auto spikes\.action=skip"):
        _guard([], action="stop").lets_pass(_numbers(11, loss=9.0), lambda: "samples: a")


def test_dropped_steps_are_no_measure_for_those_after_and_warned_ones_are() -> None:
    for action, expected in (("skip", 2), ("warn", 1)):
        guard = _guard([], action=action)
        passed = [guard.lets_pass(_numbers(step, loss=9.0), lambda: "") for step in (11, 12)]
        assert guard.num_spikes == expected
        assert passed == [action == "warn"] * 2


def test_guard_judges_alike_after_a_resume() -> None:
    guard = _guard([], on_non_finite="skip", action="skip")
    for step in range(3):
        guard.lets_pass(_numbers(11 + step, grad_norm=float("nan")), lambda: "")
    again = StepGuard(SpikeConfig(window=16, action="skip"), "skip", lambda line: None)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert again.state_dict() == guard.state_dict()
    assert again.num_skipped == 3 and not again.lets_pass(_numbers(14, loss=5.5), lambda: "")
    with pytest.raises(ValueError, match="6 steps in a row"):
        for step in range(2):
            again.lets_pass(_numbers(15 + step, grad_norm=float("nan")), lambda: "")


def test_resumed_run_drops_the_same_steps(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    def config(name: str, max_steps: int) -> TrainConfig:
        made = _adamw(run_config(tiny_model_config, tmp_path / name, max_steps=max_steps, checkpoint_every=6, on_non_finite="skip"))
        # Thresholds this tight make spikes of ordinary noise.
        return replace(made, resume="auto", spikes=SpikeConfig(action="skip", window=4, loss_sigmas=0.8, norm_ratio=1.05))

    train(config("whole", 12))
    train(config("parts", 6))
    train(config("parts", 12))
    rows = read_rows(tmp_path / "whole")
    assert 0 < int(rows[5]["skipped"]) < int(rows[-1]["skipped"])
    assert (tmp_path / "parts/metrics.csv").read_bytes() == (tmp_path / "whole/metrics.csv").read_bytes()
    for name, weight in final_weights(tmp_path / "whole").items():
        assert torch.equal(weight, final_weights(tmp_path / "parts")[name]), name


def test_samples_are_named_up_to_eight() -> None:
    assert describe_samples([]) == "samples: not known"
    assert describe_samples(["a", "b"]) == "samples: a, b"
    assert describe_samples([str(i) for i in range(10)]) == "samples: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
