"""The Lightning Trainer of a run, and torch's settings."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy

from csm.allocator import keep_freed_memory
from csm.config import TrainConfig
from csm.training import slurm
from csm.training.checkpoint import FolderCheckpointIO
from csm.training.device import device_type


def build_trainer(
    run_config: TrainConfig, run_dir: Path, *, callbacks: Sequence[Callback], loggers: Sequence[Logger], checkpoint_io: FolderCheckpointIO
) -> Trainer:
    """A Trainer that runs one epoch of our steps and leaves logging, saving and showing to our callbacks."""
    quiet_lightning()
    config = run_config.trainer
    plugins: list[Any] = [checkpoint_io]
    cluster = slurm.cluster_environment(config)
    if cluster is not None:
        plugins.append(cluster)
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=_build_strategy(run_config),
        # bf16-true is a matter of the weights' dtype: Lightning's plugin would also change torch's default dtype. With ZeRO
        # bf16-mixed is, too: the engine keeps the float32 weights.
        precision="bf16-mixed" if config.precision == "bf16-mixed" and not config.strategy.startswith("zero") else "32-true",
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


def _build_strategy(config: TrainConfig) -> Strategy | str:
    if config.trainer.strategy.startswith("zero"):
        from csm.training.zero import ZeroStrategy  # DeepSpeed is an extra, and takes seconds to import

        return ZeroStrategy(config)
    is_one_process = config.trainer.devices * config.trainer.num_nodes == 1
    return "auto" if is_one_process and config.trainer.strategy == "auto" else DDPStrategy(gradient_as_bucket_view=True)


def set_up_torch(config: TrainConfig) -> None:
    """Threads, determinism, what becomes of freed memory, and the global seed (which nothing of ours draws from)."""
    if device_type(config) == "cpu":
        keep_freed_memory()
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
        ".*`srun` command is available.*",  # a login node is a fine place for a small run
    ):
        warnings.filterwarnings("ignore", message=message)
