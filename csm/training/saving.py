"""When checkpoints are saved, which are kept, and what `last` and `best` name."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.model.checkpoint_folder import (
    checkpoint_name,
    checkpoint_step,
    find_fault,
    list_checkpoints,
    remove_checkpoint,
    write_pointer,
)
from csm.training.background import BackgroundWriter
from csm.training.callbacks import Clock, Validation, is_due
from csm.training.module import CSMModule


class Checkpoints(Callback):
    """Saves every `trainer.checkpoint_every` steps, after the last, and when the run is told to stop.

    `best.txt` names the saved checkpoint with the lowest validation loss; it needs both at the same step. Pointers move and
    older ones go only when the new one is on disk. The last save of a run, and one that a signal asks for, are made in the step.

    Args:
        writer: the one that the run's checkpoints are written by; None where they are written in the step.
    """

    def __init__(
        self, run_dir: Path, config: TrainConfig, validation: Validation, clock: Clock, writer: BackgroundWriter | None = None
    ) -> None:
        self.folder = run_dir / "checkpoints"
        self._config, self._validation, self._clock = config.trainer, validation, clock
        self._writer = writer if writer is not None else BackgroundWriter(is_async=False)
        self.best_step: int | None = None
        self.best_loss: float | None = None
        self._saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best_step": self.best_step, "best_loss": self.best_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_step, self.best_loss = state_dict["best_step"], state_dict["best_loss"]

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        """Refuse ranks that went on from different checkpoints, as a shared disk that lags may make them.

        Raises:
            ValueError: names both steps.
        """
        self._saved_step = module.step
        of_first = trainer.strategy.broadcast(module.step)
        if of_first != module.step:
            raise ValueError(
                f"rank {trainer.global_rank} goes on from step {module.step}, rank 0 from step {of_first}: they see different files in "
                f"{self.folder}; start again with resume={self.folder / checkpoint_name(min(of_first, module.step))}"
            )

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        self._writer.check()
        is_last = module.step == self._config.max_steps or module.should_stop
        if is_last:
            self._writer.is_async = False  # nothing goes on meanwhile, so no copies are made
        if is_last or is_due(module.step, self._config.checkpoint_every, self._config.max_steps):
            self._save(trainer, module)

    def on_train_end(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        if self._saved_step != module.step:  # stopped by what came after this callback in the step
            self._save(trainer, module)
        self._writer.finish()
        if self._writer.num_waits:
            module.print(
                f"{self._writer.num_waits} checkpoints waited {self._writer.waited_s:.1f} s in all for the one before to be written; "
                "raise trainer.checkpoint_every"
            )

    def on_exception(self, trainer: Trainer, module: CSMModule, exception: BaseException) -> None:  # type: ignore[override]
        try:
            self._writer.finish()  # a checkpoint taken before the trouble is worth having
        except OSError as error:
            module.print(f"error: {error}")

    def teardown(self, trainer: Trainer, module: CSMModule, stage: str) -> None:  # type: ignore[override]
        self._writer.close()

    def _save(self, trainer: Trainer, module: CSMModule) -> None:
        step, loss = module.step, self._validation.metrics.get("val/loss")
        if loss is not None and (self.best_loss is None or loss < self.best_loss):
            self.best_step, self.best_loss = step, loss
        with self._clock.pause(), module.weights_for_use():
            trainer.save_checkpoint(self.folder / checkpoint_name(step))
            self._saved_step = step
            if trainer.is_global_zero:
                kept = self._config.keep_checkpoints, self._config.keep_every
                self._writer.then(partial(point_and_tidy, self.folder / checkpoint_name(step), self.best_step, *kept))


def finish_save(checkpoint: Path) -> None:
    """Do what a run killed right after writing its last checkpoint had left to do: name it, and delete what it replaces.

    How many are kept is read from the run's own config.yaml: being asked to go on once more must delete nothing else.
    """
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    kept = yaml.safe_load((checkpoint.parents[1] / "config.yaml").read_text(encoding="utf-8"))["trainer"]
    best_step = state["callbacks"].get(Checkpoints.__name__, {}).get("best_step")
    point_and_tidy(checkpoint, best_step, kept["keep_checkpoints"], kept.get("keep_every", 0))


def point_and_tidy(newest: Path, best_step: int | None, keep_checkpoints: int, keep_every: int) -> None:
    """Name the new checkpoint, then delete what is neither among the newest `keep_checkpoints`, nor best, nor of a step that
    `keep_every` divides (0: none)."""
    folder = newest.parent
    best = newest if best_step is None else folder / checkpoint_name(best_step)
    if not best.is_dir():  # a later one was better once, and the run went back behind it
        best = newest
    write_pointer(folder, "last", newest)
    write_pointer(folder, "best", best)
    # Damaged ones count for nothing here and stay for a person to look at.
    before = [path for path in list_checkpoints(folder) if checkpoint_step(path) <= checkpoint_step(newest)]
    whole = [path for path in before if find_fault(path, is_quick=True) is None]
    for path in whole[: -max(1, keep_checkpoints)]:
        is_kept = keep_every > 0 and checkpoint_step(path) % keep_every == 0
        if path != best and not is_kept:
            remove_checkpoint(path)
