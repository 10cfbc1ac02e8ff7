"""Who speaks when by pyannote's hub pipeline, run by WhisperX in the prep environment; long recordings in windows that are linked.

The pipeline's weights are gated: accept its licence on the hub and set HF_TOKEN. Where they cannot be had, `load` says what is
missing and gives our own diarizer (`diarize.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from csm.config import DiarizeConfig
from csm.listening.speaker import unit
from csm.reachable import can_reach
from data_prep.diarize import Diarizer, clipped, renumbered
from data_prep.segmentation import RATE_HZ, Activity
from data_prep.transcript import Span, SpeakerSpan

WINDOW_S = 30 * 60  # of one run of the pipeline: its memory grows with length
_SAME_VOICE = 0.5  # cosine of two windows' speakers from which they are one; chosen without measurement, the weights were not at hand

Pipeline = Callable[..., tuple[Any, dict[str, list[float]] | None]]


def load(config: DiarizeConfig, device: str) -> Diarizer:
    """pyannote's pipeline, else ours, with a line on stderr that says why.

    Raises:
        ImportError: outside of the prep environment.
    """
    try:
        from whisperx.diarize import DiarizationPipeline
    except ImportError as error:
        raise ImportError(
            f"diarize.pipeline=pyannote: {error}; run `make prep-env` and use .venv-prep/bin/python, or set diarize.pipeline=ours"
        ) from error
    token = os.environ.get("HF_TOKEN")
    how = f"accept the licence at https://huggingface.co/{config.source} and set HF_TOKEN; or set diarize.source=<folder>"
    try:
        if not (Path(config.source).is_dir() or _is_cached(config.source) or can_reach("huggingface.co")):
            raise OSError("it is not in the hub's cache and huggingface.co cannot be reached")
        return PyannoteDiarizer(config, DiarizationPipeline(config.source, token=token, device=device), config.source)
    except Exception as error:  # pyannote answers a gated model with an AttributeError, others with their own
        print(
            f"diarize.pipeline=pyannote: no {config.source} here ({error}); speakers are found by ours. To have it: {how}", file=sys.stderr
        )
        return Diarizer(config, device)


class PyannoteDiarizer(Diarizer):
    """`Diarizer` over a pipeline that gives a table of spans and a vector a speaker."""

    def __init__(self, config: DiarizeConfig, pipeline: Pipeline, source: str) -> None:
        self.config, self.pipeline, self.source = config, pipeline, source

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on besides the configuration."""
        return {"pipeline": self.source, "version": 2}

    def diarize(self, audio: np.ndarray, speech: Sequence[Span] | None = None, activity: Activity | None = None) -> list[SpeakerSpan]:
        """As `Diarizer.diarize`; `activity` is not looked at, the pipeline has its own."""
        size = WINDOW_S * RATE_HZ
        known: list[np.ndarray] = []  # a vector a speaker of the recording, the sum of its windows'
        spans: list[SpeakerSpan] = []
        for first in range(0, len(audio), size):
            table, vectors = self.pipeline(
                np.ascontiguousarray(audio[first : first + size]),
                num_speakers=self.config.num_speakers or None,
                max_speakers=self.config.max_speakers or None,
                return_embeddings=True,
            )
            names = sorted(set(table["speaker"]))
            numbers = dict(zip(names, self._linked([(vectors or {}).get(name) for name in names], known), strict=True))
            for start_s, end_s, name in zip(table["start"], table["end"], table["speaker"], strict=True):
                spans.append(SpeakerSpan(numbers[name], first / RATE_HZ + float(start_s), first / RATE_HZ + float(end_s)))
        return renumbered(spans if speech is None else clipped(spans, speech))

    def _linked(self, vectors: Sequence[list[float] | None], known: list[np.ndarray]) -> list[int]:
        """The recording's speaker of each of a window's: the known one most like it, each at most once, else a new one."""
        units = [_unit_or_none(vector) for vector in vectors]
        likeness = [
            (float(voice @ unit(total)), index, number)
            for index, voice in enumerate(units)
            for number, total in enumerate(known)
            if voice is not None and total.any()
        ]
        numbers: dict[int, int] = {}
        limit = self.config.max_speakers or self.config.num_speakers
        is_full = bool(limit) and len(known) >= limit
        for value, index, number in sorted(likeness, reverse=True):
            if index not in numbers and number not in numbers.values() and (value >= _SAME_VOICE or is_full):
                numbers[index] = number
        for index, voice in enumerate(units):
            total = np.zeros(1) if voice is None else voice
            if index in numbers:
                known[numbers[index]] = known[numbers[index]] + total
            else:
                numbers[index] = len(known)
                known.append(total)
        return [numbers[index] for index in range(len(units))]


def _unit_or_none(vector: list[float] | None) -> np.ndarray | None:
    """None for a speaker heard too little to have a voice: the pipeline gives zeros or NaN."""
    return None if vector is None or not np.isfinite(vector).all() or not np.any(vector) else unit(np.asarray(vector))


def _is_cached(source: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, "config.yaml"), str)
