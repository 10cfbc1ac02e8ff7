"""Around a run: its folder, what is recorded of its surroundings, its loggers, and the Lightning Trainer."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from csm.config import LoggerConfig, TrainConfig, TrainerConfig
from csm.model.pretrained import resolve_checkpoint
from csm.training.checkpoint import FolderCheckpointIO, Say, list_checkpoints, newest_valid_checkpoint

RUN_DIR_VARIABLE = "CSM_RUN_DIR"  # tells the processes that Lightning starts which folder their parent chose
_PACKAGES = ("torch", "lightning", "transformers", "safetensors", "numpy", "hydra-core", "wandb", "webdataset")


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
    if int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))) > 1:
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
    """
    if config.resume is None:
        return None
    if config.resume != "auto":
        return resolve_checkpoint(config.resume, name="last")
    found = newest_valid_checkpoint(run_dir / "checkpoints", say)
    if found is None and list_checkpoints(run_dir / "checkpoints"):
        raise ValueError(f"{run_dir}/checkpoints: no checkpoint is whole; start a new run, or copy one back")
    if found is None:
        say(f"resume=auto: no checkpoint in {run_dir}, starting fresh")
    return found


def write_run_files(run_dir: Path, config: TrainConfig, shard_digests: dict[str, str], say: Say) -> None:
    """Make the run folder, with config.yaml and environment.json; says which settings a resumed run changes."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    settings = asdict(config)
    path = run_dir / "config.yaml"
    if path.is_file():
        before, now = _flat(yaml.safe_load(path.read_text(encoding="utf-8"))), _flat(settings)
        changed = [
            f"{key}: {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key] and key not in ("resume", "run_dir")
        ]
        if changed:
            say("changed since this run was last started: " + "; ".join(changed))
    _write(path, yaml.safe_dump(settings, sort_keys=False))
    _write(run_dir / "environment.json", json.dumps(describe_environment(shard_digests), indent=1) + "\n")


def describe_environment(shard_digests: dict[str, str]) -> dict[str, Any]:
    """What a reader needs to run it again; no host names, no environment variables."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": _git("rev-parse", "HEAD"),
        "has_uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "packages": packages,
        "machine": platform.machine(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "shard_index_digests": shard_digests,
    }


def build_loggers(config: LoggerConfig, run_dir: Path, run_config: TrainConfig) -> list[Logger]:
    """Loggers besides metrics.csv.

    Raises:
        ValueError: if W&B is to be online and nobody is logged in.
    """
    if config.name != "wandb":
        return []
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    if config.mode == "online" and not wandb.login(prompt=False):  # False: no credentials anywhere; asks nobody
        raise ValueError("logger=wandb: not logged in; run `wandb login`, or set logger.mode=offline, or logger=csv")
    name = f"{run_config.experiment_name}-{run_dir.name}"
    settings = wandb.Settings(console="off", silent=True)
    # The id makes a resumed run go on in its own record.
    logger = WandbLogger(
        project=config.project, name=name, id=name, save_dir=str(run_dir), resume="allow", mode=config.mode, settings=settings
    )
    logger.log_hyperparams(asdict(run_config))
    return [logger]


def build_trainer(
    config: TrainerConfig, run_dir: Path, *, callbacks: Sequence[Callback], loggers: Sequence[Logger], checkpoint_io: FolderCheckpointIO
) -> Trainer:
    """A Trainer that runs one epoch of our steps and leaves logging, saving and showing to our callbacks."""
    quiet_lightning()
    plugins: list[Any] = [checkpoint_io]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's own saves inside the signal handler
    num_processes = config.devices * config.num_nodes
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=DDPStrategy(gradient_as_bucket_view=True) if config.strategy == "ddp" or num_processes > 1 else "auto",
        # bf16-true is a matter of the weights' dtype: Lightning's plugin would also change torch's default dtype.
        precision="bf16-mixed" if config.precision == "bf16-mixed" else "32-true",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        plugins=plugins,
        default_root_dir=run_dir,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1,  # of its own records, which are empty; more than the steps of a short run makes it warn
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def set_up_torch(config: TrainConfig) -> None:
    """Threads, determinism, and the global seed (which nothing of ours draws from)."""
    if config.trainer.num_threads:
        torch.set_num_threads(config.trainer.num_threads)
    torch.manual_seed(config.seed)
    torch.backends.cuda.matmul.allow_tf32 = not config.trainer.deterministic
    if config.trainer.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time


def quiet_lightning() -> None:
    """Keep Lightning's tips and start-up lines from the terminal; its warnings about real trouble stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*GPU available but not used.*",
        ".*treespec, LeafSpec.*",
        ".*`log_every_n_steps`.*",
    ):
        warnings.filterwarnings("ignore", message=message)


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


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
