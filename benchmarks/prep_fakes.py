"""Recordings and models for prep_simulation.py: half a second each, heard by models that make up two words; and planned misfortunes.

A module of its own, for worker processes import it when they are sent a `SimulatedListening`. What is replaced is what costs minutes
an hour of audio (decoding and levels, segmentation network, Whisper, voices); everything between is what users run.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import data_prep.engine
import data_prep.stages
from csm.codec import SpectralCodec
from csm.frames import SAMPLE_RATE_HZ
from data_prep.failures import Rejected
from data_prep.ingest import Ingested
from data_prep.planning import uniform
from data_prep.segmentation import RATE_HZ
from data_prep.stages import Listening
from data_prep.transcript import Segment, Span, SpeakerSpan, Transcript, Word

RATE, NUM_SAMPLES = 8_000, 4_000
A_FOLDER = 1_000  # recordings in a folder
# What is wrong with a recording, its share, and the stage and reason that failures.jsonl must name.
KINDS = {
    "empty": (0.002, "manifest", "empty"),
    "text": (0.002, "manifest", "not_audio"),
    "truncated": (0.002, "manifest", "truncated"),
    "duplicate": (0.002, "manifest", "duplicate"),
    "silent": (0.002, "ingest", "silent"),
    "nobody": (0.01, "segment", "no_speech"),
}
_CALM = 1e-6  # of the fake activity: where nobody speaks
SPENT: Counter[str] = Counter()  # CPU seconds in sound and models, by what they were spent on


def source_of(index: int) -> str:
    return f"{index // A_FOLDER:04d}/{index:07d}.wav"


def kind_of(index: int) -> str | None:
    """What is wrong with recording `index`; None is a good one."""
    place = uniform(0, "kind", str(index))
    for kind, (share, _, _) in KINDS.items():
        if place < share:
            return kind if index or kind != "duplicate" else None
        place -= share
    return None


def write_recordings(root: Path, num_recordings: int) -> None:
    """Write those that are not there; all differ, but for the duplicates."""
    noise = np.random.default_rng(0).integers(96, 160, NUM_SAMPLES, dtype=np.uint8).tobytes()
    for index in range(num_recordings):
        path = root / source_of(index)
        if index % A_FOLDER == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            done = {entry.name for entry in os.scandir(path.parent)}
        if path.name not in done:
            path.write_bytes(_bytes_of(index, noise))


def _bytes_of(index: int, noise: bytes) -> bytes:
    kind = kind_of(index)
    if kind == "duplicate":
        return _bytes_of(next(other for other in range(index - 1, -1, -1) if kind_of(other) is None), noise)
    if kind == "text":
        return f"this is no sound but text number {index}\n".encode() * 4
    sound = b"" if kind == "empty" else bytes([128]) * NUM_SAMPLES if kind == "silent" else noise
    note = b"note" + _u32(8) + index.to_bytes(8, "little")  # no two files have the same bytes by accident
    form = b"fmt " + _u32(16) + b"\1\0\1\0" + _u32(RATE) + _u32(RATE) + b"\1\0\x08\0"
    content = b"WAVE" + form + note + b"data" + _u32(len(sound)) + sound
    whole = b"RIFF" + _u32(len(content)) + content
    return whole[: -len(sound) // 2] if kind == "truncated" else whole


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "little")


def plan_misfortunes(folder: Path, num_recordings: int, num_errors: int, num_kills: int) -> None:
    """A file each for recordings at which a worker is to raise, or to be killed, once."""
    folder.mkdir(parents=True)
    good = [index for index in range(num_recordings) if kind_of(index) is None]
    chosen = np.random.default_rng(1).choice(good, num_errors + num_kills, replace=False)
    for place, index in enumerate(chosen):
        (folder / source_of(int(index)).replace("/", "-")).write_text("raise" if place < num_errors else "kill")


@dataclass
class SimulatedListening(Listening):
    """Puts the fakes in place in every process that it reaches."""

    misfortunes: Path | None = None

    def __post_init__(self) -> None:
        install()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        install()


class _Transcriber:
    settings = {"whisper": "fake"}

    def transcribe(self, audio: np.ndarray, activity: float) -> Transcript:
        duration_s = len(audio) / RATE_HZ
        if activity == _CALM:
            return Transcript()
        words = [Word(" hello", 0.02, duration_s / 2, 0.9), Word(" there", duration_s / 2, duration_s - 0.02, 0.9)]
        return Transcript(None, 0.0, "en", 0.99, [Span(0.01, duration_s - 0.01)], [Segment(words, 0.01)])


class _Diarizer:
    settings = {"speaker": "fake"}

    def diarize(self, audio: np.ndarray, speech: list[Span], activity: float) -> list[SpeakerSpan]:
        half_s = len(audio) / RATE_HZ / 2
        return [SpeakerSpan(0, 0.01, half_s), SpeakerSpan(1, half_s, 2 * half_s - 0.01)]


def install() -> None:
    """Replace the models, once a process."""
    stages, transcribe = data_prep.stages, data_prep.stages._transcribe
    if getattr(transcribe, "is_simulated", False):
        return
    now: dict[str, bool] = {}

    def with_misfortunes(recording: Any, root: Path, listening: SimulatedListening) -> dict[str, Any]:
        if listening.misfortunes is not None:
            _meet(listening.misfortunes / recording.source.replace("/", "-"))
        now["is_calm"] = kind_of(int(Path(recording.source).stem)) == "nobody"
        return transcribe(recording, root, listening)

    with_misfortunes.is_simulated = True  # type: ignore[attr-defined]
    replaced: dict[str, Any] = {
        "_transcribe": with_misfortunes,
        "_transcriber": lambda config: _Transcriber(),
        "_diarizer": lambda config, device: _Diarizer(),
        "local_activity": lambda audio, device: _CALM if now["is_calm"] else 1.0,
    }
    for name, value in replaced.items():
        setattr(stages, name, value)
    stages.ingest = _ingest
    data_prep.engine.ingest = _ingest


def _ingest(path: Path, config: object, *, by_channel: bool = False, channel: int | None = None) -> Ingested:
    """A file's samples, three for one, without a level; there is one channel."""
    audio, _ = soundfile.read(path, dtype="float32")
    if not audio.any():
        raise Rejected("silent", "nothing in it")
    return Ingested(np.repeat(audio, SAMPLE_RATE_HZ // RATE)[None], 0.0, [0.0])


def _meet(misfortune: Path) -> None:
    try:
        what = misfortune.read_text()
        misfortune.unlink()
    except FileNotFoundError:
        return
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RuntimeError(f"planned for {misfortune.name}")


def count_time() -> None:
    """Let sound and models count their CPU seconds in `SPENT`; the rest of a run's is the engine's."""
    install()
    for module, name in (
        (data_prep.stages, "ingest"),
        (data_prep.engine, "ingest"),
        (SpectralCodec, "encode"),
        (data_prep.stages.quality, "turn_quality"),
        (data_prep.stages.quality, "background_db"),
        (data_prep.stages.quality, "noise_level_db"),
        (data_prep.stages.soxr, "resample"),
    ):
        setattr(module, name, _timed(name, getattr(module, name)))


def _timed(name: str, function: Callable) -> Callable:
    def timed(*arguments: Any, **options: Any) -> Any:
        begun_s = time.thread_time()
        try:
            return function(*arguments, **options)
        finally:
            SPENT[name] += time.thread_time() - begun_s

    return timed
