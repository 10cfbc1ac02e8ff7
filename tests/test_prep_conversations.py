"""Recordings without texts become shards by one command: what is in them, and that kills, slices and changes redo only what they must."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.listening.asr import find_packaged_whisper
from data_prep.script import VOICES
from data_prep.synthesis import Synthesizer, random_for
from tests.test_prep_engine import ROOT, content

LINES = [
    "please say seven four two",
    "seven four two nine three",
    "what is the number",
    "the number is three three one",
    "thank you",
    "you said zero nine eight",
]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three conversations of two voices, a call with a channel a speaker, and what cannot be used."""
    root, synthesizer = tmp_path_factory.mktemp("calls"), Synthesizer()
    (root / "more calls").mkdir()
    for number in range(4):
        tracks: list[list[np.ndarray]] = [[], []]
        for index in range(4):
            voice = VOICES[(0, 3)[index % 2]] if number % 2 else VOICES[(1, 2)[index % 2]]
            clip = synthesizer.speak(LINES[(index + number) % 6], voice, random_for(number, "calls", index)).astype(np.float32) / 32_768
            clip = np.concatenate([np.zeros(14_400, np.float32), clip])
            for speaker in range(2):
                tracks[speaker].append(clip if index % 2 == speaker else np.zeros_like(clip))
        stereo = np.stack([np.concatenate(track) for track in tracks], axis=1)
        stereo += np.random.default_rng(number).normal(0, 3e-4, stereo.shape).astype(np.float32)
        name = root / ("more calls/call 3.flac" if number == 3 else f"call {number}.wav")
        soundfile.write(name, stereo if number == 3 else stereo.sum(axis=1), 24_000)
    soundfile.write(root / "noise.wav", np.random.default_rng(0).normal(0, 0.05, 72_000), 24_000)
    (root / "broken.mp3").write_bytes(b"no sound at all")
    return root


def command(recordings: Path, output: Path, *more: str) -> list[str]:
    settings = [f"transcribe.model={find_packaged_whisper()}", "transcribe.language=en", "num_workers=1", "unit_min=0.2", "val_share=0.25"]
    return [sys.executable, "-m", "data_prep", "prep=offline", f"input={recordings}", f"output={output}", *settings, *more]


def run(recordings: Path, output: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(recordings, output, *more), cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def undisturbed(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "out"
    done = run(recordings, output)
    assert done.returncode == 1, done.stderr  # two files were dropped for faults of their own
    return output


def samples(output: Path) -> dict[str, dict]:
    """Every sample's JSON by its source."""
    found = {}
    for path in sorted(output.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    meta = json.load(tar.extractfile(member))
                    found[meta["source"]] = meta
    return found


@pytest.mark.slow
def test_who_said_what_when_is_in_the_shards(undisturbed):
    found = samples(undisturbed)
    assert set(found) == {"call 0.wav", "call 1.wav", "call 2.wav", "more calls/call 3.flac"}
    for source, meta in found.items():
        turns = meta["turns"]
        assert [turn["speaker"] for turn in turns] == [0, 1, 0, 1], (source, [(turn["speaker"], turn["text"]) for turn in turns])
        assert meta["language"] == "en" and meta["id"].endswith("-" + meta["id"].split("-")[-1])
        for turn in turns:
            assert turn["words"] and all(-0.2 <= word["start_s"] < word["end_s"] for word in turn["words"])
            assert {"snr_db", "speech_share", "bandwidth_hz", "clipping", "asr_log_probability", "asr_compression"} <= set(turn["quality"])
            assert turn["learn"] == {"c0": True, "depth": True} and turn["emotion"] is None and turn["backchannel"] is False
            assert turn["frames"][1] - turn["frames"][0] == pytest.approx((turn["end_s"] - turn["start_s"]) * 12.5, abs=1.01)
    text = " ".join(turn["text"].lower() for meta in found.values() for turn in meta["turns"])
    assert "number" in text and "thank you" in text


@pytest.mark.slow
def test_what_was_dropped_is_named_with_its_stage_and_reason(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "failures.jsonl").read_text().splitlines()]
    assert [(row["source"], row["stage"], row["reason"]) for row in rows] == [
        ("broken.mp3", "manifest", "not_audio"),
        ("noise.wav", "segment", "no_speech"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["transcribe", "segment", "filter", "units"])
def test_killed_in_a_stage_and_run_again_gives_the_same_bytes_and_redoes_nothing_done(stage, recordings, undisturbed, tmp_path):
    output = tmp_path / "out"
    child = subprocess.Popen(command(recordings, output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any((output / "prep" / stage).glob("*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = {path: path.stat().st_mtime_ns for path in (output / "prep").glob("*/*.jsonl")}
    assert before and not (output / "train").exists(), "the kill came too late to say anything"
    assert run(recordings, output).returncode == 1
    assert content(output) == content(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
def test_slices_and_single_stages_give_the_same_bytes(recordings, undisturbed, tmp_path):
    output = tmp_path / "out"
    assert run(recordings, output, "stages=[ingest]").returncode == 0
    assert run(recordings, output, "stages=[encode]").returncode == 1  # nothing to encode yet: it says which stages are missing
    assert run(recordings, output, "stages=[transcribe,segment,filter]").returncode == 0
    for index in (1, 0):
        assert run(recordings, output, "stages=[encode]", f"slice_index={index}", "slice_count=2").returncode == 0
    assert run(recordings, output, "stages=[shard]").returncode == 1
    assert content(output) == content(undisturbed)


@pytest.mark.slow
def test_another_threshold_hears_nothing_anew(recordings, undisturbed, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    heard = {path: path.stat().st_mtime_ns for path in (output / "prep").glob("*/*.jsonl") if path.parent.name in ("transcribe", "segment")}
    assert run(recordings, output, "filter.max_words_per_s=0.5").returncode == 1
    assert {path: path.stat().st_mtime_ns for path in heard} == heard
    assert samples(output) == {}
    rows = [json.loads(line) for line in (output / "failures.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in rows if row["stage"] == "filter"} == {"words_per_s"}
    assert {row["reason"]: row["turn"] for row in rows}["words_per_s"] >= 0


@pytest.mark.slow
def test_the_trainer_trains_from_them(undisturbed, tmp_path):
    told = subprocess.run(
        [sys.executable, "train.py", "data=shards", f"data.path={undisturbed}", "text=bytes", "model.text_vocab_size=258"]
        + [
            f"run_dir={tmp_path / 'run'}",
            "trainer.max_steps=2",
            "trainer.validate_every=0",
            "data.rows_per_batch=1",
            "trainer.precision=32",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoints" / "last.txt").is_file()


def test_words_that_nobody_knows_yet_are_no_tokenizer(recordings, tmp_path):
    told = run(recordings, tmp_path / "out", "text=words")
    assert told.returncode == 2 and "text.source" in told.stderr and "Traceback" not in told.stderr
