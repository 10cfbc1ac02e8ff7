"""What is measured of the steps, and where it is written: metrics.csv, timings.csv and the loggers."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.frames import FRAME_RATE_HZ
from csm.training.callbacks import Clock, Validation, is_due
from csm.training.module import CSMModule

TIMING_COLUMNS = ["step", "elapsed_s", "step_s", "frames_per_s", "paused_s"]


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
        # Not where a signal stops the run: a row there would cut the window, and the resumed run's metrics be others.
        is_logged = is_due(module.step, self._config.trainer.log_every, self._config.trainer.max_steps)
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
