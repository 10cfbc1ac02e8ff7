"""From nothing to a voice, by the README's commands on a smaller budget: corpus, training, evaluation, generation.

The bound is not the demo's: two fifths of its steps on a fifth of its strings, where words are still being learnt and rounding alone
(another processor, another number of threads) moves the word error rate by a factor of two. What it must show is that every part
is the real one: a model that had not learnt to speak, a codec that had not learnt to sound or an evaluation that had not
listened would miss it by far (untrained, the word error rate is about 100%).
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from csm.config import EvaluateConfig
from csm.evaluation.metrics import count_word_errors
from csm.evaluation.suites import SINGLE, read_suites
from csm.listening.asr import Recogniser
from csm.listening.speaker import SpeakerEncoder, VoiceBook

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS = 750
MAX_WER = 0.50  # greedy, held-out strings; 15 to 36% by seed and machine after 800 steps, 19% in float32 after 600

pytestmark = pytest.mark.slow


def run(*command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """One thread, for other tests run beside; the timeout is there for what hangs, a machine half as fast as the slowest seen fits."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == expect, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, trained in two sittings and evaluated."""
    folder = tmp_path_factory.mktemp("e2e")
    data, run_dir = folder / "data", folder / "run"
    run("-m", "data_prep", "prep=demo", f"output={data}", "num_train_strings=600", "num_heldout_strings=8", "num_phases=8")
    overrides = [
        f"data.path={data}",
        f"run_dir={run_dir}",
        f"trainer.max_steps={NUM_STEPS}",
        "trainer.num_threads=1",
        "trainer.checkpoint_every=375",
        "trainer.validate_every=375",
        "trainer.sample_every=375",
        "trainer.sample_texts=[seven four two]",
        "optim.lr=2e-3",
    ]
    run("train.py", *overrides)
    run("evaluate.py", f"run={run_dir}", "temperatures=[0.0]")
    return run_dir


def test_held_out_digits_are_understood_by_a_real_recogniser(learnt: Path) -> None:
    metrics = json.loads((learnt / "evaluation/summary.json").read_text())["metrics"]
    value = {name: estimate["value"] for name, estimate in metrics.items()}
    assert value["wer_ground_truth"] <= 0.02
    assert value["wer_resynthesis"] <= 0.03
    assert value["wer"] <= MAX_WER, value
    assert value["voice_accuracy"] >= 0.8, value  # 94% when written; one in four by chance
    assert value["voice_accuracy_context"] >= 0.8, value
    assert value["eos_rate"] >= 0.9, value
    assert metrics["wer"]["n"] == 32  # 8 strings in 4 voices


def test_run_folder_holds_what_the_design_names(learnt: Path) -> None:
    with open(learnt / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {"step", "train/loss", "train/c0", "train/depth", "val/c0", "val/depth", "frames_per_s"} <= rows[0].keys()
    assert int(rows[-1]["step"]) == NUM_STEPS
    assert float(rows[-1]["val/c0"]) < 2.0
    for name in ("config.yaml", "environment.json", "timings.csv", "evaluation/report.html", "evaluation/samples.jsonl"):
        assert (learnt / name).stat().st_size > 0
    assert len(list((learnt / "samples").glob("*.wav"))) == 2


def test_command_line_speaks_and_its_mark_is_found(learnt: Path, tmp_path: Path) -> None:
    wav = tmp_path / "said.wav"
    arguments = ["generate", "--checkpoint", str(learnt), "--text", "seven four two", "--speaker", "1", "--seed", "3", "--out", str(wav)]
    run("-m", "csm.cli.commands", *arguments)
    audio, rate = soundfile.read(wav)
    assert rate == 24_000 and 0.5 < len(audio) / rate < 10
    run("-m", "csm.cli.commands", "watermark", str(wav))
    unmarked = tmp_path / "silence.wav"
    soundfile.write(unmarked, audio * 0.0, rate)
    run("-m", "csm.cli.commands", "watermark", str(wav), str(unmarked), expect=1)


def test_presets_are_spoken_with_and_heard_as_themselves(learnt: Path, tmp_path: Path) -> None:
    """As a user would: the presets that travel with the checkpoint, lines in a file, a folder of clips."""
    names = ("tenor", "bass", "piper", "contralto")
    texts = ("seven four two nine", "one five three zero eight", "six two nine")
    lines = [{"text": text, "voice": name, "out": f"{name}_{index}.wav"} for name in names for index, text in enumerate(texts)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    arguments = ["--batch", str(tmp_path / "lines.jsonl"), "--out-dir", str(tmp_path / "said"), "--temperature", "0", "--seed", "0"]
    run("-m", "csm.cli.commands", "generate", "--checkpoint", str(learnt), *arguments)

    recogniser, encoder = Recogniser(prompt=EvaluateConfig(run="-").asr_prompt), SpeakerEncoder()
    heldout = read_suites(learnt.parent / "data" / "heldout", context=False)[SINGLE]
    references = [(one.voice, one.text, encoder.embed(one.audio)) for one in heldout if one.audio is not None]
    book = VoiceBook([reference for reference in references if reference[2] is not None])
    num_errors = num_words = num_right = 0
    for line in lines:
        audio, _ = soundfile.read(tmp_path / "said" / line["out"], dtype="float32")
        errors = count_word_errors(line["text"], recogniser.transcribe(audio))
        num_errors, num_words = num_errors + errors.errors, num_words + errors.num_words
        embedding = encoder.embed(audio)
        assert embedding is not None
        near = book.similarities(embedding, line["text"])
        num_right += max(near, key=lambda name: near[name]) == line["voice"]
    assert num_errors / num_words <= MAX_WER, f"{num_errors} errors in {num_words} words"
    assert num_right >= len(lines) - 2, f"{num_right} of {len(lines)} clips in the preset's voice"


def test_a_finished_run_is_not_overwritten(learnt: Path) -> None:
    done = run("train.py", f"run_dir={learnt}", f"trainer.max_steps={NUM_STEPS}", expect=1)
    assert str(learnt) in done.stderr and "resume=auto" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
