"""Runs `python -m data_prep` on Ray or SLURM, kills its workers and itself, and runs it again; prints what came of it as JSON.

    python -m tests.faults.killed_executors ray|ray_without_token|slurm WORK OVERRIDE...

Outputs go below WORK. For a namespace of its own (tests.isolation, tests.e2e.slurm_cluster): it looks for workers by their names.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 60
WORKER_AT_WORK = b"ray::_Worker.do"


def start(output: Path, overrides: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "data_prep", *overrides, f"output={output}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, object]:
    said, _ = process.communicate(timeout=TIMEOUT_S)
    return {"status": process.returncode, "said": said}


def until(is_so: Callable[[], object], process: subprocess.Popen[str]) -> None:
    give_up_at = time.monotonic() + TIMEOUT_S
    while not is_so():
        if process.poll() is not None or time.monotonic() > give_up_at:
            raise SystemExit(f"it ended, or nothing happened, before it could be killed:\n{finish(process)}")
        time.sleep(0.001)


def done_units(output: Path) -> dict[str, list[int]]:
    """Finished units, and which folder each one has: doing a unit again makes another."""
    folders = {path.stem: (output / "prep/units" / path.stem).stat() for path in (output / "prep/done").glob("*.json")}
    return {unit: [status.st_ino, status.st_mtime_ns] for unit, status in folders.items()}


def processes(name: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (folder / "cmdline").read_bytes().startswith(name):
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def start_cluster() -> None:
    """One machine, which says that it has two GPUs."""
    ray = str(Path(sys.executable).with_name("ray"))
    has = ["--num-cpus=2", "--num-gpus=2", "--node-ip-address=127.0.0.1", "--port=6379", "--include-dashboard=false"]
    subprocess.run([ray, "start", "--head", *has, "--disable-usage-stats"], check=True, capture_output=True, timeout=TIMEOUT_S)


def on_ray(work: Path, overrides: list[str]) -> dict[str, object]:
    """The first run has a Ray of its own, the second one a cluster's."""
    start_cluster()
    output = work / "killed"
    killed_driver = start(output, [*overrides, "num_workers=2"])
    until(lambda: done_units(output) and processes(WORKER_AT_WORK), killed_driver)
    killed_driver.kill()
    killed_driver.wait()
    before = done_units(output)
    again = start(output, [*overrides, "ray.address=auto", "ray.gpus=1"])  # at once: old workers may still be at it
    old = set(processes(WORKER_AT_WORK))
    until(lambda: set(processes(WORKER_AT_WORK)) - old, again)
    os.kill((set(processes(WORKER_AT_WORK)) - old).pop(), signal.SIGKILL)
    return {"before": before, "again": finish(again), "after": done_units(output)}


def on_ray_without_token(work: Path, overrides: list[str]) -> dict[str, object]:
    """The cluster asks for no token, the command has one, as after a run with a Ray of its own."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    start_cluster()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "4" * 64}
    return finish(start(work / "refused", [*overrides, "ray.address=auto"]))


def on_slurm(work: Path, overrides: list[str]) -> dict[str, object]:
    output = work / "killed"
    command = start(output, overrides)
    until(lambda: done_units(output), command)
    subprocess.run(["scancel", "--me", "--full", "--signal=KILL"], check=True)
    slices_killed = finish(command)
    before = done_units(output)
    killed_driver = start(output, overrides)
    until(lambda: subprocess.run(["squeue", "--me", "--noheader", "--states=PD,R"], capture_output=True, check=True).stdout, killed_driver)
    killed_driver.kill()
    killed_driver.wait()
    again = finish(start(output, overrides))
    return {"slices_killed": slices_killed, "before": before, "again": again, "after": done_units(output)}


WAYS = {"ray": on_ray, "ray_without_token": on_ray_without_token, "slurm": on_slurm}

if __name__ == "__main__":
    print(json.dumps(WAYS[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])))
