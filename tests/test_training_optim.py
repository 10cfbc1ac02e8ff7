"""Optimizers: who decays, what state weighs, that every name works, and how the rate moves."""

from __future__ import annotations

import copy

import pytest
import torch

from csm.config import SCHEDULES, ModelConfig, OptimConfig
from csm.model.csm import CSM
from csm.training.optim import StateDtypeAdamW, build_optimizers, decay_groups, learning_rate


def _quadratic_steps(optimizers: list[torch.optim.Optimizer], parameters: list[torch.nn.Parameter], num_steps: int) -> float:
    for _ in range(num_steps):
        loss = sum((parameter.float() - 0.1).square().sum() for parameter in parameters)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return float(loss.detach())


def test_norms_embeddings_and_vectors_do_not_decay(tiny_model_config: ModelConfig) -> None:
    model = CSM(tiny_model_config)
    decayed, others = decay_groups(model.named_parameters(), 0.1)
    ids = {id(parameter) for parameter in decayed["params"]}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0.0
    for name, parameter in model.named_parameters():
        expected = not ("embeddings" in name or "norm" in name)
        assert (id(parameter) in ids) == expected, name


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "sgd"])
def test_every_optimizer_lowers_a_loss(name: str, tiny_model_config: ModelConfig) -> None:
    model = CSM(tiny_model_config)
    optimizers = build_optimizers(model, OptimConfig(name=name, lr=0.01))
    parameters = list(model.parameters())
    first = _quadratic_steps(optimizers, parameters, 1)
    assert _quadratic_steps(optimizers, parameters, 10) < first
    held = {id(parameter) for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in parameters}


def test_state_dtype_of_an_optimizer_without_that_choice_is_refused(tiny_model_config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"optim\.state_dtype=bfloat16: optim\.name=adafactor has no such choice"):
        build_optimizers(CSM(tiny_model_config), OptimConfig(name="adafactor", state_dtype="bfloat16"))


def test_own_adamw_equals_torch_adamw() -> None:
    start = torch.randn(300, generator=torch.Generator().manual_seed(0))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    _quadratic_steps([StateDtypeAdamW([ours], state_dtype=torch.float32, **settings)], [ours], 20)
    _quadratic_steps([torch.optim.AdamW([theirs], **settings)], [theirs], 20)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)  # float32 rounding over 20 steps


@pytest.mark.parametrize(("weights", "state"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16")])
def test_moments_have_the_dtype_asked_for_and_survive_a_reload(weights: torch.dtype, state: str, tiny_model_config: ModelConfig) -> None:
    config = OptimConfig(lr=0.01, state_dtype=state)
    model = CSM(tiny_model_config).to(weights)
    (optimizer,) = build_optimizers(model, config)
    _quadratic_steps([optimizer], list(model.parameters()), 3)
    saved = copy.deepcopy(optimizer.state_dict())  # torch's load would share the tensors
    other_model = CSM(tiny_model_config).to(weights)
    other_model.load_state_dict(model.state_dict())
    (again,) = build_optimizers(other_model, config)
    again.load_state_dict(saved)
    for mine, other in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert mine["exp_avg"].dtype == other["exp_avg"].dtype == getattr(torch, state)
        assert torch.equal(mine["exp_avg_sq"], other["exp_avg_sq"])
    _quadratic_steps([optimizer], list(model.parameters()), 2)
    _quadratic_steps([again], list(other_model.parameters()), 2)
    for mine, other in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_follow_the_weights_unless_told(dtype: torch.dtype, tiny_model_config: ModelConfig) -> None:
    model = CSM(tiny_model_config, dtype=dtype)
    (optimizer,) = build_optimizers(model, OptimConfig())
    _quadratic_steps([optimizer], list(model.parameters()), 1)
    assert {state["exp_avg_sq"].dtype for state in optimizer.state.values()} == {dtype}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rate_warms_up_peaks_once_and_ends_where_it_should(schedule: str) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=10, final_lr_ratio=0.1, decay_share=0.25)
    rates = [learning_rate(config, step, 101) for step in range(101)]
    assert all(0 < rate <= 1.0 for rate in rates)
    assert all(later > earlier for earlier, later in zip(rates[:10], rates[1:11], strict=True))
    assert rates[10] == pytest.approx(1.0)
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:], strict=False))
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    if schedule == "wsd":
        assert rates[75] == pytest.approx(1.0) and rates[85] < 1.0


def test_run_shorter_than_its_warm_up_has_positive_rates() -> None:
    config = OptimConfig(lr=1.0, warmup_steps=50)
    assert [0 < learning_rate(config, step, 2) < 0.1 for step in range(2)] == [True, True]
