"""A whole evaluation of a small random model on a small corpus, with the real judges."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from rich.console import Console

from csm import CSM
from csm.cli.hydra_entry import compose
from csm.config import EvaluateConfig, ModelConfig, TransformerConfig
from csm.evaluation.runner import evaluate, find_places
from csm.text import tokenizer_from_folder
from tests.browser import DESKTOP, PHONE, ask_page, why_no_browser
from tests.isolation import ROOT

RESULTS = ("summary.json", "summary.md", "samples.jsonl")

SETTINGS = ["max_utterances=2", "temperatures=[0.9]", "top_k=5", "seed=4", "suites.num_dialogues=1", "suites.dialogue_turns=2",
            "suites.naturalness_clips=1", "suites.speed_clips=1", "logger=csv"]  # fmt: skip


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
    folders: list[Path] = []
    for batch_size in (2, 1):
        folder = tmp_path_factory.mktemp("evaluation")
        config = compose("evaluate", [*SETTINGS, f"run={run_folder}", f"output={folder}", f"batch_size={batch_size}"], EvaluateConfig)
        config.compare = [str(other) for other in folders]  # the second beside the first
        if folders:
            config.logger.name, config.logger.mode = "wandb", "offline"
        evaluate(config)
        folders.append(folder)
    wandb.teardown()  # its service is named in the environment: children of later tests would write through it, into other folders
    return folders


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_whatever_the_batch(outputs: list[Path]) -> None:
    for name in RESULTS:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes()


@pytest.mark.slow
def test_killed_half_way_and_started_again_it_ends_with_the_same_table(outputs: list[Path], run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "evaluate.py"), f"run={run_folder}", f"output={tmp_path}", "html=false", *SETTINGS]
    journal = tmp_path / "verdicts.partial.jsonl"
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up_at = time.monotonic() + 240
    while not journal.is_file() or journal.read_bytes().count(b"\n") < 4:
        assert started.poll() is None and time.monotonic() < give_up_at
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.wait()
    num_kept = journal.read_bytes().count(b"\n") - 1
    assert 3 <= num_kept < 10 and not (tmp_path / "summary.json").exists()
    told = io.StringIO()
    config = compose("evaluate", [*SETTINGS, f"run={run_folder}", f"output={tmp_path}", "html=false"], EvaluateConfig)
    evaluate(config, Console(file=told, width=120))
    assert f"going on with {num_kept} clips judged before" in told.getvalue()
    for name in RESULTS:
        assert (tmp_path / name).read_bytes() == (outputs[0] / name).read_bytes()
    assert not journal.exists()


@pytest.mark.slow
def test_summary_has_every_row_and_metric(outputs: list[Path], run_folder: Path) -> None:
    summary = json.loads((outputs[0] / "summary.json").read_text(encoding="utf-8"))
    metrics = summary["metrics"]
    assert summary["checkpoint"] == "checkpoints/step_000003"
    assert str(run_folder) not in json.dumps(summary)
    for suffix in ("_ground_truth", "_resynthesis", "", "_context", "_dialogue"):
        assert set(metrics["wer" + suffix]) == {"value", "low", "high", "n"} and metrics["wer" + suffix]["n"] == 2
        assert "voice_accuracy" + suffix in metrics
    assert metrics["wer_ground_truth"]["value"] < 0.3 < metrics["wer"]["value"]
    assert metrics["eos_rate"]["value"] == 0 and metrics["runaway_rate"]["value"] == 1  # cut clips are counted
    assert metrics["max_duration_ratio"]["value"] > 2
    assert metrics["mel_distance_resynthesis"]["value"] < metrics["mel_distance"]["value"]
    assert metrics["c0_nll"]["value"] == pytest.approx(5.55, abs=0.1)  # ln 257: it knows nothing
    assert [len(values) for values in summary["codebook_nll"].values()] == [8, 8]
    assert all(len(summary["evaluators"][name]["sha256"]) == 64 for name in ("asr", "speaker", "dnsmos"))
    assert summary["evaluators"]["cpwer"].startswith("meeteval ")
    assert metrics["cpwer_dialogue"]["n"] == 1 and [len(values) for values in summary["by_turn"].values()] == [2] * 3
    assert metrics["dnsmos_ground_truth"]["n"] == 1 and 1 < metrics["dnsmos_ground_truth"]["value"] < 5
    assert metrics["c0_nll_context1"]["n"] == 2 and "c0_gain_context_max" in metrics
    assert metrics["eos_expected"]["value"] < 0.5  # it never ends a clip, and its probabilities say so
    assert metrics["words_per_s_ground_truth"]["value"] > 2 and metrics["pause_share_ground_truth"]["value"] >= 0


@pytest.mark.slow
def test_no_suite_is_missing_in_silence(outputs: list[Path]) -> None:
    summary = json.loads((outputs[0] / "summary.json").read_text(encoding="utf-8"))
    unavailable = summary["unavailable"]
    assert {"utmos", "emotion_match", "homographs", "pronunciation", "context_gain with 4 turns"} <= set(unavailable)
    assert "tokenizer cannot say" in unavailable["homographs"] and "suites.emotion=" in unavailable["emotion_match"]
    for page in ("summary.md", "report.html"):
        text = (outputs[0] / page).read_text(encoding="utf-8")
        assert all(name in text for name in unavailable), page
    speed = json.loads((outputs[0] / "speed.json").read_text(encoding="utf-8"))
    assert speed["clips"] == 1 and speed["rtf"]["all"] > 0 and speed["first_audio_s"]["p50"] > 0 and speed["peak_memory_mib"] > 100


@pytest.mark.slow
def test_numbers_clips_and_page_go_to_wandb(outputs: list[Path]) -> None:
    (run,) = outputs[1].glob("wandb/offline-run-*")
    kinds = {path.name: sum(file.is_file() for file in path.rglob("*")) for path in (run / "files/media").iterdir()}
    assert kinds == {"audio": 10, "html": 1, "table": 1}  # two clips of each row


@pytest.mark.slow
def test_every_clip_has_a_line_and_a_file(outputs: list[Path]) -> None:
    lines = [json.loads(line) for line in (outputs[0] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["row"] for line in lines] == ["ground_truth"] * 2 + ["resynthesis"] * 2 + ["model"] * 2 + ["model_context"] * 2 + [
        "model_dialogue"
    ] * 2
    for line in lines:
        assert (outputs[0] / line["wav"]).is_file()
        assert line["hits"] + line["substitutions"] + line["deletions"] == len(line["text"].split())
    assert len({line["seed"] for line in lines if line["row"] == "model"}) == 2


@pytest.mark.slow
def test_report_reaches_for_nothing_outside(outputs: list[Path]) -> None:
    page = (outputs[0] / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/|@import|url\(", re.sub(r'"data:[^"]*"', "", page))
    assert all(value.startswith("data:") for value in re.findall(r'(?:src|href|data-audio)="([^"]+)"', page))
    assert page.count('class="play"') == 2 * 3 + 2 * 3 + 2  # truth, codec, model; question, truth, answer; a dialogue
    assert "Loss while training" in page
    assert len(page) < 8_000_000


@pytest.mark.slow
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_clips_play_and_runs_are_told_apart_in_a_browser(outputs: list[Path], width: int) -> None:
    if (reason := why_no_browser()) is not None:
        pytest.skip(reason)
    page = outputs[1] / "report.html"
    script = """
        let sound;
        const play = window.HTMLMediaElement.prototype.play;
        window.HTMLMediaElement.prototype.play = function () { sound = this; return play.call(this); };
        const button = document.querySelector(".player[data-run='this run'] .play");
        button.click();
        const is_on = button.classList.contains("on"), is_playing = !sound.paused, is_sound = sound.src.startsWith("data:audio/mpeg");
        button.click();
        const visible = () => [...document.querySelectorAll(".player")].filter(p => p.offsetParent !== null).map(p => p.dataset.run || "");
        const all = visible();
        document.querySelectorAll("#runs button")[2].click();
        const one = visible();
        document.querySelectorAll("#runs button")[0].click();
        return {is_on, is_playing, is_sound, is_off: !button.classList.contains("on"), all, one, again: visible().length,
                rows: document.querySelectorAll(".comparison tbody tr").length, wide: document.documentElement.scrollWidth};
    """
    told = ask_page(page, script, width=width)
    other = outputs[0].name
    assert told["is_on"] and told["is_playing"] and told["is_sound"] and told["is_off"]
    assert told["all"].count(other) == told["all"].count("this run") == 6, "two lines alone, two in context, two turns"
    assert set(told["one"]) == {"", other} and told["again"] == len(told["all"])
    assert told["rows"] >= 9 and told["wide"] == width


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
