"""Who does the units: this process and its pool, workers of a Ray cluster, or slices of a SLURM array. All run `engine.run_unit`.

What is done is told from the disk before and after, so every executor goes on where another, or a killed one, was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from csm.config import PrepConfig
from data_prep.engine import Job, locked, read_all_done, units_of_slice
from data_prep.local_executor import OnDone, run_units
from data_prep.planning import Unit
from data_prep.ray_executor import ray_workers
from data_prep.slurm_executor import report_slices, run_slices
from data_prep.stages import TRANSCRIBE

MODELS_NAME = "models.json"


def do_units(config: PrepConfig, job: Job, units: Sequence[Unit], overrides: Sequence[str], console: Console) -> int:
    """Do the stages asked for of this slice's units that are not done. Returns 1 when one could not be.

    Args:
        overrides: of the command line, for an executor that runs the command elsewhere.
    Raises:
        FileExistsError: if another process is at it.
        ValueError: if the executor cannot be had.
    """
    if config.executor == "slurm":
        with locked(job.work / "slurm.lock", what=f"{job.output}, by executor=slurm,"):
            return _by_slurm(config, job, units, overrides, console)
    lock = job.work / f"slice-{config.slice_index}-of-{config.slice_count}.lock"
    with locked(lock, what=f"slice {config.slice_index} of {config.slice_count} of {job.output}"):
        if config.executor == "local":
            know_models(job)
            mine = units_of_slice(units, config.slice_index, config.slice_count)
            return _with_progress(config, job, mine, console, lambda todo, on_done: run_units(todo, job, config.num_workers, on_done))
        with ray_workers(config.ray, config.num_workers, job) as workers:
            if job.listening is not None and TRANSCRIBE in job.stages:
                job.listening.models = workers.models_used(job)
            know_models(job)
            return _with_progress(config, job, units, console, lambda todo, on_done: workers.run_units(todo, job, on_done))


def know_models(job: Job) -> None:
    """Write down which models listen, or read which listened."""
    if job.listening is None:
        return
    if TRANSCRIBE in job.stages:
        job.listening.models_used()
        with locked(job.work / "models.lock", what=MODELS_NAME, is_waiting=True):  # slices begin together
            job.listening.remember_models(job.work / MODELS_NAME)
    else:
        job.listening.recall_models(job.work / MODELS_NAME)


def _with_progress(
    config: PrepConfig, job: Job, mine: Sequence[Unit], console: Console, run: Callable[[Sequence[Unit], OnDone], None]
) -> int:
    todo = _left(mine, job)
    errors: dict[str, Exception] = {}
    total_h = sum(unit.duration_s for unit in todo) / 3600
    columns = (
        TextColumn(" + ".join(job.stages)),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("units, {task.fields[done_h]:.2f} of {task.fields[total_h]:.2f} h"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(todo), done_h=0.0, total_h=total_h)

        def on_done(unit: Unit, error: Exception | None) -> None:
            if error is not None:
                errors[unit.name] = error
            done_h = progress.tasks[task].fields["done_h"] + unit.duration_s / 3600
            progress.update(task, advance=1, done_h=done_h)
            if not console.is_terminal:  # a log file has no moving bar
                state = "done" if error is None else "failed"
                console.print(f"unit {unit.name} {state}; {done_h:.2f} of {total_h:.2f} h", highlight=False)

        run(todo, on_done)
    part = f"slice {config.slice_index} of {config.slice_count}: " if config.slice_count > 1 else ""
    console.print(f"{part}{len(mine)} units, {len(mine) - len(todo)} were done, {len(errors)} failed", highlight=False)
    for name, error in sorted(errors.items()):
        console.print(f"unit {name}: {escape(f'{type(error).__name__}: {error}')}", style="red", highlight=False)
    return int(bool(errors))


def _by_slurm(config: PrepConfig, job: Job, units: Sequence[Unit], overrides: Sequence[str], console: Console) -> int:
    """Nothing is loaded here, which may be a login node: slices write down which models listened."""
    before = _left_by_slices(units, job)
    if before:
        array = run_slices(config.slurm, job, overrides, console)
        left = _left_by_slices(units, job)
        report_slices(config.slurm, array, units, left, console)
        if job.listening is not None and job.listening.models is None:
            raise ValueError(f"executor=slurm: no slice of job {array} came as far as listening; its logs are named above")
    else:
        left = before
    console.print(f"{len(units)} units, {len(units) - len(before)} were done, {len(left)} are not", highlight=False)
    return int(bool(left))


def _left_by_slices(units: Sequence[Unit], job: Job) -> list[Unit]:
    if job.listening is not None:
        job.listening.recall_models(job.work / MODELS_NAME)
        if job.listening.models is None:  # nobody has listened yet
            return list(units)
    return _left(units, job)


def _left(units: Sequence[Unit], job: Job) -> list[Unit]:
    return [unit for unit, record in zip(units, read_all_done(units, job), strict=True) if record is None]
