"""What is done about a step whose numbers are wrong: a loss or gradient that is not finite, or far above the steps before.

The numbers judged are those of all ranks, so that every rank decides alike without another exchange, and they are judged
before the weights move: a skipped step leaves weights and optimizer state as they were. What is kept of the past is plain
numbers, saved in every checkpoint, so that a resumed run judges as the uninterrupted one would have.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from csm.config import SpikeConfig

MAX_CONSECUTIVE_SKIPS = 5  # more in a row are no bad batch but a run that went wrong
_MAX_SHOWN = 8  # samples named in a message


@dataclass
class StepNumbers:
    """What a step is judged by, over all ranks.

    Attributes:
        step: counted from 1, as in metrics.csv.
        loss, c0, depth: of all micro-batches.
        grad_norm: of the whole gradient, before clipping.
    """

    step: int
    loss: float
    c0: float
    depth: float
    grad_norm: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)

    def __str__(self) -> str:
        return f"step {self.step}: gradient norm {self.grad_norm:.4g} (loss {self.loss:.4g}, c0 {self.c0:.4g}, depth {self.depth:.4g})"


class StepGuard:
    """Judges every step and counts the ones that were dropped.

    Args:
        config: what a spike is, and what is done about it.
        on_non_finite: "stop" or "skip".
        say: prints a line, once for all ranks.
    Attributes:
        num_skipped: steps dropped so far.
        num_spikes: steps so far that were spikes, whatever was done about them.
    """

    def __init__(self, config: SpikeConfig, on_non_finite: str, say: Callable[[str], None]) -> None:
        self._config, self._on_non_finite, self._say = config, on_non_finite, say
        self.num_skipped = self.num_spikes = 0
        self._consecutive_skips = 0
        self._losses: deque[float] = deque(maxlen=config.window)  # of the steps learnt from
        self._grad_norms: deque[float] = deque(maxlen=config.window)

    def lets_pass(self, numbers: StepNumbers, name_samples: Callable[[], str]) -> bool:
        """Whether the step may move the weights.

        Args:
            name_samples: the samples to look at; called only for a step that is not as the others, on every rank.
        Raises:
            ValueError: when the run is to stop.
        """
        if not numbers.is_finite:
            return self._drop(f"not finite: {numbers}", self._on_non_finite, "trainer.on_non_finite", name_samples)
        spike = self._find_spike(numbers)
        if spike is not None:
            self.num_spikes += 1
            found = f"spike, {spike}: {numbers}"
            if self._config.action != "warn":
                return self._drop(found, self._config.action, "spikes.action", name_samples)
            self._say(f"{found}; learnt from all the same; {name_samples()}")
        if self._config.action != "off":
            self._losses.append(numbers.loss)
            self._grad_norms.append(numbers.grad_norm)
        self._consecutive_skips = 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_skipped": self.num_skipped,
            "num_spikes": self.num_spikes,
            "consecutive_skips": self._consecutive_skips,
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_skipped, self.num_spikes = state["num_skipped"], state["num_spikes"]
        self._consecutive_skips = state["consecutive_skips"]
        self._losses.extend(state["losses"])
        self._grad_norms.extend(state["grad_norms"])

    def _find_spike(self, numbers: StepNumbers) -> str | None:
        """How the step stands out, in words; None when it does not, or too few are known to say."""
        config = self._config
        if config.action == "off" or len(self._losses) < max(2, config.window // 2):
            return None
        if config.loss_sigmas > 0:
            mean, deviation = statistics.fmean(self._losses), statistics.stdev(self._losses)
            if numbers.loss > mean + config.loss_sigmas * deviation:
                return f"loss {numbers.loss:.4g} against {mean:.4g} +- {deviation:.2g} over {len(self._losses)} steps"
        if config.norm_ratio > 0:
            median = statistics.median(self._grad_norms)
            if numbers.grad_norm > config.norm_ratio * median:
                return f"gradient norm {numbers.grad_norm:.4g} against a median of {median:.4g} over {len(self._grad_norms)} steps"
        return None

    def _drop(self, found: str, action: str, key: str, name_samples: Callable[[], str]) -> bool:
        self.num_skipped += 1
        self._consecutive_skips += 1
        samples = name_samples()
        if action == "skip" and self._consecutive_skips <= MAX_CONSECUTIVE_SKIPS:
            self._say(f"skipped, {found}; {samples}")
            return False
        repeated = f"{self._consecutive_skips} steps in a row, the last " if self._consecutive_skips > 1 else ""
        advice = "lower optim.lr, look at these samples, or go on from the last checkpoint with resume=auto"
        raise ValueError(f"{repeated}{found}; {samples}; {advice}" + (f" {key}=skip" if action == "stop" else ""))


def describe_samples(keys: Sequence[str]) -> str:
    """The first samples by key, and how many more there are."""
    if not keys:
        return "samples: not known"
    more = f" and {len(keys) - _MAX_SHOWN} more" if len(keys) > _MAX_SHOWN else ""
    return f"samples: {', '.join(keys[:_MAX_SHOWN])}{more}"
