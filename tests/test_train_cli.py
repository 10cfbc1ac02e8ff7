"""`python train.py` as a user types it: help, mistakes in one line, runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from csm.cli.train import main
from csm.codec import SpectralCodec
from csm.text import WordTokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data=random", "data.seq_len=32", "trainer.max_steps=2", "trainer.log_every=1", "model.num_codebooks=4",
    "codec.num_codebooks=4", "model.audio_vocab_size=33", "model.backbone.num_layers=1", "model.backbone.width=32",
    "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1", "model.depth_decoder.width=16", "model.depth_decoder.ffn_width=24",
]  # fmt: skip


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """`run_main("a=1", ...)`: exit status, stdout and stderr of train.py in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        status = 0
        try:
            main()
        except SystemExit as left:
            status = int(left.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def _one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    return lines[0]


def test_help_is_answered(run_main: Callable) -> None:
    status, out, err = run_main("--help")
    assert status == 0 and not err
    assert "python train.py" in out and "optim.lr=" in out and "--multirun" in out


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1e-4", "error: optim.lrr: no such key (did you mean optim.lr"),
        ("trainer.max_steps=many", "error: trainer.max_steps: Value 'many'"),
        ("model=csm_2b", "error: model=csm_2b: no such choice"),
        ("trainer.precision=fp8", "error: trainer.precision='fp8': expected one of auto, 32, bf16-mixed, bf16-true"),
    ],
)
def test_mistake_in_an_override_is_one_line_and_status_2(override: str, expected: str, run_main: Callable) -> None:
    status, out, err = run_main(*TINY, override)
    assert status == 2 and not out
    assert _one_line(err).startswith(expected)


def test_missing_shard_folder_is_one_line_and_status_1(run_main: Callable) -> None:
    status, _, err = run_main("data=shards", "data.path=nowhere", "run_dir=out")
    assert status == 1
    assert "nowhere" in _one_line(err)
    assert not Path("out").exists()


