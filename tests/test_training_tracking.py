"""What a run says of itself: metrics, W&B's record read back, spoken samples, the terminal, and no key anywhere."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import pty
import re
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image

from csm.cli.hydra_entry import compose
from csm.cli.run_parts import build_transcriber
from csm.cli.train import main, train
from csm.config import LoggerConfig, ModelConfig, TrainConfig
from csm.data.datamodule import CSMDataModule
from csm.generation.audio_files import write_audio
from csm.generation.spectrogram import draw_spectrogram
from csm.redaction import without_secrets
from csm.training.callbacks import Clock, Validation
from csm.training.device import data_sheet_tflops, measure_cpu_tflops
from csm.training.loggers import WandbRecord, last_recorded_step
from csm.training.metrics import WALL_CLOCK_COLUMNS, Metrics, Rows
from csm.training.plan import count_flops
from csm.training.samples import write_page
from csm.training.steps import StepLoader
from tests.isolation import run_isolated
from tests.test_training_module import fit, read_rows, run_config

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("one two three", "the number is four")
HAS_WHISPER = importlib.util.find_spec("faster_whisper") is not None  # an extra
SECRETS = {
    "WANDB_API_KEY": "a1b2c3d4e5" * 4,
    "HF_TOKEN": "hf_PlantedTokenOfNobody",
    "AWS_SECRET_ACCESS_KEY": "Planted/Aws+Secret0Of0Nobody",
}
TINY = [
    "data=shards", "data.seq_len=96", "data.rows_per_batch=2", "codec.num_codebooks=4", "model.num_codebooks=4",
    "model.audio_vocab_size=33", "model.max_seq_len=256", "model.backbone.num_layers=1", "model.backbone.width=32",
    "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1", "model.depth_decoder.width=16",
    "model.depth_decoder.ffn_width=24", "trainer.log_every=1", "trainer.validate_every=3", "trainer.sample_every=3",
    "trainer.precision=32", "trainer.num_threads=1", "optim.schedule=constant",
]  # fmt: skip


@dataclass
class Runs:
    """A run of six steps in a terminal, gone on with to eight through a pipe and without a network."""

    folder: Path
    terminal: str
    piped: subprocess.CompletedProcess[str]
    arguments: list[str]
    processes_left: list[str]


@pytest.fixture(scope="module")
def spoken_data(tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable, small_codec, word_tokenizer) -> Path:
    """Shards of made-up codes with the small codec and the word tokenizer beside them."""
    folder = tmp_path_factory.mktemp("tracking") / "data"
    small_codec.save(folder / "codec")
    word_tokenizer.save(folder)
    digest = json.loads((folder / "codec" / "codec.json").read_text())["digest"]
    for split, count in (("train", 24), ("validation", 4)):
        write_conversations(folder / split, [[(i % 2, "one two", 10), (1, "three", 12)] for i in range(count)], digest=digest)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, spoken_data: Path) -> Runs:
    home = tmp_path_factory.mktemp("home")
    folder = home / "out"
    texts = ",".join(f"'{text}'" for text in TEXTS)
    arguments = [*TINY, f"data.path={spoken_data}", f"run_dir={folder}", f"trainer.sample_texts=[{texts}]"]
    logged = [*arguments, "logger=wandb", "logger.mode=offline"]
    mark = f"tracking-test-{os.getpid()}"
    environment = {**SECRETS, "HOME": str(home), "CSM_TEST_MARK": mark, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "train.py", *logged, "trainer.max_steps=6"]
    terminal = run_in_terminal(command, {**os.environ, **environment}, columns=100)
    processes_left = find_processes(mark)
    going_on = [*logged, "trainer.max_steps=8", "resume=auto", f"trainer.transcribe_samples={str(HAS_WHISPER).lower()}"]
    piped = run_isolated([sys.executable, "train.py", *going_on], env=environment, timeout=120)
    assert piped.returncode == 0, piped.stdout + piped.stderr
    return Runs(folder, terminal, piped, arguments, processes_left)


def run_in_terminal(command: list[str], environment: dict[str, str], columns: int) -> str:
    """What a command shows on a terminal of that width; fails when it ends badly."""
    master, slave = pty.openpty()
    environment = {**environment, "TERM": "xterm", "COLUMNS": str(columns), "LINES": "40"}
    shown = bytearray()
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdin=slave, stdout=slave, stderr=slave) as process:
        os.close(slave)
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(master)
    text = shown.decode(errors="replace")
    assert process.returncode == 0, text
    return text


def find_processes(mark: str) -> list[str]:
    """Command lines of processes whose environment holds the mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # ended meanwhile, or not ours
            continue
    return found


