"""`csm generate` typed as a user types it: files, folders, pipes, terminals; each a process of its own."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.generation.audio_files import read_provenance
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "csm.cli.commands", "generate"]
SHORT = ["--max-duration", "0.8", "--seed", "5", "--threads", "1"]


def run(checkpoint: Path, *more: str, **options) -> subprocess.CompletedProcess:
    command = [*COMMAND, "--checkpoint", str(checkpoint), *SHORT, *more]
    return subprocess.run(command, capture_output=True, timeout=120, cwd=ROOT, **options)


def test_a_batch_with_options_of_its_own_in_each_line(speaking_checkpoint, tmp_path):
    lines = [
        {"text": "one two", "out": "a.flac", "max_duration_s": 0.4},
        {"text": "three", "out": "deep/b.wav", "seed": 8, "speaker": 2, "stop_loops": True, "trim_silence": True},
        {"text": "four", "temperature": 0, "min_duration_s": 0.8},
    ]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    done = run(speaking_checkpoint, "--batch", str(tmp_path / "lines.jsonl"), "--out-dir", str(tmp_path / "spoken"))
    assert done.returncode == 0, done.stderr
    written = {path.relative_to(tmp_path / "spoken").as_posix() for path in (tmp_path / "spoken").rglob("*.*")}
    assert written == {"a.flac", "deep/b.wav", "00003.wav"}
    assert soundfile.info(tmp_path / "spoken" / "a.flac").duration == pytest.approx(0.4)
    noted = read_provenance(tmp_path / "spoken" / "deep" / "b.wav")
    assert (noted["seed"], noted["speaker"], noted["weights"], noted["synthetic"]) == (8, 2, "float32", True)
    assert b"(3 files)" in done.stderr and b"RTF" in done.stderr
    single = run(speaking_checkpoint, "--text", "three", "--seed", "8", "--speaker", "2", "--out", str(tmp_path / "b.wav"))
    assert single.returncode == 0
    assert np.array_equal(soundfile.read(tmp_path / "b.wav")[0], soundfile.read(tmp_path / "spoken" / "deep" / "b.wav")[0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_speech_is_the_same_file_and_int8_is_noted(speaking_checkpoint, tmp_path):
    for name, more in (("eager", []), ("compiled", ["--compile"]), ("int8", ["--compile", "--int8"])):
        done = run(speaking_checkpoint, "--text", "one two", "--out", str(tmp_path / f"{name}.wav"), *more)
        assert done.returncode == 0, done.stderr
    sound = {name: soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("eager", "compiled", "int8")}
    assert np.array_equal(sound["eager"], sound["compiled"]) and sound["int8"].shape == sound["eager"].shape
    assert read_provenance(tmp_path / "int8.wav")["weights"] == "int8"


def test_raw_sound_flows_before_the_reply_is_over(speaking_checkpoint):
    command = [*COMMAND, "--checkpoint", str(speaking_checkpoint), *SHORT, "--max-duration", "8", "--text", "one", "--stream", "--out", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, bufsize=0) as process:
        assert process.stdout is not None
        first = process.stdout.read(1000)
        is_running = process.poll() is None
        rest, report = process.communicate(timeout=120)
    assert process.returncode == 0 and is_running
    assert len(first) + len(rest) == 100 * 1920 * 2 and b"first sound after" in report


def test_a_listener_that_goes_away_ends_it_quietly(speaking_checkpoint):
    command = [*COMMAND, "--checkpoint", str(speaking_checkpoint), *SHORT, "--max-duration", "8", "--text", "one", "--out", "-"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1000)
        process.stdout.close()
        report = process.stderr.read()
        process.wait(timeout=120)
    assert process.returncode == 1 and b"Traceback" not in report


@pytest.mark.parametrize("is_batch", [False, True])
def test_a_terminal_sees_frames_and_real_time_factor(speaking_checkpoint, tmp_path, is_batch):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    what = (
        ["--batch", str(tmp_path / "lines.jsonl"), "--out-dir", str(tmp_path)]
        if is_batch
        else ["--text", "one", "--out", str(tmp_path / "a.wav")]
    )
    ours, theirs = pty.openpty()
    options = dict(cwd=ROOT, timeout=120, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    done = subprocess.run([*COMMAND, "--checkpoint", str(speaking_checkpoint), *SHORT, *what], stderr=theirs, **options)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done.returncode == 0
    assert "/10 frames" in shown and "RTF" in shown


def test_flags_that_do_not_go_together_cost_one_line(speaking_checkpoint, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "file").write_text("")
    lines = str(tmp_path / "lines.jsonl")
    for more, message in (
        (["--text", "one", "--out", "a.wav", "--int8"], b"--int8 needs --compile"),
        (["--text", "one", "--out", "a.wav", "--min-duration", "2"], b"--min-duration 2 is more than --max-duration 0.8"),
        (["--text", "one", "--out", str(tmp_path)], b"is a folder; name a .wav"),
        (["--batch", lines, "--out-dir", str(tmp_path / "file")], b"is a file; with --batch name a folder"),
        (["--batch", lines, "--out-dir", "-"], b"goes with neither --out - nor --stream"),
    ):
        done = run(speaking_checkpoint, *more)
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
