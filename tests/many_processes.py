"""Trains one configuration after another in the same few processes, as a cluster's launcher would start them.

    python tests/many_processes.py <processes> '[["run_dir=out", "trainer=zero2", ...], ...]'

Starting torch and DeepSpeed takes seconds, so tests put several runs into one start. A run that ends with an error leaves the
message beside its folder, in `<run_dir>.stopped`. Meant for inside `tests.isolation.run_isolated`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(num_processes: int, jobs: str) -> int:
    """Start the processes as torchrun would, and return the first status that is not 0."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "TORCHELASTIC_RUN_ID": "tests", "PYTHONPATH": str(ROOT)}
    common |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen([sys.executable, __file__, "run", jobs], env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_processes)
    ]
    return next((status for status in [process.wait() for process in processes] if status), 0)


def run(jobs: list[list[str]]) -> None:
    """Train every job in this process; an error of one does not keep the next from running."""
    import torch

    from csm.cli.hydra_entry import compose
    from csm.cli.train import train
    from csm.config import TrainConfig

    torch.set_num_threads(1)
    for overrides in jobs:
        config = compose("train", overrides, TrainConfig)
        try:
            train(config)
        except (ValueError, OSError) as error:
            if os.environ["RANK"] == "0":
                Path(f"{config.run_dir}.stopped").write_text(str(error), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(json.loads(sys.argv[2]))
    else:
        sys.exit(start(int(sys.argv[1]), sys.argv[2]))
