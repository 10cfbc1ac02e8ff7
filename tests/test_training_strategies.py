"""Many processes: DDP and ZeRO give one process's losses, and ZeRO checkpoints load anywhere. On CPU, over gloo."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.isolation import SECOND_ADDRESS, run_isolated

# ---- the fixture itself


def test_isolated_command_sees_loopback_only_and_a_shared_memory_of_its_own() -> None:
    script = (
        "import os, socket; print(sorted(name for _, name in socket.if_nameindex())); print(os.listdir('/dev/shm'));"
        f"s = socket.create_server(('{SECOND_ADDRESS}', 0)); print(socket.create_connection(s.getsockname()).getpeername()[0]);"
        "print(os.environ['WORD']); os.kill(os.getpid(), 15)"
    )
    done = run_isolated([sys.executable, "-u", "-c", script], env={"WORD": "given"}, timeout=60)
    assert done.stdout.split("\n")[:4] == ["['lo']", "[]", SECOND_ADDRESS, "given"], done.stdout + done.stderr
    assert done.returncode == 128 + 15


def test_isolated_command_that_takes_too_long_is_killed_with_its_children() -> None:
    script = "import subprocess, sys, time; subprocess.Popen(['sleep', '987.654']); print('started', flush=True); time.sleep(100)"
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        run_isolated([sys.executable, "-c", script], timeout=2)
    assert "started" in caught.value.stdout
    time.sleep(0.2)
    assert "987.654" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
