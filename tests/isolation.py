"""Runs a command in a network, mount and process namespace of its own, for tests that open ports or start daemons.

torch's rendezvous, gloo, Ray and SLURM bind every interface; inside, the only interface is loopback. It also has the
address 192.0.2.77 (documentation range, RFC 5737), for what asks for a second one. /dev/shm is private, so what a
killed process leaves there goes with it, and so do processes that the command leaves behind.

    done = run_isolated([sys.executable, "train.py", "trainer=ddp", "trainer.devices=2"], timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECOND_ADDRESS = "192.0.2.77"
_UNSHARE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
QUIET_LOOPBACK = {
    "MASTER_ADDR": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",  # two processes share the cores
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}


@cache
def why_not_isolated() -> str | None:
    """Why namespaces cannot be had here (root and unshare are needed), or None when they can."""
    try:
        tried = subprocess.run(inside(["true"]), capture_output=True, text=True, timeout=30)
    except OSError as error:
        return f"unshare cannot be run ({error})"
    return None if tried.returncode == 0 else f"no namespace of its own here ({tried.stderr.strip()[-200:]}); it takes root"


def run_isolated(
    argv: Sequence[str | os.PathLike[str]], *, env: Mapping[str, str] | None = None, timeout: float, cwd: str | Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run `argv` inside and return its status and output; the test is skipped where namespaces cannot be had.

    Args:
        env: added to this process's environment, over what keeps torch on loopback and to one thread.
        timeout: seconds; then everything inside is killed and `subprocess.TimeoutExpired` raised, output attached.
    """
    reason = why_not_isolated()
    if reason is not None:
        import pytest  # here, for inside the namespace this file runs without packages

        pytest.skip(reason)
    environment = {**os.environ, **QUIET_LOOPBACK, **(env or {})}
    command = inside([os.fspath(argument) for argument in argv])
    with subprocess.Popen(
        command, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            process.kill()  # unshare's --kill-child takes the namespace's first process along, and that everything in it
            out, err = process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise subprocess.TimeoutExpired(command, timeout, out, err) from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def inside(argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` inside, for tests that keep a namespace open and enter it again."""
    return [*_UNSHARE, sys.executable, "-I", "-S", __file__, *argv]


def _set_up() -> None:
    for command in (
        ("ip", "link", "set", "lo", "up"),
        ("ip", "addr", "add", f"{SECOND_ADDRESS}/32", "dev", "lo"),
        ("mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", "/dev/shm"),
    ):
        subprocess.run(command, check=True)


def _run_as_first_process(argv: Sequence[str]) -> int:
    """Start `argv`, reap whatever dies, and return its status once it ends: the kernel then ends the rest.

    The command itself must not be the first process, to which SIGTERM means nothing.
    """
    child = subprocess.Popen(argv)
    while True:
        pid, status = os.wait()
        if pid == child.pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    _set_up()
    sys.exit(_run_as_first_process(sys.argv[1:]))
