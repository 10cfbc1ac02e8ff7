"""What one optimizer step eats: its micro-batches, and how many targets they hold together.

Counting before the step is what lets every micro-batch divide by the step's count, so that splitting a batch changes
nothing. The stream of steps runs over epochs without a seam; where it stands is the data module's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from csm.frames import PADDING_DOCUMENT, Batch
from csm.loss import count_targets


@dataclass
class Step:
    """The micro-batches of one optimizer step on this rank.

    Attributes:
        num_c0_targets, num_depth_targets: what `csm_loss` will learn from in all of them.
        num_frames: audio frames, EOS rows not counted.
        num_useful, num_positions: positions of the rows that are not padding, and all of them.
    """

    batches: list[Batch]
    num_c0_targets: int
    num_depth_targets: int
    num_frames: int
    num_useful: int
    num_positions: int

    def to(self, device: torch.device | str) -> Step:
        return replace(self, batches=[batch.to(device) for batch in self.batches])

    @property
    def keys(self) -> list[str]:
        """The samples inside, for messages."""
        return [key for batch in self.batches for key in batch.keys or []]


class StepLoader:
    """Groups a loader's batches into steps. Sized, or Lightning would fetch one ahead and a resume would be off by one.

    Args:
        batches: an epoch of batches each time it is iterated.
        num_steps: called when iteration starts: the steps still to do.
    """

    def __init__(self, batches: Iterable[Batch], *, accumulate: int, amortization: float, num_steps: Callable[[], int]) -> None:
        self._batches, self._accumulate, self._amortization, self._num_steps = batches, accumulate, amortization, num_steps

    def __len__(self) -> int:
        return self._num_steps()

    def __iter__(self) -> Iterator[Step]:
        stream = self._endless()
        for _ in range(self._num_steps()):
            batches = [next(stream) for _ in range(self._accumulate)]
            counts = [count_targets(batch, self._amortization) for batch in batches]
            yield Step(
                batches,
                num_c0_targets=sum(c0 for c0, _ in counts),
                num_depth_targets=sum(depth for _, depth in counts),
                num_frames=sum(batch.num_frames for batch in batches),
                num_useful=sum(int((batch.document_ids != PADDING_DOCUMENT).sum()) for batch in batches),
                num_positions=sum(batch.document_ids.numel() for batch in batches),
            )

    def _endless(self) -> Iterator[Batch]:
        while True:
            is_empty = True
            for batch in self._batches:
                is_empty = False
                yield batch
            if is_empty:
                raise ValueError("the training split has no batch: give data.path more conversations, or fewer data.rows_per_batch")