def test_csm_1b_without_data_or_tokenizer_says_which_command_is_next(
    run_main: Callable, write_conversations: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("csm.text.packaged_llama3", lambda: None)
    asked = ("model=csm_1b", "data=shards", "data.path=data", "run_dir=out")
    status, _, err = run_main(*asked)  # neither is there: the data are told first
    assert status == 1
    line = _one_line(err)
    assert "data/train: no such folder" in line and "python -m data_prep" in line and "data=random" in line
    for split in ("train", "validation"):
        write_conversations(Path("data") / split, [[(0, "one two", 5)]], num_codebooks=32)
    status, _, err = run_main(*asked)
    assert status == 1
    line = _one_line(err)
    assert "no Llama-3 tokenizer" in line and "pip install llama-models" in line and "text.source=" in line
    assert not Path("out").exists()


def test_weights_only_checkpoints_load_and_cannot_be_resumed(run_main: Callable) -> None:
    from csm import CSM

    tiny = (*TINY, "run_dir=out", "trainer.validate_every=0", "trainer.save_optimizer=false", "trainer.precision=bf16-true")
    assert run_main(*tiny)[0] == 0
    model = CSM.from_pretrained(Path("out"), dtype=None)
    assert {str(p.dtype) for p in model.parameters()} == {"torch.bfloat16"}
    folder = Path("out/checkpoints/step_000002")
    assert (folder / "optimizer.safetensors").stat().st_size < 1000 < (folder / "model.safetensors").stat().st_size
    status, _, err = run_main(*tiny, "resume=auto", "trainer.max_steps=3")
    assert status == 1
    assert "no optimizer state" in _one_line(err) and "start a new one" in err


def test_a_corpus_without_a_validation_split_trains_where_nothing_is_validated(
    run_main: Callable, write_conversations: Callable, word_tokenizer: WordTokenizer, small_codec: SpectralCodec
) -> None:
    write_conversations(Path("data/train"), [[(0, "one two", 5), (1, "three", 4)]] * 4, digest=small_codec.digest)
    word_tokenizer.save(Path("data"))
    small_codec.save(Path("data/codec"))
    shards = (*TINY, "data=shards", "data.path=data", "data.rows_per_batch=2", "trainer.sample_every=0", "run_dir=out")
    status, _, err = run_main(*shards)
    assert status == 1
    assert "data/validation: no such folder" in _one_line(err) and "trainer.validate_every=0" in err
    status, out, err = run_main(*shards, "trainer.validate_every=0")
    assert status == 0, err
    assert "2 of 2" in out and "validation loss" not in out


def test_wrong_codec_is_one_line_and_status_1(run_main: Callable, write_conversations: Callable, word_tokenizer: WordTokenizer) -> None:
    for split in ("train", "validation"):
        write_conversations(Path("data") / split, [[(0, "one two", 5)]], num_codebooks=8)
    word_tokenizer.save(Path("data"))
    status, _, err = run_main("data=shards", "data.path=data", "codec=mimi", "codec.num_codebooks=8", "run_dir=out")
    assert status == 1
    line = _one_line(err)
    assert "spectral" in line and "mimi" in line
    assert not Path("out").exists()


def test_run_folder_that_holds_a_run_is_one_line_and_status_1(run_main: Callable) -> None:
    assert run_main(*TINY, "run_dir=out", "trainer.validate_every=0")[0] == 0
    before = sorted(path.as_posix() for path in Path("out").rglob("*"))
    status, _, err = run_main(*TINY, "run_dir=out")
    assert status == 1
    assert _one_line(err) == "error: run_dir=out already holds a run: add resume=auto to go on with it, or give another run_dir"
    assert sorted(path.as_posix() for path in Path("out").rglob("*")) == before


def test_defect_of_ours_keeps_its_traceback(run_main: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise json.JSONDecodeError("not user input", "", 0)  # a ValueError raised outside our folders

    monkeypatch.setattr("csm.cli.train.train", broken)
    with pytest.raises(json.JSONDecodeError):
        run_main(*TINY)


def test_multirun_makes_a_run_folder_for_each_job(run_main: Callable) -> None:
    status, _, err = run_main("--multirun", *TINY, "seed=1,2", "trainer.validate_every=0", "experiment_name=sweep")
    assert status == 0, err
    (sweep,) = Path("runs/sweep").iterdir()
    assert [yaml.safe_load((sweep / name / "config.yaml").read_text())["seed"] for name in ("0", "1")] == [1, 2]


def test_multirun_refuses_one_folder_for_all_jobs(run_main: Callable) -> None:
    status, _, err = run_main("--multirun", *TINY, "seed=1,2", "run_dir=out")
    assert status == 2
    assert _one_line(err) == "error: run_dir=out: the runs of a sweep need a folder each; say hydra.sweep.dir=out instead"
    assert not Path("out").exists()


def test_multirun_refuses_several_processes_a_job_without_a_launcher(run_main: Callable) -> None:
    status, _, err = run_main("--multirun", *TINY, "seed=1,2", "trainer=ddp", "trainer.devices=2", "experiment_name=sweep")
    assert status == 2
    assert "a sweep of runs with 2 processes each needs hydra/launcher=slurm" in _one_line(err)


@pytest.mark.parametrize(
    ("choice", "brought", "plug_in"),
    [
        ("hydra/launcher=slurm", "submitit_slurm.yaml", "hydra-submitit-launcher"),
        ("hydra/sweeper=learning_rate", "optuna.yaml", "hydra-optuna-sweeper"),
    ],
)
def test_a_sweep_without_its_plug_in_says_what_to_install(
    run_main: Callable, monkeypatch: pytest.MonkeyPatch, choice: str, brought: str, plug_in: str
) -> None:
    import hydra_plugins
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    repository = ConfigStore.instance().repo["hydra"][choice.removeprefix("hydra/").split("=")[0]]
    monkeypatch.delitem(repository, brought, raising=False)
    monkeypatch.setattr(hydra_plugins, "__path__", [])
    Plugins.instance()._initialize()
    try:
        status, _, err = run_main("--multirun", *TINY, choice, "seed=1,2")
    finally:
        monkeypatch.undo()
        Plugins.instance()._initialize()
    assert status == 2
    assert f"pip install '{plug_in}" in _one_line(err)


def test_a_sweep_finds_the_learning_rate_of_lowest_validation_loss(run_main: Callable) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is in the extra sweep")
    sweep = ["--multirun", "hydra/sweeper=learning_rate", "hydra.sweeper.n_trials=3", "hydra.sweep.dir=sweep"]
    status, _, err = run_main(*sweep, *TINY, "optim.warmup_steps=0", "trainer.validate_every=1")
    assert status == 0, err
    rates, losses = [], []
    for number in "012":
        rates.append(yaml.safe_load(Path("sweep", number, "config.yaml").read_text())["optim"]["lr"])
        with open(Path("sweep", number, "metrics.csv"), newline="", encoding="utf-8") as file:
            losses.append(min(float(row["val/loss"]) for row in csv.DictReader(file)))
    found = yaml.safe_load(Path("sweep/optimization_results.yaml").read_text())
    assert len(set(losses)) == 3 and found["best_value"] == pytest.approx(min(losses))
    assert found["best_params"]["optim.lr"] == pytest.approx(rates[losses.index(min(losses))])


def test_train_py_runs_by_itself_and_records_its_surroundings(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), *TINY, f"run_dir={tmp_path / 'out'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    assert "best checkpoint" in done.stdout and str(tmp_path / "out") in done.stdout
    environment = json.loads((tmp_path / "out/environment.json").read_text())
    assert environment["packages"]["torch"] and environment["shard_index_digests"] == {"train": "random"}
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert not (tmp_path / "outputs").exists()


def test_wandb_writes_offline_and_asks_for_a_login_online(run_main: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    status, _, err = run_main(*TINY, "run_dir=online", "logger=wandb")
    assert status == 1
    assert _one_line(err) == "error: logger=wandb: not logged in; run `wandb login`, or set logger.mode=offline, or logger=csv"
    assert not Path("online").exists()
    assert run_main(*TINY, "run_dir=offline", "logger=wandb", "logger.mode=offline", "trainer.validate_every=0")[0] == 0
    assert list(Path("offline").glob("wandb/offline-run-*/run-*.wandb"))
    assert Path("offline/metrics.csv").is_file()
