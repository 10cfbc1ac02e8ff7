"""Runs side by side: paired differences known beforehand, and what cannot be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from csm.evaluation.compare import differences, read_runs
from tests.test_evaluation_report import verdict

HEADER = {"split": "heldout", "data_digest": "d", "rows": [{"name": "model", "title": "Model, greedy", "source": "model"}]}


def write_run(folder: Path, verdicts, header=HEADER) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation/summary.json").write_text(json.dumps(header), encoding="utf-8")
    lines = "".join(json.dumps(v.as_json() | {"new_in_a_later_version": 1}) + "\n" for v in verdicts)
    (folder / "evaluation/samples.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_differences_are_of_the_same_lines(tmp_path: Path) -> None:
    there = [verdict(key=f"{i}", substitutions=1) for i in range(4)] + [replace(verdict(key="other text"), text="one")]
    (run,) = read_runs([str(write_run(tmp_path / "older", there))])
    here = [verdict(key=f"{i}") for i in range(3)] + [verdict(key="other text", substitutions=3), verdict(key="only here")]
    found = {difference.metric: difference for difference in differences(HEADER, here, run, seed=0)}
    wer = found["WER"]
    assert (wer.here, wer.there, wer.by.n) == (0.0, pytest.approx(1 / 3), 3)
    assert wer.by.value == wer.by.low == wer.by.high == pytest.approx(-1 / 3) and wer.smaller_is_better
    again = {
        d.metric: d.by for d in differences(HEADER, [replace(v, voice_similarity=v.voice_similarity + 1e-6) for v in here], run, seed=0)
    }
    assert again["Similarity"].low == again["Similarity"].high == 0, "what samples.jsonl rounds off is no difference"
    assert found["Mel distance"].by.value == 0 and "DNSMOS" not in found


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [verdict()], HEADER | {"data_digest": "e"})
    with pytest.raises(ValueError, match="was evaluated on data_digest 'e', this run on 'd'"):
        differences(HEADER, [verdict()], read_runs([str(run)])[0], seed=0)
    with pytest.raises(FileNotFoundError, match=r"holds no evaluation .* run `python evaluate.py run="):
        read_runs([str(tmp_path)])
    with pytest.raises(ValueError, match="a name of its own"):
        read_runs([str(run), str(write_run(tmp_path / "x/a", [verdict()]))])
    assert read_runs([str(run / "evaluation")])[0].name == "a"
