"""How a step's gradients come about and move the weights: what differs between strategies, behind one small interface.

The module asks for a backward pass of each micro-batch, the norm of the whole gradient, and then either a step or none. One
process and DDP are here; ZeRO, where an engine owns gradients and optimizer, is in `zero`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn


class Update(Protocol):
    """One optimizer step in parts, called in this order: micro-batches, `clip`, then `step` or `discard`.

    Attributes:
        model: what losses are computed with; called like a CSM.
        param_groups: the optimizers' groups, for settings such as the weight decay.
        has_whole_weights: whether they are all there at any time of a forward pass.
    """

    has_whole_weights: bool

    @property
    def model(self) -> Any: ...

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which is averaged over the ranks."""
        ...

    def clip(self) -> Tensor:
        """The norm of the whole gradient before clipping, the same on all ranks; not finite when the gradient is not."""
        ...

    def step(self, rate: float) -> None:
        """Move the weights by the clipped gradient and forget it."""
        ...

    def discard(self) -> None:
        """Forget the gradient; weights and optimizer state stay."""
        ...


class PlainUpdate:
    """One process, or DDP: every process holds whole weights, gradients and optimizer state."""

    has_whole_weights = True

    def __init__(self, module: LightningModule, model: nn.Module, clip_norm: float) -> None:
        self.model = model
        self._module, self._clip_norm = module, clip_norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers() for group in optimizer.param_groups]

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[None]:
        trainer = self._module.trainer
        # DDP must not exchange gradients that are not complete yet.
        return nullcontext() if is_last or trainer.world_size == 1 else trainer.strategy.block_backward_sync()

    def backward(self, loss: Tensor) -> None:
        self._module.manual_backward(loss)

    def clip(self) -> Tensor:
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        if self._clip_norm > 0:
            return torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])

    def step(self, rate: float) -> None:
        for optimizer in self._optimizers():
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self.discard()

    def discard(self) -> None:
        for optimizer in self._optimizers():
            optimizer.zero_grad(set_to_none=True)

    def _optimizers(self) -> list[Any]:
        optimizers = self._module.optimizers()
        return optimizers if isinstance(optimizers, list) else [optimizers]
