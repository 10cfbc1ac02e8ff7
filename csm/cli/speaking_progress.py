"""What `csm generate` says on stderr: a live line while it speaks, and a line at the end. Stdout may carry sound."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from csm.generation.generator import Generator


class Progress:
    """A live line on stderr, where that is a terminal: frames so far and the real-time factor."""

    def __init__(self, max_frames: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self.first_sound_s: float | None = None
        self._started_s = time.perf_counter()
        console = Console(stderr=True)
        count = TextColumn("{task.completed:.0f}/{task.total:.0f} frames")
        columns = (TextColumn("speaking"), BarColumn(), count, TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=max_frames)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, num_frames: int, *, num_rows: int = 1) -> None:
        """Frames made so far, of each of `num_rows` replies."""
        from csm.frames import seconds_from_frames

        factor = (time.perf_counter() - self._started_s) / max(seconds_from_frames(num_frames * num_rows), 1e-9)
        self._bar.update(self._task, completed=num_frames, description=f"RTF {factor:.2f}")

    def watch(self, chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        from csm.frames import SAMPLES_PER_FRAME

        num_samples = 0
        for chunk in chunks:
            if self.first_sound_s is None:
                self.first_sound_s = time.perf_counter() - self._started_s
            num_samples += chunk.shape[0]
            self.show(num_samples // SAMPLES_PER_FRAME)
            yield chunk


def print_report(name: str, generator: Generator, num_samples: int, elapsed_s: float, first_sound_s: float | None) -> None:
    """One line on stderr: stdout may carry sound."""
    from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

    spoken_s = num_samples / SAMPLE_RATE_HZ
    parts = [f"{round(num_samples / SAMPLES_PER_FRAME)} frames", f"{spoken_s:.2f} s of speech in {elapsed_s:.2f} s"]
    if spoken_s:
        parts.append(f"RTF {elapsed_s / spoken_s:.2f}")
    if first_sound_s is not None:
        parts.append(f"first sound after {first_sound_s:.2f} s")
    if generator.last is not None:
        parts.append(f"seed {generator.last.seed}")
        if generator.last.num_dropped_turns:
            parts.append(f"{generator.last.num_dropped_turns} old turns dropped")
        if not generator.last.reached_eos:
            parts.append("cut: it went round in circles" if generator.last.is_loop else "cut: the model did not end by itself")
    print(f"{'stdout' if name == '-' else name}: {', '.join(parts)}, watermark {generator.watermark_name}", file=sys.stderr)
