"""The folder of a run: which one, what it goes on from, and what is recorded of the run's surroundings."""

from __future__ import annotations

import csv
import json
import os
import platform
import secrets
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from csm.config import TrainConfig
from csm.model.checkpoint_folder import Say, list_checkpoints, newest_valid_checkpoint, refuse_unusable
from csm.model.pretrained import resolve_checkpoint
from csm.redaction import without_secrets
from csm.training import slurm
from csm.training.stop_request import is_first_process
from csm.whole_files import write_text

RUN_DIR_VARIABLE = "CSM_RUN_DIR"  # tells the processes that Lightning starts which folder their parent chose
_PACKAGES = ("torch", "lightning", "deepspeed", "transformers", "safetensors", "numpy", "hydra-core", "wandb", "webdataset")


def choose_run_dir(config: TrainConfig) -> Path:
    """Where the run lives; nothing is made yet.

    `run_dir`, or the run that `resume` names, or a new `runs/<experiment_name>/<date_time>`.

    Raises:
        ValueError: if the folder already holds something and `resume` is off.
    """
    if RUN_DIR_VARIABLE in os.environ and int(os.environ.get("LOCAL_RANK", "0")) > 0:
        return Path(os.environ[RUN_DIR_VARIABLE])
    if config.run_dir is not None:
        run_dir = Path(config.run_dir)
        if not is_first_process():
            return run_dir  # the first one looks, and may have made it by now
        if config.resume is None and run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ValueError(f"run_dir={run_dir} already holds a run: add resume=auto to go on with it, or give another run_dir")
        return run_dir
    runs = Path("runs") / config.experiment_name
    if config.resume == "auto":
        earlier = sorted(path for path in runs.glob("*") if list_checkpoints(path / "checkpoints"))
        if earlier:
            return earlier[-1]
    elif config.resume is not None:
        checkpoint = resolve_checkpoint(config.resume, name="last")
        if checkpoint.parent.name == "checkpoints":
            return checkpoint.parent.parent
    if int(os.environ.get("WORLD_SIZE", slurm.num_tasks())) > 1:
        raise ValueError("run_dir is required when another program starts the processes, or each would make its own; add run_dir=<folder>")
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = len(list(runs.glob(name + "*")))  # runs of a sweep may start within a second
    return runs / (f"{name}_{taken}" if taken else name)


def publish_run_dir(run_dir: Path) -> None:
    """Let the processes that Lightning will start find the folder."""
    os.environ[RUN_DIR_VARIABLE] = str(run_dir)


def find_resume_point(config: TrainConfig, run_dir: Path, say: Say) -> Path | None:
    """The checkpoint to go on from, or None for a fresh start.

    Raises:
        FileNotFoundError: if `resume` names a folder that is not there.
        ValueError: if it names one that is damaged, or nothing of the run is whole.
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        named = resolve_checkpoint(config.resume, name="last")
        refuse_unusable(named)  # before anything of a run is made or moved
        return named
    found = newest_valid_checkpoint(run_dir / "checkpoints", say)
    if found is None and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"{run_dir}/checkpoints: no checkpoint is whole; start a new run, or copy one back")
    if found is None:
        say(f"resume=auto: no checkpoint in {run_dir}, starting fresh")
    return found


def write_run_files(run_dir: Path, config: TrainConfig, shard_digests: dict[str, str], say: Say) -> None:
    """Make the run folder, with config.yaml and environment.json; says which settings a resumed run changes."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = without_secrets(asdict(config))
    path = run_dir / "config.yaml"
    if path.is_file():
        before, now = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(settings)
        changed = [
            f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key] and key not in ("resume", "run_dir")
        ]
        if changed:
            say("changed since this run was last started: " + "; ".join(changed))
    write_text(path, yaml.safe_dump(settings, sort_keys=False))
    record_start(run_dir / "environment.json", describe_environment(shard_digests), say)


def record_start(path: Path, environment: dict[str, Any], say: Say) -> None:
    """Write environment.json: what this start runs in, and under `earlier_starts` the same of those before it, oldest first."""
    earlier: list[dict[str, Any]] = []
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*before.pop("earlier_starts", []), before]
        except (json.JSONDecodeError, AttributeError) as error:
            kept = path.with_name("environment.damaged.json")
            os.replace(path, kept)
            say(f"{path} cannot be read ({error}); it is kept as {kept.name}, and the earlier starts are no longer listed")
    write_text(path, json.dumps({**environment, "earlier_starts": earlier}, indent=1) + "\n")


def run_id(run_dir: Path) -> str:
    """What tells this run from others in W&B, drawn at its first start: another folder of the same name is another run.

    Empty on processes that are not the first, unless it is there already.
    """
    path = run_dir / "run_id.txt"
    if not path.is_file():
        if not is_first_process():
            return ""
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def describe_environment(shard_digests: dict[str, str]) -> dict[str, Any]:
    """What a reader needs to run it again; of SLURM the job and its nodes, no other host names, no environment variables."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "slurm": slurm.describe_job(),
        "shard_index_digests": shard_digests,
    }


def _git(*arguments: str) -> str:
    """Output of git in this program's repository, empty where there is none."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.strip()


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {key: value for name, item in tree.items() for key, value in _flat(item, f"{prefix}{name}.").items()}


def lowest_validation_loss(run_dir: Path) -> float | None:
    """The best `val/loss` of a run's metrics.csv, nats; None where nothing was validated or written."""
    try:
        with open(run_dir / "metrics.csv", newline="", encoding="utf-8") as file:
            losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    except FileNotFoundError:
        return None
    return min(losses, default=None)
