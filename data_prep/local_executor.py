"""`executor=local`: units in this process, or in a pool of processes on this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from data_prep.engine import Job, run_unit
from data_prep.planning import Unit

MAX_LOST_WORKERS = 3  # of one run; a fourth says that the machine, or a unit, kills them
OnDone = Callable[[Unit, Exception | None], None]


def run_units(units: Sequence[Unit], job: Job, num_workers: int, on_done: OnDone) -> None:
    """Run units in this process, or in `num_workers` of them; `on_done` hears of each as it ends, with its error if it has one.

    A worker that dies (out of memory, killed) is replaced, and its unit is done again.

    Raises:
        ValueError: when workers keep dying.
    """
    if num_workers == 1 or len(units) <= 1:
        for unit in units:
            failure: Exception | None = None
            try:
                run_unit(unit, job)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:
                failure = error
            on_done(unit, failure)
        return
    left = {unit.name: unit for unit in units}
    num_lost = 0
    while left:
        try:
            _run_in_pool(left, job, min(num_workers, len(left)), on_done)
        except BrokenProcessPool as error:
            num_lost += 1
            if num_lost > MAX_LOST_WORKERS:
                raise ValueError(
                    f"{num_lost} workers died, the last with {len(left)} units left; if memory ran out use fewer num_workers"
                ) from error


def _run_in_pool(left: dict[str, Unit], job: Job, num_workers: int, on_done: OnDone) -> None:
    # spawn: a forked child would inherit torch's thread pool, and hang.
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker) as pool:
        running: dict[Future[None], Unit] = {}
        queue = iter(list(left.values()))
        try:
            while True:
                while len(running) < 2 * num_workers and (unit := next(queue, None)) is not None:
                    running[pool.submit(_do, unit, job)] = unit
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    unit = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    del left[unit.name]
                    on_done(unit, error if isinstance(error, Exception) else None)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _do(unit: Unit, job: Job) -> None:
    run_unit(unit, job)  # its record is on disk; a unit of many hours would send megabytes of keys


def _start_worker() -> None:
    torch.set_num_threads(1)
