"""What every callback shares, and validation. After each step, in this order: validate, speak samples (`samples`), write
metrics (`metrics`), save (`saving`), show (`progress`), stop (`signals`).

Every rank runs every callback, for some of it is collective; only rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from csm.config import TrainConfig
from csm.frames import Batch
from csm.training.module import CSMModule


def is_due(step: int, every: int, max_steps: int) -> bool:
    """Whether something done every `every` steps (0: never), and at the last, is due after `step` steps."""
    return every > 0 and (step % every == 0 or step == max_steps)


class Clock:
    """Wall time of the steps apart from pauses for validation, samples and checkpoints."""

    def __init__(self) -> None:
        self.started_at_s = time.monotonic()
        self.paused_s = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_at_s

    @property
    def stepping_s(self) -> float:
        return self.elapsed_s - self.paused_s

    @contextmanager
    def pause(self) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self.paused_s += time.monotonic() - before


class Validation(Callback):
    """Runs the validation batches every `trainer.validate_every` steps and after the last.

    Attributes:
        metrics: of this step, empty at the others.
        latest: the last ones measured.
    """

    def __init__(self, batches: Callable[[], Iterable[Batch]], config: TrainConfig, clock: Clock) -> None:
        self._batches, self._config, self._clock = batches, config.trainer, clock
        self.metrics: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        self.metrics = {}
        if is_due(module.step, self._config.validate_every, self._config.max_steps):
            with self._clock.pause(), module.weights_for_use():
                self.metrics = self.latest = self._validate(trainer, module)

    def _validate(self, trainer: Trainer, module: CSMModule) -> dict[str, float]:
        module.eval()
        sums: torch.Tensor | None = None
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            for batch in self._batches():
                part = module.measure_batch(batch.to(module.device))
                sums = part if sums is None else sums + part
        module.train()
        if sums is None:
            raise ValueError("the validation split has no batch; give it conversations or set trainer.validate_every=0")
        return module.summarise_validation(sums)


class EarlyStop(Callback):
    """Ends the run after `trainer.patience` validations in a row without a new lowest loss; every rank sees the same losses.

    What saves runs after it and keeps the step at hand, too; `best` names the checkpoint to use.

    Attributes:
        stopped_at: the step after which the run was ended; None while it was not.
    """

    def __init__(self, validation: Validation, config: TrainConfig) -> None:
        self._validation, self._patience = validation, config.trainer.patience
        self.best_loss, self.num_worse = float("inf"), 0
        self.stopped_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_loss": self.best_loss, "num_worse": self.num_worse}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_loss, self.num_worse = state_dict["best_loss"], state_dict["num_worse"]

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        loss = self._validation.metrics.get("val/loss")
        if not self._patience or loss is None:
            return
        self.num_worse = 0 if loss < self.best_loss else self.num_worse + 1
        self.best_loss = min(loss, self.best_loss)
        if self.num_worse >= self._patience and module.step < module.config.trainer.max_steps:
            self.stopped_at = module.step
            module.print(f"step {module.step}: {self.num_worse} validations without a loss below {self.best_loss:.4f}; the run ends here")
            trainer.should_stop = True


class DataPosition(Callback):
    """Keeps where training stands in the data in every checkpoint."""

    def __init__(self, data: LightningDataModule) -> None:
        self._data = data

    def state_dict(self) -> dict[str, Any]:
        return self._data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._data.load_state_dict(state_dict)
