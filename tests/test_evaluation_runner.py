"""A whole evaluation of a small random model on a small corpus, with the real judges."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from csm import CSM
from csm.cli.hydra_entry import compose
from csm.config import EvaluateConfig, ModelConfig, TransformerConfig
from csm.evaluation.runner import evaluate, find_places
from csm.text import tokenizer_from_folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, demo_corpus_small: Path) -> Path:
    """A run whose model says noise: its frames never end, so every clip is cut."""
    run = tmp_path_factory.mktemp("runs") / "noise"
    checkpoint = run / "checkpoints" / "step_000003"
    checkpoint.mkdir(parents=True)
    shape = TransformerConfig(num_layers=1, width=32, num_heads=2, num_kv_heads=1, ffn_width=32)
    CSM(ModelConfig(backbone=shape, depth_decoder=shape), seed=0).save_pretrained(checkpoint)
    tokenizer_from_folder(demo_corpus_small).save(checkpoint)
    shutil.copytree(demo_corpus_small / "codec", checkpoint / "codec")
    (run / "checkpoints" / "last.txt").write_text("step_000003\n", encoding="utf-8")
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": str(demo_corpus_small)}}), encoding="utf-8")
    (run / "metrics.csv").write_text("step,train/c0,train/depth,val/c0,val/depth\n1,5,4,,\n2,4,3,4,3\n", encoding="utf-8")
    return run


@pytest.fixture(scope="module")
def outputs(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same evaluation twice, in other batches."""
    folders = []
    for batch_size in (2, 1):
        folder = tmp_path_factory.mktemp("evaluation")
        settings = {"max_utterances": 2, "temperatures": [0.9], "top_k": 5, "seed": 4, "html": batch_size == 2}
        evaluate(EvaluateConfig(run=str(run_folder), output=str(folder), batch_size=batch_size, **settings))
        folders.append(folder)
    return folders


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_whatever_the_batch(outputs: list[Path]) -> None:
    for name in ("summary.json", "samples.jsonl"):
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.slow
def test_summary_has_every_row_and_metric(outputs: list[Path], run_folder: Path) -> None:
    summary = json.loads((outputs[0] / "summary.json").read_text(encoding="utf-8"))
    metrics = summary["metrics"]
    assert summary["checkpoint"] == "checkpoints/step_000003"
    assert str(run_folder) not in json.dumps(summary)
    for suffix in ("_ground_truth", "_resynthesis", "", "_context"):
        assert set(metrics["wer" + suffix]) == {"value", "low", "high", "n"} and metrics["wer" + suffix]["n"] == 2
        assert "voice_accuracy" + suffix in metrics
    assert metrics["wer_ground_truth"]["value"] < 0.3 < metrics["wer"]["value"]
    assert metrics["eos_rate"]["value"] == 0 and metrics["runaway_rate"]["value"] == 1  # cut clips are counted
    assert metrics["max_duration_ratio"]["value"] > 2
    assert metrics["mel_distance_resynthesis"]["value"] < metrics["mel_distance"]["value"]
    assert metrics["c0_nll"]["value"] == pytest.approx(5.55, abs=0.1)  # ln 257: it knows nothing
    assert [len(values) for values in summary["codebook_nll"].values()] == [8, 8]
    assert all(len(summary["evaluators"][name]["sha256"]) == 64 for name in ("asr", "speaker"))


@pytest.mark.slow
def test_every_clip_has_a_line_and_a_file(outputs: list[Path]) -> None:
    lines = [json.loads(line) for line in (outputs[0] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["ground_truth"] * 2 + ["resynthesis"] * 2 + ["model"] * 2 + ["model_context"] * 2
    for line in lines:
        assert (outputs[0] / line["wav"]).is_file()
        assert line["hits"] + line["substitutions"] + line["deletions"] == len(line["text"].split())
    assert len({line["seed"] for line in lines if line["row"] == "model"}) == 2


@pytest.mark.slow
def test_report_reaches_for_nothing_outside(outputs: list[Path]) -> None:
    page = (outputs[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", re.sub(r'"data:[^"]*"', "", page))
    assert all(value.startswith("data:") for value in re.findall(r'(?:src|href|data-audio)="([^"]+)"', page))
    assert page.count('class="play"') == 2 * 3 + 2 * 3  # truth, codec, model; question, truth, answer
    assert "Loss while training" in page
    assert len(page) < 8_000_000


def test_places_are_found_from_the_run_or_refused(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = run_folder / "checkpoints" / "step_000003"
    for start in (run_folder, checkpoint):
        places = find_places(EvaluateConfig(run=str(start)))
        assert (places.checkpoint, places.run, places.output) == (checkpoint, run_folder, run_folder / "evaluation")
    lonely = tmp_path / "lonely"
    shutil.copytree(checkpoint, lonely)
    with pytest.raises(ValueError, match="data_path=<folder of shards>"):
        find_places(EvaluateConfig(run=str(lonely)))
    with pytest.raises(FileNotFoundError):
        find_places(EvaluateConfig(run=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="temperatures"):
        evaluate(EvaluateConfig(run=str(run_folder), temperatures=[]))


def test_the_data_of_an_evaluation_is_given_on_the_command_line(run_folder: Path) -> None:
    config = compose("evaluate", [f"run={run_folder}", "data_path=elsewhere"], EvaluateConfig)
    assert config.data_path == "elsewhere" and find_places(config).data == Path("elsewhere")
