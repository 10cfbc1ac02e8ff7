"""The watermark benchmark still runs, as a user types it; what it measures is in benchmarks/results/watermark.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_watermark_benchmark_searches_marked_and_clean_clips_and_writes_its_table(demo_corpus_small, tmp_path):
    pytest.importorskip("av", reason="pip install -e '.[eval]'")
    output = tmp_path / "watermark.md"
    arguments = ["--quick", "--data", str(demo_corpus_small), "--output", str(output)]
    command = [sys.executable, "benchmarks/watermark.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    text = output.read_text(encoding="utf-8")
    assert "- command: `python benchmarks/watermark.py --quick" in text and text.count("| none (16-bit) | 4 |") == 2
