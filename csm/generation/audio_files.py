"""Sound on disk: reading prompts, and writing speech with a note of where it came from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ

FORMATS = {".wav": "WAV", ".flac": "FLAC"}


def read_audio(path: Path, *, resample: bool = True) -> tuple[Tensor, int]:
    """Read a file as mono float32 [S] and its sample rate; channels are averaged.

    Args:
        resample: to 24 kHz; otherwise the samples come as they are.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no audio, empty, cut short or not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with soundfile.SoundFile(path) as file:
            sample_rate, num_expected = file.samplerate, file.frames
            samples = file.read(dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.LibsndfileError, RuntimeError, OSError) as error:
        raise ValueError(f"{path}: not a sound file that can be read ({error}); expected WAV, FLAC, OGG or MP3") from error
    if samples.shape[0] == 0:
        raise ValueError(f"{path}: no samples in it")
    if samples.shape[0] < num_expected:
        raise ValueError(f"{path}: {samples.shape[0]} samples, its header says {num_expected}; the file was cut short, copy it again")
    if not np.isfinite(samples).all():
        raise ValueError(f"{path}: samples that are not finite (NaN or infinite); export it again")
    if resample and sample_rate != SAMPLE_RATE_HZ:
        samples, sample_rate = soxr.resample(samples, sample_rate, SAMPLE_RATE_HZ), SAMPLE_RATE_HZ
    return torch.from_numpy(np.ascontiguousarray(samples)), sample_rate


def format_of(path: Path) -> str:
    """The format a file name asks for.

    Raises:
        ValueError: if it is neither .wav nor .flac.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected a name that ends in .wav or .flac")
    return FORMATS[path.suffix.lower()]


def write_audio(path: Path, chunks: Iterable[Tensor], provenance: Mapping[str, object]) -> int:
    """Write 24 kHz mono chunks, float32 [S] each, as 16-bit WAV or FLAC as they come; returns the samples written.

    The file gets its name when it is whole. What made it stands in its comment, as JSON.
    """
    file_format = format_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    num_samples = 0
    try:
        with soundfile.SoundFile(part, "w", SAMPLE_RATE_HZ, 1, subtype="PCM_16", format=file_format) as file:
            # Before the samples: behind them a WAV reader may not look for it.
            file.comment = json.dumps(dict(provenance))
            file.software = str(provenance.get("software", "csm-lab"))
            for chunk in chunks:
                file.write(pcm16(chunk))
                num_samples += chunk.shape[0]
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return num_samples


def read_provenance(path: Path) -> dict[str, object]:
    """What `write_audio` noted; empty when there is no note of ours."""
    with soundfile.SoundFile(path) as file:
        try:
            noted = json.loads(file.comment)
        except json.JSONDecodeError:
            return {}
    return noted if isinstance(noted, dict) else {}


def pcm16(waveform: Tensor) -> np.ndarray:
    """16-bit samples of float32 [S]; what is louder than full scale is clipped."""
    return (waveform.clamp(-1.0, 1.0) * 32767.0).round().to(torch.int16).numpy()
