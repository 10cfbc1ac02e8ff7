"""When checkpoints are saved, which are kept, and what `last` and `best` name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.training.callbacks import Clock, Validation, is_due
from csm.training.checkpoint import checkpoint_name, checkpoint_step, list_checkpoints, write_pointer
from csm.training.module import CSMModule


class Checkpoints(Callback):
    """Saves every `trainer.checkpoint_every` steps, after the last, and when the run is told to stop.

    `best.txt` names the saved checkpoint with the lowest validation loss; it needs both at the same step. Older ones go
    only when the new one is on disk and named.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, validation: Validation, clock: Clock) -> None:
        self.folder = run_dir / "checkpoints"
        self._config, self._validation, self._clock = config.trainer, validation, clock
        self.best_step: int | None = None
        self.best_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        is_last = module.step == self._config.max_steps
        if is_last or module.should_stop or is_due(module.step, self._config.checkpoint_every, self._config.max_steps):
            with self._clock.pause():
                self._save(trainer, module.step)

    def _save(self, trainer: Trainer, step: int) -> None:
        loss = self._validation.metrics.get("val/loss")
        if loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss = step, loss
        trainer.save_checkpoint(self.folder / checkpoint_name(step))
        if trainer.is_global_zero:
            write_pointer(self.folder, "last", self.folder / checkpoint_name(step))
            best = self.best_step if self.best_step is not None else step
            write_pointer(self.folder, "best", self.folder / checkpoint_name(best))
            own = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) <= step]
            for path in own[: -max(1, self._config.keep_checkpoints)]:
                if checkpoint_step(path) != best:
                    trainer.strategy.remove_checkpoint(path)
