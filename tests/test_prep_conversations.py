"""Recordings without texts become shards by one command: what is in them, and that kills, slices and changes redo only what they must."""

from __future__ import annotations

import io
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


def stage_files(output: Path, *stages: str) -> dict[Path, tuple[int, int]]:
    """Finished files of stages by when and as what they were written: a file that was written anew has another inode."""
    names = stages or ("transcribe", "segment", "filter", "done")
    found = [path for name in names for path in (output / "prep" / name).glob("*.json*") if path.suffix != ".tmp"]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


@pytest.mark.slow
def test_killed_in_every_stage_one_after_the_other_gives_the_same_bytes_and_redoes_nothing_done(recordings, undisturbed, tmp_path):
    """Six runs of one folder, each killed (SIGKILL) as soon as a stage has left something; the seventh ends."""
    output, kept = tmp_path / "out", {}
    for stage, first_trace in (
        ("ingest", "prep/manifest.jsonl"),
        ("transcribe", "prep/transcribe/*"),
        ("segment", "prep/segment/*"),
        ("filter", "prep/filter/*"),
        ("encode", "prep/units/*"),
        ("shard", "train*"),
    ):
        child = subprocess.Popen(command(recordings, output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not any(output.glob(first_trace)) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        # Little is left to do once shards are being linked: on a busy machine that may be over when the kill comes.
        assert child.wait() == -signal.SIGKILL or stage == "shard", f"the kill in {stage} came too late to say anything"
        assert kept.items() <= stage_files(output).items(), f"something done was done again before {stage}"
        kept = stage_files(output)
        assert stage == "ingest" or any(output.glob(first_trace))
    assert run(recordings, output).returncode == 1
    assert content(output) == content(undisturbed)
    assert kept.items() <= stage_files(output).items()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "is_kept", "is_redone"),
    [
        ("diarize.fill_gap_s=0.12", (), ("transcribe",)),
        ("segment.pad_s=0.05", ("transcribe",), ("segment",)),
        ("encode.max_positions=1900", ("transcribe", "segment", "filter"), ("done",)),
    ],
)
def test_a_changed_setting_redoes_its_stage_and_what_follows(change, is_kept, is_redone, recordings, undisturbed, tmp_path):
    one_stage = ["stages=[encode]"] if is_redone == ("done",) else [f"stages=[{is_redone[0]}]"]
    output = tmp_path / "out"
    shutil.copytree(undisturbed, output)
    before = stage_files(output)
    assert run(recordings, output, change, *one_stage).returncode == 0
    after = stage_files(output)
    assert stage_files(output, *is_kept).items() <= before.items() if is_kept else True
    assert all(after[path] != before[path] for path in stage_files(output, *is_redone))


@pytest.mark.slow
def test_a_plain_webdataset_reader_reads_them(undisturbed):
    import webdataset

    shards = sorted(str(path) for path in undisturbed.glob("*/*.tar"))
    read = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert sorted(sample["__key__"] for sample in read) == sorted(meta["id"] for meta in samples(undisturbed).values())
    for sample in read:
        codes, meta = np.load(io.BytesIO(sample["codes.npy"])), json.loads(sample["json"])
        assert codes.dtype == np.int16 and codes.shape[1] == meta["turns"][-1]["frames"][1]


@pytest.mark.slow
def test_one_speakers_recordings_are_one_speaker(recordings, tmp_path):
    root = tmp_path / "anna"
    root.mkdir()
    synthesizer = Synthesizer()
    for number in range(3):
        clip = synthesizer.speak(LINES[number], VOICES[1], random_for(number, "anna", 0)).astype(np.float32) / 32_768
        soundfile.write(root / f"{number}.wav", clip, 24_000)
    done = run(root, tmp_path / "out", "diarize.num_speakers=1", "segment.text=spoken", "encode.first_speaker=2")
    assert done.returncode == 0, done.stderr
    found = samples(tmp_path / "out")
    assert len(found) == 3 and all(turn["speaker"] == 2 for meta in found.values() for turn in meta["turns"])
    assert all(turn["text"] == turn["text"].lower() for meta in found.values() for turn in meta["turns"])
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"train", "validation"}


@pytest.mark.slow
def test_slices_and_single_stages_give_the_same_bytes(recordings, undisturbed, tmp_path):
    output = tmp_path / "out"
    assert run(recordings, output, "stages=[ingest]").returncode == 0
    assert run(recordings, output, "stages=[encode]").returncode == 1  # nothing to encode yet: it says which stages are missing
    assert run(recordings, output, "stages=[transcribe,segment,filter]").returncode == 0
    elsewhere = ["transcribe.device=cuda"]  # where there is none: what only reads what was heard loads no model
    for index in (1, 0):
        assert run(recordings, output, "stages=[encode]", f"slice_index={index}", "slice_count=2", *elsewhere).returncode == 0
    assert run(recordings, output, "stages=[shard]", *elsewhere).returncode == 1
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
            "data.val_split=train",  # which recordings validate goes by their bytes, and those by a machine's arithmetic
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
