"""What a run shows in the terminal: one live line, plain lines where nobody watches, and a summary at the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from csm.config import TrainConfig
from csm.training.callbacks import Validation
from csm.training.metrics import Metrics
from csm.training.module import CSMModule

_SPEED_SPAN_S = 600.0  # the time left is told from the steps of the last ten minutes, for one at 1B may take half of one


class ProgressLine(Callback):
    """Step, loss, frames a second, hours of audio heard, time left: live in a terminal, a line a logged row elsewhere."""

    def __init__(self, config: TrainConfig, metrics: Metrics, validation: Validation, console: Console) -> None:
        self._metrics, self._validation, self._console = metrics, validation, console
        self._max_steps = config.trainer.max_steps
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),  # what the others leave
            TextColumn("{task.fields[news]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        # Two refreshes a second: drawing must not take the core that computes.
        self._bar = Progress(*columns, console=console, refresh_per_second=2, speed_estimate_period=_SPEED_SPAN_S, expand=True)
        self._task = self._bar.add_task("", total=self._max_steps, news="starting")

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._bar.reset(self._task, completed=module.step)
        if trainer.is_global_zero and self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        self._bar.update(self._task, completed=module.step)
        if self._validation.metrics:
            self._print(f"step {module.step}: {_validation_news(self._validation.metrics)}")
        if self._metrics.logged_step != module.step:
            return
        news = _news(self._metrics.row)
        self._bar.update(self._task, news=news)
        if not self._console.is_terminal:
            left_s = self._bar.tasks[0].time_remaining
            told = f"  {duration(left_s)} left" if left_s is not None else ""
            self._print(f"step {module.step}/{self._max_steps}  {news}{told}")

    def teardown(self, trainer: Trainer, module: CSMModule, stage: str) -> None:  # type: ignore[override]
        if self._bar.live.is_started:
            self._bar.stop()

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _news(row: dict[str, float]) -> str:
    parts = [f"loss {row['train/loss']:.3f}"] if "train/loss" in row else []
    if "frames_per_s" in row:
        parts.append(f"{row['frames_per_s']:,.0f} frames/s")
    hours = row.get("hours_heard", 0.0)
    return "  ".join([*parts, f"{hours:,.0f} h heard" if hours >= 100 else f"{hours:.2f} h heard"])  # fits 80 columns


def _validation_news(metrics: dict[str, float]) -> str:
    return (
        f"validation loss {metrics['val/loss']:.3f} (c0 {metrics['val/c0']:.3f}, depth {metrics['val/depth']:.3f}), "
        f"EOS heard {metrics['val/eos_recall']:.1%}, stopped too early {metrics['val/false_stop']:.2%}"
    )


def duration(span_s: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(span_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def print_summary(console: Console, rows: list[tuple[str, str]]) -> None:
    """Two aligned columns, left unwrapped so that paths can be copied."""
    width = max(len(name) for name, _ in rows)
    console.print()
    for name, value in rows:
        console.print(f"  {name:<{width}}  {value}", highlight=False, soft_wrap=True, markup=False)
