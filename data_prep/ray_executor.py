"""`executor=ray`: units as calls of Ray actors. Ray finds them room, starts them again where they are lost, and calls again.

The driver may be killed too: what is done is on disk (`engine`), and the same command goes on from there. Ray Data is not used: its
writer adds to what is there, so a second run would have everything twice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from csm.config import RayConfig
from data_prep.engine import ENCODE, Job, run_unit
from data_prep.local_executor import OnDone
from data_prep.planning import Unit

if TYPE_CHECKING:
    import ray

_TOKEN_HINT = (
    "where the cluster was started without a token and there is one here (~/.ray/auth_token, which Ray's own local start writes), "
    "give both the same RAY_AUTH_MODE, token or disabled"
)
_STORE_BYTES = 100_000_000  # of a Ray of our own: actors are sent names, and give back nothing


class _Worker:
    """Does units one after the other; its models stay loaded (`engine` and `stages` hold them, by process).

    Args:
        folder: where the driver runs, for relative paths of inputs, outputs and models.
    """

    def __init__(self, folder: str) -> None:
        os.chdir(folder)
        torch.set_num_threads(1)  # codes must not depend on how many threads the machine has

    def start(self) -> None:
        """Returns once there is a worker."""

    def models_used(self, job: Job) -> dict[str, Any]:
        assert job.listening is not None
        return job.listening.models_used()

    def do(self, unit: Unit, job: Job) -> None:
        run_unit(unit, job)


@contextmanager
def ray_workers(config: RayConfig, num_workers: int, job: Job) -> Iterator[RayWorkers]:
    """Connect to a cluster, or start Ray on this machine with `num_workers` CPUs; leave it, or stop it, at the end.

    Raises:
        ValueError: if Ray is not installed, there is no cluster at the address, or no machine of it has room for one worker.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('executor=ray: Ray is not installed here; run `pip install -e ".[ray]"` in this environment') from error
    address = config.address or os.environ.get("RAY_ADDRESS")
    ours: dict[str, Any] = {
        "num_cpus": num_workers,
        "object_store_memory": _STORE_BYTES,
        "include_dashboard": False,
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, **({} if address else ours))
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ValueError(
            f"ray.address={address}: no Ray there that lets us in ({error}); start one with `ray start --head` and give ray.address=auto "
            "on its machine (another address takes RAY_AUTH_MODE=token and its token), or leave the address out"
        ) from error
    try:
        yield RayWorkers(config, job)
    finally:
        ray.shutdown()


class RayWorkers:
    """Actors on a Ray that is connected to."""

    def __init__(self, config: RayConfig, job: Job) -> None:
        import ray

        self.config = config
        self.gpus = config.gpus if config.gpus is not None else float(_asks_for_gpu(job))
        self._actor = ray.remote(_Worker).options(
            num_cpus=config.cpus, num_gpus=self.gpus, max_restarts=-1, max_task_retries=config.max_retries
        )

    def models_used(self, job: Job) -> dict[str, Any]:
        """What listens, as a worker tells it: the driver's machine may have no GPU."""
        import ray

        self.num_fitting()
        return ray.get(self._start().models_used.remote(job))

    def run_units(self, units: Sequence[Unit], job: Job, on_done: OnDone) -> None:
        """Run units; `on_done` hears of each as it ends, with its error if it has one.

        A unit goes to a worker that is up and free, so one that waits for room in the cluster holds nothing up.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        queue = iter(units)
        job_ref = ray.put(job)
        num_actors = min(self.config.workers or self.num_fitting(), len(units))
        actors = [self._start() for _ in range(num_actors)]
        running: dict[ray.ObjectRef, tuple[Any, Unit | None]] = {actor.start.remote(): (actor, None) for actor in actors}
        del actors  # one without work leaves, and its place is another's
        while running:
            (ended,), _ = ray.wait(list(running))
            actor, unit = running.pop(ended)
            failure: Exception | None = None
            try:
                ray.get(ended)
            except RayTaskError as error:
                failure = error.cause if isinstance(error.cause, Exception) else error
            except RayActorError as error:
                why = " ".join(str(error).split())  # Ray says it in its last lines
                if unit is None:
                    raise ValueError(
                        f"executor=ray: no worker could start ({why}); {_TOKEN_HINT}, or see the logs in the cluster's session_latest/logs"
                    ) from error
                what = f"its worker died {self.config.max_retries + 1} times (ray.max_retries={self.config.max_retries}); out of memory?"
                failure = RuntimeError(f"{what} {why}")
            if unit is not None:
                on_done(unit, failure)
            elif failure is not None:
                raise ValueError(f"executor=ray: no worker could start ({failure})") from failure
            if (unit := next(queue, None)) is not None:
                running[actor.do.remote(unit, job_ref)] = actor, unit
            del actor

    def num_fitting(self) -> int:
        """How many workers the machines of the cluster have room for, one at least.

        Raises:
            ValueError: if none of them has room for one.
        """
        import ray

        needs = {name: amount for name, amount in (("CPU", self.config.cpus), ("GPU", self.gpus)) if amount}
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        num_fitting = sum(min(int(machine.get(name, 0.0) / amount) for name, amount in needs.items()) for machine in machines)
        if num_fitting == 0 and not self.config.workers:  # with ray.workers a cluster that grows is waited for
            asked = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
            has = "; ".join(", ".join(f"{machine.get(name, 0.0):g} {name}" for name in needs) for machine in machines)
            raise ValueError(
                f"executor=ray: a worker needs {asked} (ray.cpus, ray.gpus, a stage's device), the cluster's machines have {has}; "
                "ask for less, or give ray.workers= where the cluster grows"
            )
        return num_fitting

    def _start(self) -> Any:
        return self._actor.remote(os.getcwd())


def _asks_for_gpu(job: Job) -> bool:
    devices = [job.encode.device] if ENCODE in job.stages else []
    if job.listening is not None and set(job.stages) - {ENCODE}:
        devices.append(job.listening.transcribe.device)
    return any(device.startswith("cuda") for device in devices)
