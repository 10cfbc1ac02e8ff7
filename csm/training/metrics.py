"""What is measured of the steps, and where it is written: metrics.csv, timings.csv and the loggers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.frames import FRAME_RATE_HZ
from csm.training.callbacks import Clock, Validation, is_due
from csm.training.device import find_peak_tflops, memory_gib
from csm.training.loggers import WandbRecord
from csm.training.module import CSMModule
from csm.training.plan import count_flops
from csm.training.steps import Step
from csm.whole_files import write_text

# What a clock or the machine decides; with trainer.deterministic=true these stay out of metrics.csv.
WALL_CLOCK_COLUMNS = ["frames_per_s", "mfu", "data_wait_share", "memory_gib"]
TIMING_COLUMNS = ["step", "elapsed_s", "step_s", *WALL_CLOCK_COLUMNS, "paused_s"]


class Metrics(Callback):
    """One row a logged step: to metrics.csv, timings.csv, the loggers and the terminal. docs/training.md has every key.

    A resumed run drops the rows after its checkpoint, so that every step stands there once.

    Args:
        num_bad_samples: how many samples of the training split this rank could not use so far.
    Attributes:
        row: the latest value of every column.
        logged_step: the last step whose training loss was logged.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        validation: Validation,
        clock: Clock,
        num_codebooks: int,
        num_bad_samples: Callable[[], int] = lambda: 0,
    ) -> None:
        self._config, self._validation, self._clock, self._num_bad_samples = config, validation, clock, num_bad_samples
        self._columns = ["step", "train/loss", "train/c0", "train/depth", "val/loss", "val/c0", "val/depth", "val/eos_recall"]
        self._columns += ["val/false_stop", "lr", "grad_norm", "hours_heard", "useful_share", "skipped", "bad_samples"]
        self._columns += WALL_CLOCK_COLUMNS
        self._columns += [f"{part}/codebook_{k:02d}" for part in ("train", "val") for k in range(num_codebooks)]
        self._metrics_csv = Rows(run_dir / "metrics.csv", self._columns) if config.logger.name != "none" else None
        self._timings_csv = Rows(run_dir / "timings.csv", TIMING_COLUMNS) if config.logger.name != "none" else None
        self.row: dict[str, float] = {}
        self.logged_step = -1
        self._peak_tflops = config.trainer.peak_tflops
        self._speed = _Speed(config, clock)

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        if trainer.is_global_zero:
            if self._peak_tflops is None and self._metrics_csv is not None:
                self._peak_tflops = find_peak_tflops(module.device, self._config.trainer.precision)
            kept: list[dict[str, str]] = []
            if self._timings_csv is not None and self._metrics_csv is not None:
                self._timings_csv.open(keep_until=module.step)
                kept = self._metrics_csv.open(keep_until=module.step)
            for logger in trainer.loggers:
                if isinstance(logger, WandbRecord):
                    logger.begin(kept)
        self._speed.start(module)

    def on_train_batch_start(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        self._speed.count_wait()

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: CSMModule, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        self._speed.count_step(batch)
        # Not where a signal stops the run: a row there would cut the window, and the resumed run's metrics be others.
        is_logged = is_due(module.step, self._config.trainer.log_every, self._config.trainer.max_steps)
        if is_logged or self._validation.metrics:
            self._log(trainer, module, is_logged)
        self._speed.begin_wait()

    def _log(self, trainer: Trainer, module: CSMModule, is_logged: bool) -> None:
        row: dict[str, float] = {"step": module.step, **self._validation.metrics}
        timing: dict[str, float] = {}
        if is_logged:
            self.logged_step = module.step
            timing = self._speed.measure(module, self._peak_tflops)
            row |= module.take_window()
            row |= {"lr": module.learning_rate, "grad_norm": module.grad_norm, "skipped": module.num_skipped}
            num_bad = torch.tensor(self._num_bad_samples(), device=module.device)
            row["bad_samples"] = int(trainer.strategy.reduce(num_bad, reduce_op="sum"))
            row["hours_heard"] = module.num_frames_heard / FRAME_RATE_HZ / 3600
            row |= {name: timing[name] for name in WALL_CLOCK_COLUMNS if name in timing}
        self.row = {**self.row, **row}
        if not trainer.is_global_zero:
            return
        if self._metrics_csv is not None:
            hidden = WALL_CLOCK_COLUMNS if self._config.trainer.deterministic else []
            self._metrics_csv.append({key: value for key, value in row.items() if key not in hidden})
        if self._timings_csv is not None and timing:
            self._timings_csv.append(timing)
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=module.step)


class _Speed:
    """Times the steps between two logged rows, pauses (validation, samples, checkpoints) left out."""

    def __init__(self, config: TrainConfig, clock: Clock) -> None:
        self._clock = clock
        self._num_depth_codebooks = config.model.num_codebooks - 1
        self._flops = count_flops(config.model, config.data.seq_len, 1.0)

    def start(self, module: CSMModule) -> None:
        self._since_step, self._since_frames = module.step, module.num_frames_heard
        self._since_s, self._since_paused_s = self._clock.stepping_s, self._clock.paused_s
        self._waited_s = self._flops_done = 0.0
        self.begin_wait()

    def begin_wait(self) -> None:
        self._waits_since_s = self._clock.stepping_s

    def count_wait(self) -> None:
        """The loader has delivered."""
        self._waited_s += self._clock.stepping_s - self._waits_since_s

    def count_step(self, step: Step) -> None:
        """The model's operations in this rank's part of a step: padding included, recomputation not."""
        num_picked = step.num_depth_targets / self._num_depth_codebooks
        self._flops_done += step.num_positions * self._flops.backbone + num_picked * self._flops.depth

    def measure(self, module: CSMModule, peak_tflops: float | None) -> dict[str, float]:
        """The row of timings.csv, and begin the next."""
        span_s, num_steps = max(self._clock.stepping_s - self._since_s, 1e-9), max(1, module.step - self._since_step)
        timing = {
            "step": module.step,
            "elapsed_s": self._clock.elapsed_s,
            "step_s": span_s / num_steps,
            "frames_per_s": (module.num_frames_heard - self._since_frames) / span_s,
            "data_wait_share": self._waited_s / span_s,
            "memory_gib": memory_gib(module.device),
            "paused_s": self._clock.paused_s - self._since_paused_s,
        }
        if peak_tflops is not None:
            timing["mfu"] = self._flops_done / span_s / (peak_tflops * 1e12)
        self.start(module)
        return timing


class Rows:
    """A CSV file that grows by one line a row; numbers with seven digits, nothing where a value is missing."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def open(self, keep_until: int) -> list[dict[str, str]]:
        """Start the file, or keep the rows of steps up to `keep_until` of the one that is there; returns those.

        Columns that a file of an older version lacks stay empty in its rows.
        """
        kept: list[dict[str, str]] = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    # A run that was killed may have left half a line; the last step kept is never that line.
                    if (row.get("step") or "").isdigit() and int(row["step"]) <= keep_until:
                        kept.append({column: row.get(column) or "" for column in self.columns})
        text = self._line({column: column for column in self.columns}) + "".join(self._line(row) for row in kept)
        write_text(self.path, text)
        return kept

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
