"""How one code is drawn from its logits: temperature, top-k with ties kept, and noise that belongs to the row.

Every random number is a function of (seed, frame, codebook), counted, never of what was drawn before or of who else is in
the batch. So a row speaks the same alone and among others, and a streamed clip equals the clip made at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**63 - 1
_BELOW_ONE = 1.0 - 2.0**-22  # keeps uniform * total below total after rounding to float32


def uniform_noise(seed: int, num_frames: int, num_codebooks: int) -> Tensor:
    """Numbers in [0, 1), float32 [num_frames, num_codebooks]: the noise of one row.

    Counter-based (Philox keyed by the seed), so the first frames do not depend on `num_frames`.
    """
    stream = np.random.Generator(np.random.Philox(key=seed))
    return torch.from_numpy(stream.random((num_frames, num_codebooks), dtype=np.float32) * np.float32(_BELOW_ONE))


def sample_topk(logits: Tensor, uniforms: Tensor | None, temperature: float, top_k: int) -> Tensor:
    """Draw one code a row. Temperature first, then top-k; codes that tie with the k-th stay in.

    Args:
        logits: [B, V], float.
        uniforms: float32 [B] in [0, 1); unused, and may be None, when greedy.
        temperature: 0 is greedy: the highest logit, the first of equals.
        top_k: 0 keeps all V.
    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    assert uniforms is not None
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        kth = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < kth, -math.inf)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)  # [B, V]
    # The first code whose cumulative share is above the number drawn; a code without a share is never first.
    return (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1)


class Sampler:
    """Draws the codes of a batch, the noise of every (frame, codebook, row) laid out beforehand on the device.

    Args:
        seeds: one a row.
        max_frames: frames that can be drawn.
        min_frames: before that many, codebook 0 is never 0, so that no frame is EOS. (Of Mimi's codes, one cannot come then.)
    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        max_frames: int,
        num_codebooks: int,
        *,
        temperature: float,
        top_k: int,
        min_frames: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_sampling(temperature, top_k)
        self.min_frames = min_frames
        self.num_codebooks = num_codebooks
        self.temperature = temperature
        self.top_k = top_k
        self._noise: list[list[Tensor | None]] = []
        self._frames: list[Tensor] = []
        if temperature > 0:
            rows = [uniform_noise(seed, max_frames, num_codebooks) for seed in seeds]
            noise = torch.stack(rows, dim=-1).to(device)  # [F, K, B]
            self._frames = list(noise.unbind(0))
            self._noise = [list(frame.unbind(0)) for frame in self._frames]  # views; indexing a tensor costs more than a list
        else:
            self._noise = [[None] * num_codebooks] * max_frames

    def draw(self, logits: Tensor, frame: int, codebook: int) -> Tensor:
        """Codes int64 [B] from logits [B, V]."""
        if codebook == 0 and self.forbids_eos(frame):
            logits = logits.clone()
            logits[:, 0] = -math.inf
        return sample_topk(logits, self._noise[frame][codebook], self.temperature, self.top_k)

    def forbids_eos(self, frame: int) -> bool:
        return frame < self.min_frames

    def noise_of_frame(self, frame: int) -> Tensor | None:
        """Float32 [K, B], contiguous; None when greedy."""
        return self._frames[frame] if self._frames else None

    def with_noise(self, noise: Tensor, *, forbids_eos: bool) -> Sampler:
        """The same settings for one frame whose noise [K, B] is read from a buffer that is filled later."""
        other = copy(self)
        other.min_frames = int(forbids_eos)
        if self.temperature > 0:
            other._frames, other._noise = [noise], [list(noise.unbind(0))]
        return other


def check_sampling(temperature: float, top_k: int) -> None:
    """Refuse settings that mean nothing."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature={temperature}: expected 0 (greedy) or a positive number, such as 0.9")
    if top_k != int(top_k) or top_k < 0:
        raise ValueError(f"top_k={top_k}: expected a whole number from 0 (0 keeps every code)")
