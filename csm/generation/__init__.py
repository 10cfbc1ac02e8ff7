"""Speaking: sampling, the cached frame loop, prompts, sessions, the watermark, voice presets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from csm.generation.decoding import DepthLoop, FrameDecoder, FrameLoop, decode_frames, iterate_frames

if TYPE_CHECKING:
    from csm.generation.generator import GeneratedCodes, Generator, Request
    from csm.generation.session import Session

__all__ = [
    "DepthLoop",
    "FrameDecoder",
    "FrameLoop",
    "GeneratedCodes",
    "Generator",
    "Request",
    "Session",
    "decode_frames",
    "iterate_frames",
]


def __getattr__(name: str) -> Any:
    """`Generator` and its kin, imported when asked for: they bring codec and watermark, which the bare loop does not need."""
    if name in ("GeneratedCodes", "Generator", "Request", "Session"):
        from importlib import import_module

        return getattr(import_module("csm.generation.session" if name == "Session" else "csm.generation.generator"), name)
    raise AttributeError(f"module 'csm.generation' has no attribute {name!r}")
