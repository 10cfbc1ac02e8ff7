"""What happens around the steps, in this order after each: validate, write metrics, speak samples, save, stop.

Every rank runs every callback, for some of it is collective; only rank 0 writes.
"""

from __future__ import annotations

import csv
import io
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from csm.config import TrainConfig
from csm.frames import FRAME_RATE_HZ, Batch
from csm.generation.audio_files import write_audio
from csm.training.checkpoint import checkpoint_name, checkpoint_step, list_checkpoints, write_pointer
from csm.training.module import CSMModule

TIMING_COLUMNS = ["step", "elapsed_s", "step_s", "frames_per_s", "paused_s"]


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
            with self._clock.pause():
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


class DataPosition(Callback):
    """Keeps where training stands in the data in every checkpoint."""

    def __init__(self, data: LightningDataModule) -> None:
        self._data = data

    def state_dict(self) -> dict[str, Any]:
        return self._data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._data.load_state_dict(state_dict)


class Metrics(Callback):
    """One row a logged step: to metrics.csv, timings.csv, the loggers and the terminal.

    A resumed run drops the rows after its checkpoint, so that every step stands there once.

    Attributes:
        row: the latest value of every column.
        logged_step: the last step whose training loss was logged.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, validation: Validation, clock: Clock, num_codebooks: int) -> None:
        self._config, self._validation, self._clock = config, validation, clock
        self._columns = ["step", "train/loss", "train/c0", "train/depth", "val/loss", "val/c0", "val/depth", "val/eos_recall"]
        self._columns += ["val/false_stop", "lr", "grad_norm", "hours_heard", "skipped", "frames_per_s"]
        self._columns += [f"val/codebook_{k:02d}" for k in range(num_codebooks)]
        self._metrics_csv = Rows(run_dir / "metrics.csv", self._columns) if config.logger.name != "none" else None
        self._timings_csv = Rows(run_dir / "timings.csv", TIMING_COLUMNS) if config.logger.name != "none" else None
        self.row: dict[str, float] = {}
        self.logged_step = -1
        self._since_step = self._since_frames = 0
        self._since_s = self._since_paused_s = 0.0

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._since_step, self._since_frames, self._since_s = module.step, module.num_frames_heard, self._clock.stepping_s
        self._since_paused_s = self._clock.paused_s
        if trainer.is_global_zero:
            for rows in (self._metrics_csv, self._timings_csv):
                if rows is not None:
                    rows.open(keep_until=module.step)

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        is_logged = is_due(module.step, self._config.trainer.log_every, self._config.trainer.max_steps) or module.should_stop
        if not is_logged and not self._validation.metrics:
            return
        row: dict[str, float] = {"step": module.step, **self._validation.metrics}
        timing: dict[str, float] = {}
        if is_logged:
            self.logged_step = module.step
            timing = self._measure(module)
            row |= module.take_window()
            row |= {"lr": module.learning_rate, "grad_norm": module.grad_norm, "skipped": module.num_skipped}
            row["hours_heard"] = module.num_frames_heard / FRAME_RATE_HZ / 3600
            row["frames_per_s"] = timing["frames_per_s"]
        self.row = {**self.row, **row}
        if not trainer.is_global_zero:
            return
        if self._metrics_csv is not None:
            hidden = {"frames_per_s"} if self._config.trainer.deterministic else set()
            self._metrics_csv.append({key: value for key, value in row.items() if key not in hidden})
        if self._timings_csv is not None and timing:
            self._timings_csv.append(timing)
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=module.step)

    def _measure(self, module: CSMModule) -> dict[str, float]:
        now_s, paused_s = self._clock.stepping_s, self._clock.paused_s
        span_s, num_steps = max(now_s - self._since_s, 1e-9), max(1, module.step - self._since_step)
        timing = {
            "step": module.step,
            "elapsed_s": self._clock.elapsed_s,
            "step_s": span_s / num_steps,
            "frames_per_s": (module.num_frames_heard - self._since_frames) / span_s,
            "paused_s": paused_s - self._since_paused_s,
        }
        self._since_step, self._since_frames, self._since_s, self._since_paused_s = module.step, module.num_frames_heard, now_s, paused_s
        return timing


class Rows:
    """A CSV file that grows by one line a row; numbers with seven digits, nothing where a value is missing."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def open(self, keep_until: int) -> None:
        """Start the file, or keep the rows of steps up to `keep_until` of the one that is there."""
        kept: list[dict[str, str]] = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    # A run that was killed may have left half a line; the last step kept is never that line.
                    if (row.get("step") or "").isdigit() and int(row["step"]) <= keep_until:
                        kept.append({column: row.get(column) or "" for column in self.columns})
        text = self._line({column: column for column in self.columns}) + "".join(self._line(row) for row in kept)
        part = self.path.with_suffix(".tmp")
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path)

    def append(self, row: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._line({column: _number(row.get(column)) for column in self.columns}))

    def _line(self, row: dict[str, str]) -> str:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        return text.getvalue()


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value) if isinstance(value, int) else format(value, ".7g")


class SpokenSamples(Callback):
    """Speaks `trainer.sample_texts` every `trainer.sample_every` steps and after the last, into samples/*.wav.

    Args:
        speak: from text, speaker and seed to float32 [S] at 24 kHz.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, speak: Callable[[str, int, int], torch.Tensor], clock: Clock) -> None:
        self._folder, self._config, self._speak, self._clock = run_dir / "samples", config, speak, clock

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        settings = self._config.trainer
        if not trainer.is_global_zero or not is_due(module.step, settings.sample_every, settings.max_steps):
            return
        self._folder.mkdir(exist_ok=True)
        module.eval()
        with self._clock.pause(), torch.no_grad():
            for index, text in enumerate(settings.sample_texts):
                path = self._folder / f"{checkpoint_name(module.step)}_speaker{index}.wav"
                provenance = {"software": "csm-lab", "text": text, "speaker": index, "seed": self._config.seed, "step": module.step}
                write_audio(path, [self._speak(text, index, self._config.seed)], provenance)
                for logger in trainer.loggers:
                    if hasattr(logger, "log_audio"):  # W&B
                        logger.log_audio("samples", [str(path)], step=module.step, caption=[f"[{index}] {text}"])
        module.train()


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


class StopOnSignal(Callback):
    """Ctrl-C or SIGTERM ends the run after the step at hand, saved; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, _: FrameType | None) -> None:
            if module.should_stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            module.should_stop = True
            os.write(sys.stderr.fileno(), b"\nstopping after this step; saving a checkpoint first\n")

        self._before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        if module.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._restore()

    def on_exception(self, trainer: Trainer, module: CSMModule, exception: BaseException) -> None:  # type: ignore[override]
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
