"""Optimizers and learning-rate schedules: which parameters decay, what state costs, how the rate moves.

The rate is a function of the step alone, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from csm.config import OptimConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CHUNK = 1 << 22  # elements updated at once where temporaries are needed: 16 MiB each in float32


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """The optimizers that `optim.name` stands for; muon is two, its own for hidden matrices and AdamW for the rest.

    Raises:
        ValueError: if `optim.state_dtype` is asked of an optimizer that has no such choice.
    """
    if config.name not in ("adamw", "muon") and config.state_dtype != OptimConfig().state_dtype:
        raise ValueError(f"optim.state_dtype={config.state_dtype}: optim.name={config.name} has no such choice; leave it or use adamw")
    if config.name == "muon":
        hidden, rest = _split_for_muon(model)
        muon = torch.optim.Muon(
            [p for _, p in hidden], lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )  # rates as AdamW's: Source: Moonlight, arXiv 2502.16982, section 2.2
        return [muon, _adamw(decay_groups(rest, config.weight_decay), config)]
    groups = decay_groups(model.named_parameters(), config.weight_decay)
    if config.name == "adamw":
        return [_adamw(groups, config)]
    if config.name == "adafactor":
        return [torch.optim.Adafactor(groups, lr=config.lr, foreach=False)]
    assert config.name == "sgd", config.name
    return [torch.optim.SGD(groups, lr=config.lr, momentum=0.0)]


def decay_groups(named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and norms, embeddings and any vector, which do not."""
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and "embeddings" not in name else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear warm-up, then `optim.schedule`, which ends at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    span = max(1, max_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * _SHAPES[config.schedule](progress, config))


def _wsd(progress: float, config: OptimConfig) -> float:
    """Warm-up, stable, decay: full until the last `decay_share` of all steps, then linear. Source: arXiv 2405.18392."""
    return min(1.0, (1 - progress) / config.decay_share) if config.decay_share > 0 else 1.0


_SHAPES: dict[str, Callable[[float, OptimConfig], float]] = {
    "cosine": lambda progress, config: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress, config: 1 - progress,
    "constant": lambda progress, config: 1.0,
    "wsd": _wsd,
}


def _split_for_muon(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Hidden matrices, and everything else: embeddings, heads, norms. Source: the Muon post, kellerjordan.github.io/posts/muon."""
    hidden: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and "embeddings" not in name and "head" not in name
        (hidden if is_hidden and parameter.requires_grad else rest).append((name, parameter))
    if not hidden:
        raise ValueError("optim.name=muon: this model has no trainable hidden matrix; use optim=adamw")
    return hidden, rest


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> Optimizer:
    settings: dict[str, Any] = {"lr": config.lr, "betas": (config.betas[0], config.betas[1]), "eps": config.eps}
    dtypes = {parameter.dtype for group in groups for parameter in group["params"]}
    if config.state_dtype == "weights" or dtypes == {_DTYPES[config.state_dtype]}:
        return torch.optim.AdamW(groups, fused=True, **settings)
    return StateDtypeAdamW(groups, state_dtype=_DTYPES[config.state_dtype], **settings)


class StateDtypeAdamW(Optimizer):
    """AdamW whose moments have a dtype of their own: bfloat16 beside float32 weights, or float32 beside bfloat16 ones.

    Arithmetic is float32; torch's AdamW keeps its moments in the weights' dtype. Slower than the fused one, by passes over
    memory, and as exact.
    """

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, state_dtype: torch.dtype, weight_decay: float = 0.0
    ) -> None:
        self.state_dtype = state_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=self.state_dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=self.state_dtype)
        state["step"] += 1
        count = int(state["step"])
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1**count)
        bias2_root = math.sqrt(1 - beta2**count)
        flat = [t.view(-1) for t in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        gradient = parameter.grad.reshape(-1)
        for start in range(0, gradient.numel(), _CHUNK):  # whole tables would need gigabytes of temporaries
            weight, mean, square = (t[start : start + _CHUNK] for t in flat)
            grad = gradient[start : start + _CHUNK].float()
            new_mean = mean.float().lerp_(grad, 1 - beta1)
            new_square = square.float().mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            mean.copy_(new_mean)
            square.copy_(new_square)
            denominator = new_square.sqrt().div_(bias2_root).add_(group["eps"])
            weight.copy_(weight.float().mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(new_mean, denominator, value=-step_size))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would cast the moments to the weights' dtype."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        indexes = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(indexes, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if index in saved:
                    self.state[parameter][name] = saved[index][name].to(parameter.device, self.state_dtype, copy=True)
