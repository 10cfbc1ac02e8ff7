"""The real command, from recordings to a run: an adapter learns sounds that the base never heard, in a voice of its own number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_command_learns_recordings_and_says_where_everything_is(speaking_checkpoint: Path, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    time_s = np.arange(24_000) / 24_000
    for index in range(24):
        tone = np.sin(6.28 * (150 + 8 * index) * time_s[: 14_000 + 400 * index]).astype(np.float32) * 0.3
        soundfile.write(recordings / f"{index:02d}.wav", tone, 24_000)
        (recordings / f"{index:02d}.txt").write_text(("one two", "three four")[index % 2] + "\n", encoding="utf-8")
    run_dir = tmp_path / "run"
    command = [sys.executable, "finetune.py", f"base={speaking_checkpoint}", f"data={recordings}", f"run_dir={run_dir}"]
    command += [
        "val_share=0.2",
        "data.seq_len=64",
        "data.rows_per_batch=2",
        "trainer.precision=32",
        "trainer.max_steps=40",
        "trainer.num_threads=1",
    ]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    summary = json.loads((run_dir / "finetune.json").read_text(encoding="utf-8"))
    before, after = summary["nats"]["new"]["base"], summary["nats"]["new"]["result"]
    assert after["c0"] < 0.9 * before["c0"] and after["depth"] < before["depth"]
    assert f"csm generate --checkpoint {run_dir} --speaker 4" in done.stdout
    check = [sys.executable, "benchmarks/adapter_check.py", str(run_dir)]
    done = subprocess.run(check, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["adapter_parameters"] == summary["adapter_parameters"] and found["num_logits"] > 1000
    for other in ("merged_vs_unmerged", "checkpoint_vs_unmerged", "peft_vs_unmerged_c0"):
        assert found[other] < 1e-5 * max(1.0, found["largest_logit"]), found
