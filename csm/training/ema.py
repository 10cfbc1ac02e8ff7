"""A running average of the weights, which validation, spoken samples and `model.safetensors` use in place of the last step's.

The average is kept in float32 whatever the weights are: beside bfloat16 ones a share of 0.001 would be rounded away. The
arithmetic is `torch.optim.swa_utils`'s; its `AveragedModel` keeps the weights' dtype and a whole second module, so it is
not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from csm.config import EmaConfig


class WeightAverage:
    """The average of a model's trainable weights, one float32 copy of them; frozen ones are the same in both.

    Early updates forget faster, (1 + n) / (10 + n) after n, so that the random weights of the start do not stay in a short
    run. Source: `tf.train.ExponentialMovingAverage`, its num_updates.
    """

    def __init__(self, model: nn.Module, config: EmaConfig) -> None:
        self._model, self._config = model, config
        self._averages: dict[str, Tensor] = {}  # empty until the first update
        self._trained: dict[str, Tensor] = {}  # the weights as trained, while `applied`
        self._num_updates = 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` optimizer steps, where that is due."""
        config = self._config
        if step < config.start or step % config.every:
            return
        weights = self._weights()
        if not self._averages:
            self._averages = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
            return
        self._num_updates += 1
        ramp = (1 + self._num_updates) / (10 + self._num_updates)
        average = get_ema_multi_avg_fn(min(config.decay**config.every, ramp))
        is_float32 = all(weight.dtype == torch.float32 for weight in weights.values())
        if is_float32:
            average(list(self._averages.values()), [weight.detach() for weight in weights.values()], self._num_updates)
            return
        for name, weight in weights.items():  # one by one: a float32 copy of all would be another 4 bytes a parameter
            average([self._averages[name]], [weight.detach().float()], self._num_updates)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the averaged weights, in its dtype, inside; nothing is copied where that is float32."""
        if self._trained or not self._averages:
            yield
            return
        weights = self._weights()
        self._trained = {name: weight.data for name, weight in weights.items()}
        for name, weight in weights.items():
            weight.data = self._averages[name].to(weight.dtype)
        try:
            yield
        finally:
            for name, weight in weights.items():
                weight.data = self._trained[name]
            self._trained = {}

    def to(self, device: torch.device) -> None:
        self._averages = {name: average.to(device) for name, average in self._averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """What the model's own state does not hold: inside `applied` the weights as trained (and the exact average, where
        the model's dtype rounds it), outside it the average."""
        if not self._trained:
            return {"num_updates": self._num_updates, "averages": dict(self._averages)}
        is_exact = all(weight.dtype == torch.float32 for weight in self._trained.values())
        return {"num_updates": self._num_updates, "weights": dict(self._trained), "averages": {} if is_exact else dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any], averages: dict[str, Tensor]) -> None:
        """Take back a `state_dict`.

        Args:
            averages: what `put_back_trained_weights` gave.
        """
        self._num_updates = state["num_updates"]
        self._averages = {name: average.to(torch.float32, copy=True) for name, average in averages.items()}

    def _weights(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self._model.named_parameters() if weight.requires_grad}


def put_back_trained_weights(state: dict[str, Any], model_state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Put the weights as trained into a model's loaded state, where a checkpoint holds averaged ones; return the averages.

    Args:
        state: of `WeightAverage.state_dict`.
        model_state: changed in place; its names begin with `prefix`.
    """
    averages = state["averages"] or {name: model_state[prefix + name] for name in state.get("weights", {})}
    model_state.update({prefix + name: weight for name, weight in state.get("weights", {}).items()})
    return averages
