"""The batch scripts of slurm/ on a real slurmctld, slurmd and munged: time limit, scancel, arrays, sweeps."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.e2e.slurm_cluster import SlurmCluster, why_no_slurm
from tests.isolation import ROOT

pytestmark = pytest.mark.slow
NUM_STEPS = 120
TINY = [
    "data=random", "data.seq_len=32", "trainer.log_every=1", "trainer.validate_every=0", "trainer.deterministic=true",
    "trainer.num_threads=1", "trainer.accelerator=cpu", "trainer.accumulate=4", "model.num_codebooks=4", "codec.num_codebooks=4",
    "model.audio_vocab_size=33", "model.backbone.num_layers=1", "model.backbone.width=32", "model.backbone.ffn_width=48",
    "model.depth_decoder.num_layers=1", "model.depth_decoder.width=16", "model.depth_decoder.ffn_width=24",
]  # fmt: skip
TWO_TASKS = ["--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A cluster whose home is a checkout of the repository: its code, with a slurm/ and runs/ of its own."""
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    home = folder / "home"
    home.mkdir()
    for name in ("train.py", "evaluate.py", "csm", "configs", "data_prep"):
        (home / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", home / "slurm")
    with SlurmCluster(folder, home) as cluster:
        try:
            yield cluster
        finally:
            cluster.run(["scancel", "--user=root", "--full", "--signal=KILL"])


@pytest.fixture(scope="module")
def at_its_limit(cluster: SlurmCluster) -> tuple[str, Path]:
    """A job of two tasks, held still in the middle of its run.

    SLURM looks at time limits every 30 s, which the tests before its own use; then it lets the job go on and sends the signal.
    """
    job = cluster.sbatch(
        *TWO_TASKS, "--time=2", "--signal=USR1@60", "slurm/train.sbatch", *TINY, f"trainer.max_steps={NUM_STEPS}",
        "trainer.checkpoint_every=0", "logger=wandb", "logger.mode=offline",
    )  # fmt: skip
    run_dir = cluster.home / "runs" / "slurm" / job
    _wait_for(lambda: len(_steps(run_dir)) >= 20, cluster, job, timeout=60)
    cluster.run(["scancel", "--signal=STOP", job])
    assert len(_steps(run_dir)) < NUM_STEPS, "it must not be over yet"
    return job, run_dir


def test_two_nodes_train_by_the_same_script(cluster: SlurmCluster, at_its_limit: object) -> None:
    job = cluster.sbatch(
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "slurm/train.sbatch", *TINY,
        f"trainer.max_steps={NUM_STEPS}", "run_dir=runs/two_nodes",
    )  # fmt: skip
    assert cluster.wait(job, timeout=90) == ["COMPLETED"], cluster.output(job)
    run_dir = cluster.home / "runs" / "two_nodes"
    assert _steps(run_dir) == list(range(1, NUM_STEPS + 1))
    told = json.loads((run_dir / "environment.json").read_text())["slurm"]
    assert (told["job_id"], told["nodes"], told["num_nodes"], told["num_tasks"]) == (job, "n[0-1]", "2", "2")


def test_prep_array_does_its_slices(cluster: SlurmCluster, at_its_limit: object, tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    time_s = np.arange(24_000 * 3) / 24_000
    for index in range(8):
        soundfile.write(recordings / f"{index}.wav", 0.3 * np.sin(6.28 * (200 + 40 * index) * time_s * (1 + 0.1 * time_s)), 24_000)
        (recordings / f"{index}.txt").write_text("one two three")
    prepare = [
        "slurm/prep_array.sbatch", "prep=turns", f"input={recordings}", "output=speech", "unit_min=0.06", "val_share=0.3",
        "codec.num_codebooks=4",
    ]  # fmt: skip
    job = cluster.sbatch("--array=0-1", "--cpus-per-task=1", *prepare)
    assert cluster.wait(job, timeout=90) == ["COMPLETED"] * 2, cluster.output(job)
    units = [json.loads(line)["name"] for line in (cluster.home / "speech" / "prep" / "units.jsonl").read_text().splitlines()]
    assert len(units) >= 4
    assert {path.stem for path in (cluster.home / "speech" / "prep" / "done").glob("*.json")} == set(units)
    assert not list(cluster.home.glob("speech/*/index.json"))
    job = cluster.sbatch("--cpus-per-task=1", *prepare, "stages=[merge]")
    assert cluster.wait(job, timeout=60) == ["COMPLETED"], cluster.output(job)
    indexes = [json.loads(path.read_text()) for path in cluster.home.glob("speech/*/index.json")]
    assert sum(shard["num_samples"] for index in indexes for shard in index["shards"]) == 8
    job = cluster.sbatch("--array=1,3,4", "--cpus-per-task=1", *prepare)
    assert cluster.wait(job, timeout=60) == ["FAILED"] * 3
    assert "must be a range" in cluster.output(job)


def test_sweep_of_two_runs_is_a_job_array(cluster: SlurmCluster, at_its_limit: object) -> None:
    sweep = ["--multirun", "hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "optim.lr=1e-4,3e-4", "experiment_name=sweep"]
    done = cluster.run([sys.executable, "train.py", *sweep, *TINY, "trainer.max_steps=3"], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (cluster.home / "runs" / "sweep").iterdir()
    records = [json.loads((folder / name / "environment.json").read_text())["slurm"] for name in ("0", "1")]
    assert records[0]["array_job_id"] == records[1]["array_job_id"] and [r["array_task_id"] for r in records] == ["0", "1"]
    assert [_steps(folder / name) for name in ("0", "1")] == [[1, 2, 3]] * 2
    rates = [_rows(folder / name)[-1]["lr"] for name in ("0", "1")]
    assert float(rates[1]) == pytest.approx(3 * float(rates[0]))


def test_preemption_and_scancel_leave_a_state_to_go_on_from(cluster: SlurmCluster, at_its_limit: object) -> None:
    train = ["slurm/train.sbatch", *TINY, "run_dir=runs/cancelled", "trainer.checkpoint_every=0"]
    low = ["--partition=low", "--nodelist=n1", "--exclusive"]
    job = cluster.sbatch(*TWO_TASKS, *low, *train, "trainer.max_steps=100000", "optim.schedule=constant")
    run_dir = cluster.home / "runs" / "cancelled"
    _wait_for(lambda: len(_steps(run_dir)) >= 10, cluster, job, timeout=60)
    urgent = cluster.sbatch("--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap=true")
    assert cluster.wait(urgent, timeout=60) == ["COMPLETED"], cluster.output(job)
    before = _steps(run_dir)[-1]
    assert f"saved; putting job {job} back into the queue" in cluster.output(job)
    _wait_for(lambda: len(_steps(run_dir)) >= before + 10, cluster, job, timeout=60)
    cluster.run(["scancel", job])
    assert cluster.wait(job, timeout=60) == ["CANCELLED"]
    last = _steps(run_dir)[-1]
    assert (run_dir / "checkpoints" / "last.txt").read_text() == f"step_{last:06d}\n", cluster.output(job)
    assert "resume=auto" in cluster.output(job)
    job = cluster.sbatch(*TWO_TASKS, *train, f"trainer.max_steps={last + 5}", "optim.schedule=constant")
    assert cluster.wait(job, timeout=60) == ["COMPLETED"], cluster.output(job)
    assert _steps(run_dir) == list(range(1, last + 6))


def test_run_at_its_time_limit_is_saved_queued_again_and_finished_as_if_nothing_had_been(
    cluster: SlurmCluster, at_its_limit: tuple[str, Path]
) -> None:
    job, run_dir = at_its_limit
    assert cluster.wait(job, timeout=180) == ["COMPLETED"], cluster.output(job)
    restarts = int(cluster.job(job)["Restarts"])
    assert restarts >= 1  # more where this machine is so slow that the next start comes to its limit too
    assert _steps(run_dir) == list(range(1, NUM_STEPS + 1))
    record = json.loads((run_dir / "environment.json").read_text())
    assert record["slurm"]["num_restarts"] == str(restarts) and len(record["earlier_starts"]) == restarts
    assert {start["slurm"]["job_id"] for start in [record, *record["earlier_starts"]]} == {job}
    log = cluster.output(job)
    assert f"saved; putting job {job} back into the queue" in log and "resuming runs/slurm" in log
    assert len({path.name for path in run_dir.glob("wandb/*/run-*.wandb")}) == 1
    uninterrupted = _rows(cluster.home / "runs" / "two_nodes")
    assert [row["train/loss"] for row in _rows(run_dir)] == [row["train/loss"] for row in uninterrupted]


def _rows(run_dir: Path) -> list[dict[str, str]]:
    if not (run_dir / "metrics.csv").is_file():
        return []
    with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in _rows(run_dir)]


def _wait_for(is_so: Callable[[], bool], cluster: SlurmCluster, job: str, *, timeout: float) -> None:
    give_up_at = time.monotonic() + timeout
    while not is_so():
        assert time.monotonic() < give_up_at, f"{cluster.job(job)}\n{cluster.output(job)}\n{cluster.log()}"
        time.sleep(0.1)
