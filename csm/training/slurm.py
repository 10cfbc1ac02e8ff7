"""What SLURM says about this process: whether srun started it, in which job, and how to queue that job again.

The variables of a job are also set where srun did not start the program: in the shell of `salloc` and in a batch script.
There it runs as on any machine.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

from csm.config import TrainerConfig

_INTERACTIVE = ("bash", "interactive")  # job names of `srun --pty bash` and salloc: steps too, but a person types in them
_JOB_VARIABLES = {
    "job_id": "SLURM_JOB_ID",
    "job_name": "SLURM_JOB_NAME",
    "array_job_id": "SLURM_ARRAY_JOB_ID",
    "array_task_id": "SLURM_ARRAY_TASK_ID",
    "partition": "SLURM_JOB_PARTITION",
    "nodes": "SLURM_JOB_NODELIST",
    "num_nodes": "SLURM_JOB_NUM_NODES",
    "num_tasks": "SLURM_NTASKS",
    "num_restarts": "SLURM_RESTART_COUNT",
}


def job_id() -> str | None:
    return os.environ.get("SLURM_JOB_ID")


def started_by_srun() -> bool:
    """Whether this process is a task that srun started."""
    return "SLURM_STEP_ID" in os.environ and "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in _INTERACTIVE


def num_tasks() -> int:
    """How many processes srun started together with this one, itself included."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) if started_by_srun() else 1


def cluster_environment(config: TrainerConfig) -> Any:
    """How Lightning finds the other processes: its environment for srun's tasks, the plain one where there are no tasks in
    spite of SLURM's variables, or None: Lightning looks by itself.

    Raises:
        ValueError: if srun started another number of tasks than the run has processes.
    """
    from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

    if "SLURM_JOB_ID" not in os.environ or TorchElasticEnvironment.detect():
        return None
    tasks, processes = num_tasks(), config.devices * config.num_nodes
    if tasks == 1:
        return LightningEnvironment()
    if tasks != processes:
        raise ValueError(
            f"srun started {tasks} tasks, trainer.devices={config.devices} x trainer.num_nodes={config.num_nodes} make {processes}; "
            "start one task a device, as slurm/train.sbatch does"
        )
    if "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ValueError(f"srun started {tasks} tasks: say how many a node with --ntasks-per-node, as slurm/train.sbatch does")
    return SLURMEnvironment(auto_requeue=False)  # its own saves inside the signal handler and hangs when ranks are not in step


def describe_job() -> dict[str, str] | None:
    """Job, nodes and tasks, for the record; None outside SLURM."""
    if job_id() is None:
        return None
    return {name: os.environ[variable] for name, variable in _JOB_VARIABLES.items() if variable in os.environ}


def requeue() -> str | None:
    """Put this process's job back into the queue under its id, which ends the job; what went wrong, or None."""
    done = _scontrol("requeue", str(job_id()))
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"scontrol ended with {done.returncode}"


def is_preempted() -> bool:
    """Whether the job was told to make room and SLURM leaves it time to go by itself, which SLURM takes for its end."""
    told = dict(item.partition("=")[::2] for item in _scontrol("show", "job", "-o", str(job_id())).stdout.split())
    return told.get("JobState") == "RUNNING" and told.get("PreemptTime", "None") != "None"


def _scontrol(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(["scontrol", *arguments], 1, "", str(error))
