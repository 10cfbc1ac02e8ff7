"""Signals that stop a run, what is recorded of its starts, and SLURM's variables where srun did not start the program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from csm.config import TrainerConfig
from csm.training import slurm
from csm.training.run_folder import describe_environment, record_start, run_id
from csm.training.signals import answer
from csm.training.stop_request import StopRequest

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data=random", "data.seq_len=32", "trainer.log_every=1", "trainer.validate_every=0", "trainer.deterministic=true",
    "trainer.num_threads=1", "model.num_codebooks=4", "codec.num_codebooks=4", "model.audio_vocab_size=33",
    "model.backbone.num_layers=1", "model.backbone.width=32", "model.backbone.ffn_width=48", "model.depth_decoder.num_layers=1",
    "model.depth_decoder.width=16", "model.depth_decoder.ffn_width=24",
]  # fmt: skip
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mine", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[0-1]"}
SRUN = {**SALLOC, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture(autouse=True)
def _outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def _set(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_request_keeps_the_most_urgent_signal_and_gives_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        request.listen(signal.SIGTERM)
        for number, expected in ((signal.SIGUSR1, signal.SIGUSR1), (signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)):
            os.kill(os.getpid(), number)
            assert request.number == expected
    assert signal.getsignal(signal.SIGTERM) == before
    os.kill(os.getpid(), signal.SIGUSR1)  # the process lives on: its run is over, and a late signal is for nobody


def test_a_signal_to_a_forked_worker_asks_nothing_of_it() -> None:
    with StopRequest() as request:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(request.number)
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_run_stopped_by_a_signal_is_saved_and_says_so_by_its_status(number: signal.Signals, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *TINY,
        "trainer.max_steps=100000",
        "trainer.checkpoint_every=0",
        f"run_dir={run_dir}",
    ]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        give_up_at = time.monotonic() + 120
        while not (run_dir / "metrics.csv").is_file() or len((run_dir / "metrics.csv").read_text().splitlines()) < 3:
            assert process.poll() is None and time.monotonic() < give_up_at
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert "stopping after this step" in err and "Traceback" not in err and "resume=auto" in out
    last = (run_dir / "metrics.csv").read_text().splitlines()[-1].split(",")[0]
    assert (run_dir / "checkpoints" / "last.txt").read_text() == f"step_{int(last):06d}\n"


@pytest.mark.parametrize(("number", "status"), [(0, 0), (signal.SIGUSR1, 138), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_answer_outside_slurm_is_the_shells_status_for_the_signal(number: int, status: int) -> None:
    request = StopRequest()
    request.answered = number
    assert answer(request, print) == status


def test_answer_where_requeueing_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(monkeypatch, {**SRUN, "PATH": "/nonexistent"})
    request, said = StopRequest(), []
    request.answered = signal.SIGUSR1
    assert answer(request, said.append) == 138
    assert "job 7 could not be put back" in said[1] and "scontrol" in said[1]
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert answer(request, said.append) == 0 and len(said) == 2  # the first process tells


def test_slurm_variables_without_srun_are_not_taken_for_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

    assert slurm.cluster_environment(TrainerConfig(devices=2)) is None
    _set(monkeypatch, SALLOC)
    assert slurm.num_tasks() == 1 and not slurm.started_by_srun()
    assert isinstance(slurm.cluster_environment(TrainerConfig(devices=2)), LightningEnvironment)
    _set(monkeypatch, SRUN)
    assert slurm.num_tasks() == 2
    with pytest.raises(ValueError, match=r"srun started 2 tasks, trainer\.devices=1 x trainer\.num_nodes=1 make 1"):
        slurm.cluster_environment(TrainerConfig())
    with pytest.raises(ValueError, match="--ntasks-per-node"):
        slurm.cluster_environment(TrainerConfig(devices=2))
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    environment = slurm.cluster_environment(TrainerConfig(devices=2))
    assert isinstance(environment, SLURMEnvironment) and not environment.auto_requeue
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # srun --pty bash
    assert slurm.num_tasks() == 1


def test_train_py_runs_in_the_shell_of_an_allocation(tmp_path: Path) -> None:
    environment = {**os.environ, **SALLOC}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "trainer.max_steps=2"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("runs/*/*/environment.json")
    assert json.loads(record.read_text())["slurm"] == {
        "job_id": "7", "job_name": "mine", "nodes": "n[0-1]", "num_tasks": "2",
    }  # fmt: skip


def test_every_start_is_recorded(tmp_path: Path) -> None:
    path = tmp_path / "environment.json"
    for job in ("1", "2", "3"):
        record_start(path, {**describe_environment({"train": "random"}), "slurm": {"job_id": job}}, print)
    record = json.loads(path.read_text())
    assert [start["slurm"]["job_id"] for start in [*record["earlier_starts"], record]] == ["1", "2", "3"]
    assert all(start["packages"]["torch"] and "earlier_starts" not in start for start in record["earlier_starts"])
    path.write_text("{")
    said: list[str] = []
    record_start(path, {"slurm": None}, said.append)
    assert "environment.damaged.json" in said[0] and (tmp_path / "environment.damaged.json").read_text() == "{"


def test_run_id_stays_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_id(tmp_path / "a") == run_id(tmp_path / "a") != run_id(tmp_path / "b")
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert run_id(tmp_path / "c") == "" and not (tmp_path / "c").exists()
    assert run_id(tmp_path / "a")
