"""A tensor made again in the backward pass, where it is cheap to make and large to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Recipe:
    """Makes a tensor when its first reader asks, and forgets it when its last has it."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._made: Tensor | None = None
        self._num_to_come = 0
        self.num_readers = 0

    def read(self) -> Tensor:
        if self._made is None:
            self._made, self._num_to_come = self._make(), self.num_readers
        made = self._made
        self._num_to_come -= 1
        if not self._num_to_come:
            self._made = None
        return made


@contextmanager
def remade_for_backward(tensor: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Inside, operations that would keep `tensor` or a view of all of it for their backward pass keep `make` instead.

    Args:
        tensor: contiguous.
        make: gives the same values in the same shape; what it holds is kept.
    """
    recipe, storage = _Recipe(make), tensor.untyped_storage()._cdata

    def pack(kept: Tensor) -> Tensor | torch.Size:
        if kept.untyped_storage()._cdata != storage:
            return kept
        recipe.num_readers += 1
        return kept.shape

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return kept if isinstance(kept, Tensor) else recipe.read().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
