"""`executor=slurm`: the units as slices of a job array of slurm/prep_array.sbatch; the command waits for it and looks what is done.

SLURM does all the work: `sbatch --wait` returns when the last task has ended. Which slices did not end theirs is read from the
disk, so it is right whatever became of the tasks, with accounting or without.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from csm.config import SlurmConfig
from data_prep.engine import Job, units_of_slice
from data_prep.planning import Unit

SCRIPT = Path("slurm/prep_array.sbatch")
_OWN_KEYS = ("executor", "slurm.", "stages", "slice_index", "slice_count")  # of the command line: not the slices'


def run_slices(config: SlurmConfig, job: Job, overrides: Sequence[str], console: Console) -> str:
    """Submit the array, behind one that an earlier command left, and wait until it has ended; returns its id.

    Args:
        overrides: of the command line; each slice is run with them.
    Raises:
        ValueError: if this is no place to submit from, or SLURM refuses the array.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("executor=slurm: there is no sbatch here; run it on a login node, or leave executor= out")
    if not SCRIPT.is_file():
        raise ValueError(f"executor=slurm: no {SCRIPT} here; run it from the repository's root")
    name = f"csm-prep-{hashlib.sha256(str(job.output.resolve()).encode()).hexdigest()[:8]}"
    earlier = sorted(set(_ask(["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"]).split()))
    command = ["sbatch", "--wait", "--parsable", f"--job-name={name}", f"--array=0-{config.slices - 1}"]
    command += [f"--dependency=afterany:{':'.join(earlier)}"] if earlier else []
    kept = [override for override in overrides if not override.lstrip("+~").startswith(_OWN_KEYS)]
    command += [*config.options, str(SCRIPT), *kept, f"stages=[{','.join(job.stages)}]"]
    behind = f", behind {', '.join(earlier)} of an earlier command" if earlier else ""
    console.print(
        f"array job {name} of {config.slices} slices{behind}; squeue --me --name={name}; logs slurm/logs/{name}-*.out",
        highlight=False,
        markup=False,
    )
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = re.match(r"\d+", done.stdout)
    if found is None:
        raise ValueError(f"executor=slurm: sbatch refused ({done.stderr.strip()}): {' '.join(command)}")
    return found[0]


def report_slices(config: SlurmConfig, array: str, units: Sequence[Unit], left: Sequence[Unit], console: Console) -> None:
    """Say which slices have units that are not done, and where to read why."""
    names = {unit.name for unit in left}
    for index in range(config.slices):
        mine = units_of_slice(units, index, config.slices)
        missing = [unit.name for unit in mine if unit.name in names]
        if missing:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            log = next((str(path) for path in sorted(SCRIPT.parent.glob(f"logs/*-{array}_{index}.out"))), "no log: it did not begin")
            console.print(
                f"slice {index} of {config.slices}: {len(missing)} of {len(mine)} units not done ({shown}); {log}",
                style="red",
                highlight=False,
                markup=False,
            )


def _ask(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ValueError(f"executor=slurm: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
