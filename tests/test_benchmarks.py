"""The benchmarks still run: each with --quick, as a user types it. What they measure is in benchmarks/results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_train_step_compares_both_models_and_writes_its_table(tmp_path: Path) -> None:
    output = tmp_path / "train_step.md"
    arguments = ["--quick", "--threads", "1", "--positions", "200", "--output", str(output)]
    command = [sys.executable, "benchmarks/train_step.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    for part in ("- command: `python benchmarks/train_step.py --quick", "- commit: ", "| ours float32 |", "### Peak memory"):
        assert part in text


@pytest.mark.slow
def test_dataloader_measures_every_part_and_writes_its_table(tmp_path: Path) -> None:
    output = tmp_path / "dataloader.md"
    command = [sys.executable, "benchmarks/dataloader.py", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    for part in (
        "- command: `python benchmarks/dataloader.py --quick",
        "| useful share",
        "| packed rows",
        "| resident memory",
        "| webdataset |",
    ):
        assert part in text


@pytest.mark.slow
def test_checkpoint_measures_every_way_and_writes_its_table(tmp_path: Path) -> None:
    output = tmp_path / "checkpoint.md"
    command = [sys.executable, "benchmarks/checkpoint.py", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    for part in (
        "- command: `python benchmarks/checkpoint.py --quick",
        "| Lightning's",
        "| ours, written in the step",
        "| ours, beside the step |",
    ):
        assert part in text


@pytest.mark.slow
def test_generate_compares_both_models_and_writes_its_table(tmp_path: Path) -> None:
    output = tmp_path / "generate.md"
    command = [sys.executable, "benchmarks/generate.py", "--quick", "--threads", "1", "--batch-sizes", "1", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    for part in (
        "- command: `python benchmarks/generate.py --quick",
        "| transformers float32 |",
        "| ours int8 depth",
        "| demo | 1 | int8, compiled |",
    ):
        assert part in text


@pytest.mark.slow
def test_prep_simulation_accounts_for_every_recording_whatever_fails(tmp_path: Path) -> None:
    """Broken recordings, workers that raise or are killed, a killed driver; the program compares what came out with what was made."""
    output = tmp_path / "prep_simulation.md"
    command = [sys.executable, "benchmarks/prep_simulation.py", "--quick", "--work", str(tmp_path / "work"), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "| recordings, each accounted for exactly once | 300 |" in text
    assert "| recordings at which a worker raised, was killed | 2, 1 |" in text


@pytest.mark.slow
def test_prep_measures_stages_and_the_codec_and_writes_its_table(tmp_path: Path) -> None:
    pytest.importorskip("hibari")
    output = tmp_path / "prep.md"
    command = [sys.executable, "benchmarks/prep.py", "--quick", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    for part in ("- command: `python benchmarks/prep.py --quick", "| transcribe |", "not models**", "| all of 2 s |"):
        assert part in text
