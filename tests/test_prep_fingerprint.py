"""Copies are found whatever their bytes, the first stays and is named, and what only resembles it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from csm.config import PrepConfig
from data_prep.fingerprint import Copies, fingerprint
from data_prep.manifest import Recording
from data_prep.turns import prepare_turns

RATE_HZ = 24_000


def spoken(seed: int, duration_s: float = 4.0) -> np.ndarray:
    """[S] of what fingerprints hear in speech: harmonics of a gliding pitch under formants that change five times a second."""
    random = np.random.default_rng(seed)
    steps = int(duration_s * 5) + 2
    time_s = np.arange(round(duration_s * RATE_HZ)) / RATE_HZ

    def glide(low: float, high: float) -> np.ndarray:
        return np.interp(time_s * 5, np.arange(steps), random.uniform(low, high, steps))

    pitch = glide(90, 220)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE_HZ
    first, second = glide(300, 800), glide(900, 2_200)
    sound = np.zeros_like(time_s)
    for number in range(1, 25):
        hz = number * pitch
        strength = np.exp(-(((hz - first) / 150) ** 2)) + 0.5 * np.exp(-(((hz - second) / 200) ** 2)) + 0.02
        sound += strength * np.sin(number * phase)
    return (0.1 * sound * (0.3 + glide(0, 1)) + random.normal(0, 1e-4, len(time_s))).astype(np.float32)


def recording(path: Path) -> Recording:
    return Recording(path.name, path.name, 1, soundfile.info(path).duration)


def changed(path: Path, sound: np.ndarray) -> Path:
    """The sound as its file's name says."""
    name = path.stem
    if name == "quiet":
        soundfile.write(path, 0.25 * sound, RATE_HZ)
    elif name == "telephone":
        soundfile.write(path, soxr.resample(sound, RATE_HZ, 8_000), 8_000)
    elif name == "cut":
        soundfile.write(path, sound[9_777:], RATE_HZ)
    elif name == "stereo":
        soundfile.write(path, np.stack([sound, 0.8 * sound], axis=1), RATE_HZ)
    elif name == "noisy":
        soundfile.write(path, sound + np.random.default_rng(9).normal(0, sound.std() / 100, len(sound)), RATE_HZ)
    else:
        soundfile.write(path, sound, RATE_HZ)
    return path


@pytest.mark.parametrize("name", ["quiet.wav", "telephone.wav", "cut.wav", "stereo.wav", "noisy.wav", "copy.mp3", "copy.ogg", "copy.flac"])
def test_a_copy_is_found_and_the_first_is_named(tmp_path: Path, name: str) -> None:
    sound = spoken(0)
    first, copy = changed(tmp_path / "first.wav", sound), changed(tmp_path / name, sound)
    copies = Copies(lambda recording: fingerprint(tmp_path / recording.source))
    for seed in range(1, 6):  # others that are looked up beside it
        other = changed(tmp_path / f"other{seed}.wav", spoken(seed))
        words = fingerprint(other)
        assert words is not None and copies.first_like(recording(other), words) is None
    for path, expected in ((first, None), (copy, "first.wav")):
        words = fingerprint(path)
        assert words is not None
        found = copies.first_like(recording(path), words)
        assert (found and found.source) == expected


def test_what_is_no_copy_stays(tmp_path: Path) -> None:
    """The same beginning with another end (a jingle), the half of it, the same twice, and 10 dB of noise."""
    sound, other = spoken(0, 8.0), spoken(1, 8.0)
    clips = {
        "first": sound,
        "jingle": np.concatenate([sound[: 5 * RATE_HZ], other[5 * RATE_HZ :]]),
        "half": sound[: 4 * RATE_HZ],
        "twice": np.concatenate([sound, sound]),
        "faster": soxr.resample(sound, 25_000, RATE_HZ),
    }
    copies = Copies(lambda recording: fingerprint(tmp_path / recording.source))
    for name, clip in clips.items():
        soundfile.write(tmp_path / f"{name}.wav", clip, RATE_HZ)
        words = fingerprint(tmp_path / f"{name}.wav")
        assert words is not None
        assert copies.first_like(recording(tmp_path / f"{name}.wav"), words) is None, name


def test_silence_and_very_short_sounds_have_no_fingerprint(tmp_path: Path) -> None:
    for name, sound in {"silence": np.zeros(3 * RATE_HZ), "short": spoken(0, 0.5)}.items():
        soundfile.write(tmp_path / f"{name}.wav", sound, RATE_HZ)
        assert fingerprint(tmp_path / f"{name}.wav") is None
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    assert fingerprint(tmp_path / "broken.wav") is None


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_manifest_keeps_the_first_in_its_order(tmp_path: Path, num_workers: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for seed, names in {0: ("b.wav", "a.mp3"), 1: ("c.wav", "d.flac"), 2: ("e.wav",)}.items():
        for name in names:
            soundfile.write(folder / name, spoken(seed), RATE_HZ)
            (folder / name).with_suffix(".txt").write_text(f"text {seed}")
    config = PrepConfig(name="turns", input=str(folder), output=str(tmp_path / "out"), num_workers=num_workers, stages=["manifest"])
    assert prepare_turns(config) == 0
    kept = [json.loads(line)["source"] for line in (tmp_path / "out/prep/manifest.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["a.mp3", "c.wav", "e.wav"]
    rows = [json.loads(line) for line in (tmp_path / "out/prep/failures-manifest.jsonl").read_text().splitlines()]
    assert [(row["source"], row["reason"], row["detail"]) for row in rows] == [
        ("b.wav", "duplicate", "the same sound as a.mp3"),
        ("d.flac", "duplicate", "the same sound as c.wav"),
    ]
    config.duplicates = "bytes"
    assert prepare_turns(config) == 0
    assert len((tmp_path / "out/prep/manifest.jsonl").read_text().splitlines()) == 5
