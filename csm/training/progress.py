"""What a run shows in the terminal: one live line, plain lines where nobody watches, and a summary at the end."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from csm.config import TrainConfig
from csm.training.callbacks import Clock, Validation
from csm.training.metrics import Metrics
from csm.training.module import CSMModule


class ProgressLine(Callback):
    """Step, loss, frames a second, hours of audio heard, time left."""

    def __init__(self, config: TrainConfig, metrics: Metrics, validation: Validation, clock: Clock, console: Console) -> None:
        self._config, self._metrics, self._validation, self._clock, self._console = config.trainer, metrics, validation, clock, console
        self._bar: Progress | None = None
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._first_step = module.step
        if trainer.is_global_zero and self._console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[news]}"))
            # Two refreshes a second: drawing must not take the core that computes.
            self._bar = Progress(*columns, console=self._console, refresh_per_second=2)
            self._bar.start()
            self._bar.add_task("", total=self._config.max_steps, completed=module.step, news="")

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        if not trainer.is_global_zero:
            return
        is_news = self._metrics.logged_step == module.step
        if self._validation.metrics:
            self._console.print(f"step {module.step}: {_validation_news(self._validation.metrics)}", highlight=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=module.step)
            if is_news:
                self._bar.update(self._bar.task_ids[0], news=self._news(module))
        elif is_news:
            self._console.print(f"step {module.step}/{self._config.max_steps}  {self._news(module)}", highlight=False, soft_wrap=True)

    def teardown(self, trainer: Trainer, module: CSMModule, stage: str) -> None:  # type: ignore[override]
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _news(self, module: CSMModule) -> str:
        row = self._metrics.row
        done = max(1, module.step - self._first_step)
        left_s = self._clock.elapsed_s / done * (self._config.max_steps - module.step)
        parts = [f"loss {row['train/loss']:.3f}"] if "train/loss" in row else []
        if "frames_per_s" in row:
            parts.append(f"{row['frames_per_s']:,.0f} frames/s")
        parts.append(f"{row.get('hours_heard', 0.0):.2f} h heard")
        return "  ".join([*parts, f"{duration(left_s)} left"])


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