def read_wandb(path: Path) -> Iterator:
    """Protobuf records of a .wandb file: LevelDB's log, in blocks of 32 KiB, behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        if position + 7 + length > len(data):  # torn
            break
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield Record.FromString(record)
            record = b""


def history(path: Path) -> list[dict]:
    """Rows of a .wandb file, as W&B would show them."""
    rows = []
    for record in read_wandb(path):
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
    return rows


def parts_of(folder: Path) -> list[Path]:
    """The .wandb files of a run, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def plain(terminal: str) -> str:
    """Terminal output without colours and cursor movements; a redrawn line is a line."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.replace("\r", "\n"))


@pytest.mark.slow
def test_record_holds_every_metric_at_every_step(runs: Runs) -> None:
    first, second = (history(path) for path in parts_of(runs.folder))
    expected = {"step", "train/loss", "train/c0", "train/depth", "lr", "grad_norm", "hours_heard", "useful_share", "skipped", "bad_samples"}
    expected |= {*WALL_CLOCK_COLUMNS, *(f"train/codebook_{k:02d}" for k in range(4))}
    validated = {"val/loss", "val/c0", "val/depth", "val/eos_recall", "val/false_stop", *(f"val/codebook_{k:02d}" for k in range(4))}
    for row in first + second:
        assert expected <= row.keys()
        assert validated <= row.keys() or row["step"] not in (3, 6, 8)
        assert row["step"] == row["_step"]
    rows = read_rows(runs.folder)
    assert [row["step"] for row in first + second] == [int(row["step"]) for row in rows] == list(range(1, 9))
    for logged, written in zip(first + second, rows, strict=True):
        for key, text in written.items():
            if text:
                assert logged[key] == pytest.approx(float(text), rel=1e-6), key
    numbers = first[-1]
    codebooks = [numbers[f"train/codebook_{k:02d}"] for k in range(4)]
    assert codebooks[0] == pytest.approx(numbers["train/c0"], rel=1e-6)
    assert sum(codebooks[1:]) / 3 == pytest.approx(numbers["train/depth"], rel=1e-6)
    assert 0.5 < numbers["useful_share"] < 1
    assert 0 < numbers["mfu"] < 1
    assert 0 <= numbers["data_wait_share"] < 1
    assert 0.05 < numbers["memory_gib"] < 8


@pytest.mark.slow
def test_resumed_run_goes_on_in_its_record(runs: Runs) -> None:
    first, second = parts_of(runs.folder)
    assert first.name == second.name
    run_ids = {record.run.run_id for path in (first, second) for record in read_wandb(path) if record.WhichOneof("record_type") == "run"}
    assert run_ids == {(runs.folder / "run_id.txt").read_text().strip()}
    metrics = [record.metric for record in read_wandb(second) if record.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    assert [record.exit.exit_code for record in read_wandb(second) if record.WhichOneof("record_type") == "exit"] == [0]


@pytest.mark.slow
def test_record_holds_the_configuration_and_the_best_validation(runs: Runs) -> None:
    config, summary = {}, {}
    for record in read_wandb(parts_of(runs.folder)[1]):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert not record.run.host and not record.run.git.remote_url
        elif kind == "summary":
            summary |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.summary.update}
    assert config["model"]["backbone"]["width"] == 32
    assert config["trainer"]["max_steps"] == 8
    losses = {int(row["step"]): float(row["val/loss"]) for row in read_rows(runs.folder) if row["val/loss"]}
    best = min(losses, key=losses.__getitem__)
    assert (summary["best/step"], summary["best/val_loss"]) == (best, pytest.approx(losses[best]))


@pytest.mark.slow
def test_record_holds_a_table_of_playable_audio_and_spectrograms(runs: Runs) -> None:
    tables = []
    for path in parts_of(runs.folder):
        tables += [record.artifact for record in read_wandb(path) if record.WhichOneof("record_type") == "artifact"]
    assert len(tables) == 3  # steps 3, 6 and 8
    for step, table in zip((3, 6, 8), tables, strict=True):
        files = {entry.path: Path(entry.local_path) for entry in table.manifest.contents}
        rows = json.loads(files["samples.table.json"].read_text())
        heard = ["heard"] if step == 8 and HAS_WHISPER else []
        assert rows["columns"] == ["step", "speaker", "text", "audio", "spectrogram", *heard]
        assert [tuple(row[:3]) for row in rows["data"]] == [(step, 0, TEXTS[0]), (step, 1, TEXTS[1])]
        for _, speaker, _, audio, spectrogram, *transcript in rows["data"]:
            assert len(transcript) == len(heard) and all(isinstance(words, str) for words in transcript)
            assert files[audio["path"]].is_relative_to(runs.folder)
            samples, rate = soundfile.read(files[audio["path"]])
            written, _ = soundfile.read(runs.folder / "samples" / f"step_{step:06d}_speaker{speaker}.wav")
            assert rate == 24_000 and (samples == written).all()
            assert len(samples) % 1920 == 0 and 0.08 <= len(samples) / rate <= 10.0
            assert abs(samples).max() > 0.01
            with Image.open(files[spectrogram["path"]]) as image:
                assert image.width == pytest.approx(len(samples) / rate * 200, abs=1)
                assert len(set(image.convert("L").tobytes())) > 20


@pytest.mark.slow
def test_samples_have_a_page_that_plays_them(runs: Runs) -> None:
    page = (runs.folder / "samples" / "index.html").read_text()
    assert [int(step) for step in re.findall(r"<h2>step (\d+)</h2>", page)] == [8, 6, 3]
    assert page.count(TEXTS[1]) == 3
    links = re.findall(r'src="([^"]+)"', page)
    assert len(links) == 12
    assert all((runs.folder / "samples" / link).is_file() for link in links)
    assert "http" not in page


@pytest.mark.slow
def test_terminal_shows_one_live_line(runs: Runs) -> None:
    lines = plain(runs.terminal).splitlines()
    live = [line for line in lines if re.match(r"step +\d+/6 ", line)]
    assert live and all(len(line) <= 100 for line in live)
    assert re.match(r"step +6/6 .*loss \d+\.\d{3}  [\d,]+ frames/s  \d+\.\d\d h heard +\d:\d\d:\d\d left", live[-1]), live[-1]
    assert "\x1b[2K" in runs.terminal  # redrawn in place
    assert any(line.startswith("step 3: validation loss") for line in lines)
    summary = "\n".join(lines[lines.index(live[-1]) :])
    for told in ("best checkpoint", "metrics.csv", "wandb sync", "samples/index.html", "training loss", "audio heard"):
        assert told in summary


@pytest.mark.slow
def test_pipe_gets_plain_lines(runs: Runs) -> None:
    lines = runs.piped.stdout.splitlines()
    assert "\x1b" not in runs.piped.stdout
    assert any(re.fullmatch(r"step 8/8  loss \d+\.\d{3}  [\d,]+ frames/s  \d+\.\d\d h heard  \d+:\d\d left", line) for line in lines), lines
    assert not runs.piped.stderr.strip(), runs.piped.stderr


@pytest.mark.slow
def test_no_process_stays_behind(runs: Runs) -> None:
    assert runs.processes_left == []


@pytest.mark.slow
def test_tracking_leaves_metrics_as_they_are_without(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [argument for argument in runs.arguments if not argument.startswith(("run_dir=", "trainer.sample_"))]
    for overrides in (["trainer.max_steps=6"], ["trainer.max_steps=8", "resume=auto"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments, f"run_dir={tmp_path / 'out'}", *overrides])
        main()
    assert (tmp_path / "out" / "metrics.csv").read_bytes() == (runs.folder / "metrics.csv").read_bytes()


@pytest.mark.slow
def test_keys_reach_neither_disk_nor_output(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    token = "tok3nInAnAddress"
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny = [argument for argument in TINY if not argument.startswith(("data", "trainer.sample"))]
    arguments = ["data=random", "data.seq_len=32", f"data.path='https://me:{token}@example.org/a?sig={token}'", *tiny]
    arguments += ["logger=wandb", "logger.mode=offline", "trainer.max_steps=1", f"run_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "experiment_name='${oc.env:HF_TOKEN}'"])
    main()
    out, err = capfd.readouterr()
    secrets = [*(value.encode() for value in SECRETS.values()), token.encode()]
    written = [path for folder in (tmp_path, runs.folder.parent) for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written) and any(path.name == "debug.log" for path in written)
    texts = {str(path): path.read_bytes() for path in written}
    texts |= {"out": out.encode(), "err": err.encode(), "terminal": runs.terminal.encode(), "piped": runs.piped.stdout.encode()}
    for place, text in texts.items():
        assert not any(secret in text for secret in secrets), place
    assert "https://***@example.org/a?sig=***" in (tmp_path / "out" / "config.yaml").read_text()


def test_redaction_hides_keys_and_leaves_the_rest() -> None:
    environment = {"MY_TOKEN": "s3cret-value", "SHORT_KEY": "abc", "PATH": "/usr/bin:/bin"}
    tree = {"a": ["s3://bucket/x-?????.tar", "hf://datasets/me/x@main", 3, None], "b": {"c": "see s3cret-value, abc, /usr/bin:/bin"}}
    assert without_secrets(tree, environment) == {"a": tree["a"], "b": {"c": "see ***, abc, /usr/bin:/bin"}}
    assert without_secrets("https://u:p@h/x?X-Signature=1f&page=2", {}) == "https://***@h/x?X-Signature=***&page=***"
    assert without_secrets("git clone https://t0ken@h/r 'ftp://u@i/'", {}) == "git clone https://***@h/r 'ftp://***@i/'"


@pytest.fixture
def record(tmp_path: Path, tiny_model_config: ModelConfig) -> Callable[[], WandbRecord]:
    """`record()`: the offline record of one run folder, anew each time, as after a restart."""
    config = replace(run_config(tiny_model_config, tmp_path / "out"), logger=LoggerConfig(name="wandb", mode="offline"))
    return lambda: WandbRecord(config.logger, tmp_path / "out", config)


def test_record_of_a_killed_run_has_every_step_once(record: Callable[[], WandbRecord], tmp_path: Path) -> None:
    def rows(*steps: int) -> list[dict[str, str]]:
        return [{"step": str(step), "train/loss": str(1 / step), "val/loss": ""} for step in steps]

    first = record()
    first.begin([])
    for step in range(1, 8):
        first.log_metrics({"train/loss": 1 / step}, step)
    first.finalize("failed")
    (path,) = parts_of(tmp_path / "out")
    data = path.read_bytes()
    assert last_recorded_step(path) == 7
    # Killed before all of it was on disk: steps 5 to 7 are gone, the last record is torn.
    for size in range(len(data), 0, -50):
        path.write_bytes(data[:size])
        if last_recorded_step(path) == 4:
            break
    time.sleep(1.1)  # the names of its files have seconds
    second = record()
    second.begin(rows(1, 2, 3, 4, 5, 6))  # metrics.csv up to the checkpoint of step 6
    second.log_metrics({"train/loss": 1 / 7}, 7)
    second.finalize("success")
    time.sleep(1.1)
    third = record()
    third.begin(rows(1, 2, 3, 4))  # an earlier checkpoint: 5 to 7 are done again
    for step in range(5, 9):
        third.log_metrics({"train/loss": 1 / step}, step)
    third.finalize("success")
    steps = [[row["step"] for row in history(part)] for part in parts_of(tmp_path / "out")]
    assert steps == [[1, 2, 3, 4], [5, 6, 7], [8]]
    assert "WANDB_DATA_DIR" not in os.environ


def test_long_record_is_read_over_its_blocks(record: Callable[[], WandbRecord], tmp_path: Path) -> None:
    long = record()
    long.begin([])
    for step in range(1, 301):
        long.log_metrics({f"train/codebook_{k:02d}": step / (k + 1) for k in range(8)}, step)
    long.finalize("success")
    (path,) = parts_of(tmp_path / "out")
    assert path.stat().st_size > 5 * 32768
    assert last_recorded_step(path) == 300
    assert [row["step"] for row in history(path)] == list(range(1, 301))


def test_disabled_record_leaves_nothing_on_disk(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = run_config(tiny_model_config, tmp_path / "out", max_steps=1)
    train(replace(config, logger=LoggerConfig(name="wandb", mode="disabled")))
    assert (tmp_path / "out" / "metrics.csv").is_file()
    assert not list(tmp_path.rglob("*wandb*"))


def test_share_of_the_peak_counts_what_the_shapes_say(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = run_config(tiny_model_config, tmp_path, max_steps=2, peak_tflops=0.5)
    clock = Clock()
    fit(config, Metrics(tmp_path, config, Validation(list, config, clock), clock, 4))
    with open(tmp_path / "timings.csv", newline="", encoding="utf-8") as file:
        timings = list(csv.DictReader(file))
    data = CSMDataModule(config.data, config.model, seed=config.seed)
    steps = StepLoader(data.train_dataloader(), accumulate=1, amortization=config.loss.amortization, num_steps=lambda: 2)
    flops = count_flops(config.model, config.data.seq_len, 1.0)
    for row, step in zip(timings, steps, strict=True):
        expected = 4 * 48 * flops.backbone + step.num_depth_targets / 3 * flops.depth
        assert float(row["mfu"]) * 0.5e12 * float(row["step_s"]) == pytest.approx(expected, rel=1e-5)


def test_wait_for_a_slow_loader_is_measured(tiny_model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from csm.data.random_rows import RandomRows

    build = RandomRows.build

    def slow_build(source: RandomRows, rows: list) -> tuple:
        time.sleep(0.1)
        return build(source, rows)

    shares = []
    for folder in ("quick", "slow"):
        config = run_config(tiny_model_config, tmp_path / folder, max_steps=3, log_every=3)
        clock = Clock()
        fit(config, Metrics(tmp_path / folder, config, Validation(list, config, clock), clock, 4))
        with open(tmp_path / folder / "timings.csv", newline="", encoding="utf-8") as file:
            shares.append({key: float(value) for key, value in next(csv.DictReader(file)).items()})
        monkeypatch.setattr(RandomRows, "build", slow_build)
    quick, slow = shares
    assert slow["data_wait_share"] * slow["step_s"] == pytest.approx(0.1, abs=0.05)
    assert quick["data_wait_share"] * quick["step_s"] < 0.05


def test_bad_samples_are_counted_in_their_column(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = run_config(tiny_model_config, tmp_path, max_steps=2)
    clock = Clock()
    counts = iter((0, 3))
    fit(config, Metrics(tmp_path, config, Validation(list, config, clock), clock, 4, lambda: next(counts)))
    assert [row["bad_samples"] for row in read_rows(tmp_path)] == ["0", "3"]


def test_file_of_an_older_version_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,forgotten\n1,5.5,7\n2,5.25,7\n3,5.0,7\n4,4.")
    rows = Rows(path, ["step", "train/loss", "mfu"])
    kept = rows.open(keep_until=2)
    rows.append({"step": 3, "train/loss": 4.875, "mfu": 0.5})
    assert path.read_text() == "step,train/loss,mfu\n1,5.5,\n2,5.25,\n3,4.875,0.5\n"
    assert [row["step"] for row in kept] == ["1", "2"]


@pytest.mark.slow
def test_weights_cut_over_two_processes_speak_as_whole_ones(spoken_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is an extra")
    common = [argument for argument in TINY if not argument.startswith(("trainer.sample_every", "data.rows_per_batch"))]
    common += [f"data.path={spoken_data}", "trainer.accelerator=cpu", "trainer.sample_every=1", "trainer.sample_texts=[one two]"]
    common += ["trainer.max_steps=1", "trainer.validate_every=0"]
    jobs = [[*common, "trainer=zero3", "trainer.devices=2", "data.rows_per_batch=1", f"run_dir={tmp_path / 'cut'}"]]
    done = run_isolated([sys.executable, "tests/many_processes.py", "2", json.dumps(jobs)], timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    train(compose("train", [*common, "data.rows_per_batch=2", f"run_dir={tmp_path / 'whole'}"], TrainConfig))
    cut, whole = (tmp_path / name / "samples" / "step_000001_speaker0.wav" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_every_logged_key_is_explained(runs: Runs) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"`([a-z_0-9/]+)`", page[page.index("## Watching a run") : page.index("**W&B.**")]))
    logged = {
        key for part in parts_of(runs.folder) for row in history(part) for key in row if key[0] != "_" and not key.startswith("samples/")
    }
    with open(runs.folder / "timings.csv", newline="", encoding="utf-8") as file:
        logged |= {*read_rows(runs.folder)[0], *(csv.DictReader(file).fieldnames or ())}
    assert {re.sub(r"codebook_\d+", "codebook_00", key) for key in logged} - explained == set()


def test_samples_are_transcribed_by_whisper_when_asked(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    pytest.importorskip("faster_whisper", reason="faster-whisper is an extra")
    config = run_config(tiny_model_config, tmp_path, transcribe_samples=True)
    transcribe = build_transcriber(config)
    assert transcribe is not None
    assert isinstance(transcribe(torch.zeros(24_000)), str)
    assert build_transcriber(replace(config, trainer=replace(config.trainer, transcribe_samples=False))) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_peak_of_a_gpu_is_its_own_or_none(name: str, tflops: float | None) -> None:
    assert data_sheet_tflops(name) == tflops


def test_peak_of_a_cpu_is_measured_quickly_and_draws_nothing() -> None:
    before = torch.random.get_rng_state()
    started_s = time.perf_counter()
    tflops = measure_cpu_tflops(torch.float32)
    assert time.perf_counter() - started_s < 1.0
    assert 1e-3 < tflops < 100
    assert torch.equal(torch.random.get_rng_state(), before)


def test_spectrogram_shows_pitch_as_height_and_silence_as_black(tmp_path: Path) -> None:
    for name, pitch_hz in (("low", 200), ("high", 4000)):
        draw_spectrogram(torch.sin(torch.arange(24_000) / 24_000 * 6.2832 * pitch_hz) * 0.3, tmp_path / f"{name}.png")
    draw_spectrogram(torch.zeros(0), tmp_path / "none.png")
    brightest = {}
    for name in ("low", "high"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size == (200, 262)
            grey = torch.tensor(list(image.convert("L").crop((20, 0, 180, 240)).tobytes())).view(240, 160)
            brightest[name] = int(grey.float().mean(dim=1).argmax())
    assert brightest["low"] > 200 and brightest["high"] < 100
    with Image.open(tmp_path / "none.png") as image:
        assert max(image.convert("L").crop((0, 0, 16, 240)).tobytes()) < 16


def test_page_shows_text_as_text(tmp_path: Path) -> None:
    note = {"step": 1200, "speaker": 0, "text": '<script>alert("one & two")</script>', "heard": "<i>one</i>"}
    write_audio(tmp_path / "step_001200_speaker0.wav", [torch.zeros(1920)], note)
    write_audio(tmp_path / "foreign.wav", [torch.zeros(1920)], {})
    write_page(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "&lt;script&gt;alert(&quot;one &amp; two&quot;)&lt;/script&gt;" in page and "heard: &lt;i&gt;one&lt;/i&gt;" in page
    assert "step 1,200" in page and "<script" not in page and "foreign" not in page


def test_text_that_cannot_be_said_is_told_before_training(spoken_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [f"data.path={spoken_data}", f"run_dir={tmp_path / 'out'}", "trainer.sample_texts=[one,eleven]"]
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *overrides])
    with pytest.raises(SystemExit):
        main()
    assert not (tmp_path / "out").exists()
