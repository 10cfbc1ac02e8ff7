"""A run that is killed anywhere, or told to stop after any step, ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from csm.codec import SpectralCodec
from csm.text import WordTokenizer
from tests.faults.killed_runs import NUM_CONVERSATIONS, NUM_KILLS, NUM_STEPS, ROWS_A_STEP, outcome, write_data

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable, word_tokenizer: WordTokenizer, small_codec: SpectralCodec
) -> tuple[Path, dict]:
    """A folder with a whole run, one stopped after every step, and killed ones; and what was done to them."""
    work = tmp_path_factory.mktemp("kills")
    write_data(work / "data", write_conversations, word_tokenizer, small_codec)
    command = [sys.executable, "-m", "tests.faults.killed_runs", str(work / "data"), str(work)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return work, json.loads(done.stdout.splitlines()[-1])


def _seen(work: Path, name: str) -> dict[int, list[str]]:
    """The samples of each step; a step that was done again must have seen the same."""
    seen: dict[int, list[str]] = {}
    for line in (work / f"{name}.seen").read_text().splitlines():
        if not line.endswith("]]"):
            continue  # the process was killed while it wrote this line
        step, keys = json.loads(line)
        assert seen.setdefault(step, keys) == keys, f"{name}: step {step} saw other samples the second time"
    return seen


def _assert_every_sample_once_an_epoch(seen: dict[int, list[str]]) -> None:
    steps_an_epoch = NUM_CONVERSATIONS // ROWS_A_STEP
    assert sorted(seen) == list(range(1, NUM_STEPS + 1))
    epochs = [range(first, last) for first, last in pairwise(range(1, NUM_STEPS + 2, steps_an_epoch))]
    assert len(epochs) == NUM_STEPS // steps_an_epoch
    for epoch in epochs:
        keys = [key for step in epoch for key in seen[step]]
        assert len(keys) == len(set(keys)) == NUM_CONVERSATIONS


def test_killed_runs_end_bit_identical_with_every_sample_seen_once_an_epoch(runs: tuple[Path, dict]) -> None:
    work, report = runs
    expected = outcome(work / "whole")
    assert len(report["kills"]) == NUM_KILLS
    for name in sorted({kill["run"] for kill in report["kills"]}):
        got = outcome(work / name)
        assert got.keys() == expected.keys(), name
        assert [path for path in expected if got[path] != expected[path]] == [], name
        seen = _seen(work, name)
        assert seen == _seen(work, "whole")
        _assert_every_sample_once_an_epoch(seen)


def test_kills_hit_the_writing_of_checkpoints_and_leave_no_half_one_behind(runs: tuple[Path, dict]) -> None:
    work, report = runs
    torn = [kill for kill in report["kills"] if any(name.endswith(".tmp") for name in kill["left"])]
    assert len(torn) >= 4, report["kills"]  # of those aimed at writes; how many exactly is the scheduler's choice
    for kill in torn:
        said = (work / f"{kill['run']}.log").read_text()
        for name in (name for name in kill["left"] if name.endswith(".tmp")):
            assert f"checkpoints/{name}: removed, left half written by a run that was killed" in said
    assert not list(work.rglob("*.tmp"))


@pytest.mark.parametrize(("name", "steps_a_stop"), [("stopped", 1), ("stopped_in_step", 2)])
def test_run_stopped_after_every_step_ends_bit_identical(name: str, steps_a_stop: int, runs: tuple[Path, dict]) -> None:
    work, _ = runs
    said = (work / f"{name}.log").read_text()
    assert said.count("stopping after this step; saving a checkpoint first") == NUM_STEPS // steps_a_stop - 1
    assert all(f"step_{step:06d}" in said for step in range(steps_a_stop, NUM_STEPS, steps_a_stop))
    expected, got = outcome(work / "whole"), outcome(work / name)
    # Stops save between the regular checkpoints, so which older ones are kept differs; what both have is the same.
    assert got["metrics.csv"] == expected["metrics.csv"]
    last = f"checkpoints/step_{NUM_STEPS:06d}/"
    assert {path for path in expected if path.startswith(last)} == {path for path in got if path.startswith(last)}
    assert [path for path in set(expected) & set(got) if got[path] != expected[path]] == []
    seen = _seen(work, name)
    assert seen == _seen(work, "whole")
    _assert_every_sample_once_an_epoch(seen)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_run_with_workers_is_bit_identical(num_workers: int, runs: tuple[Path, dict]) -> None:
    work, _ = runs
    name = f"workers_{num_workers}"
    assert outcome(work / name) == outcome(work / "whole")
    assert _seen(work, name) == _seen(work, "whole")
