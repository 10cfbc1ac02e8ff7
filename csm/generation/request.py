"""What is asked for and what came of it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from csm.frames import Turn
from csm.generation.guards import LoopGuard
from csm.generation.prompt import max_frames_from_duration, min_frames_from_duration
from csm.generation.sampling import MAX_SEED, check_sampling


@dataclass(kw_only=True)
class Request:
    """One thing to say.

    Attributes:
        text: what to say. speaker: the number in front of it.
        context: turns heard before, oldest first, each with audio or codes.
        max_duration_s: where a reply without an end is cut.
        temperature: 0 is greedy. top_k: 0 keeps every code.
        seed: equal seeds give equal speech; None draws one, which `GeneratedCodes.seed` tells.
        min_duration_s: no end before; 0 leaves it to the model.
        trim_silence: cut the silence at the end, but for 0.1 s.
        stop_loops: end a reply that goes round in circles; see `guards.LoopGuard`.
    """

    text: str
    speaker: int = 0
    context: Sequence[Turn] = ()
    max_duration_s: float = 10.0
    temperature: float = 0.9
    top_k: int = 50
    seed: int | None = None
    min_duration_s: float = 0.0
    trim_silence: bool = False
    stop_loops: bool = False

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k)
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed!r}: expected a whole number from 0 to {MAX_SEED}")
        if self.min_frames > self.max_frames:
            raise ValueError(f"min_duration_s={self.min_duration_s} is more than max_duration_s={self.max_duration_s}")

    @property
    def max_frames(self) -> int:
        return max_frames_from_duration(self.max_duration_s)

    @property
    def min_frames(self) -> int:
        return min_frames_from_duration(self.min_duration_s)

    def guard(self) -> LoopGuard | None:
        return LoopGuard() if self.stop_loops else None


@dataclass
class GeneratedCodes:
    """What a request became.

    Attributes:
        codes: int64 [F, K], without the EOS frame.
        reached_eos: false for a runaway, which was cut at `max_duration_s`, or by the guard.
        seed: that gives these codes again.
        num_dropped_turns: oldest context turns that did not fit the window.
        is_loop: whether the guard ended it.
    """

    codes: Tensor
    reached_eos: bool
    seed: int
    num_dropped_turns: int
    is_loop: bool = False

    @staticmethod
    def of(request: Request, codes: Tensor, num_dropped_turns: int, *, is_loop: bool) -> GeneratedCodes:
        reached_eos = not is_loop and codes.shape[0] < request.max_frames
        return GeneratedCodes(codes, reached_eos, request.seed or 0, num_dropped_turns, is_loop)


def as_request(request: Request | Mapping[str, Any], index: int) -> Request:
    """A request from its arguments; `index` is for the message."""
    if isinstance(request, Request):
        return replace(request)
    try:
        return Request(**request)
    except TypeError as error:
        raise ValueError(f"request {index}: {error}; expected the arguments of Generator.generate") from error
