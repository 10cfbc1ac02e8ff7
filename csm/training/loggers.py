"""Where metrics go besides metrics.csv."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lightning.pytorch.loggers import Logger

from csm.config import LoggerConfig, TrainConfig


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
