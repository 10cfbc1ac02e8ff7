"""Many processes: DDP and ZeRO give one process's losses, and ZeRO checkpoints load anywhere. On CPU, over gloo."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from csm.model.weights import stream_tensors
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


# ---- tensors written one at a time


def test_streamed_file_is_safetensors_own_byte_for_byte(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7).bfloat16(), "c.é": torch.arange(5), "e": torch.zeros(0, 3)}
    tensors |= {"s": torch.tensor(2.5), "m": torch.tensor([True, False]), "i": torch.arange(3).short(), "h": torch.randn(2).half()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    stream_tensors(tmp_path / "ours", {name: (tuple(t.shape), t.dtype, t.detach) for name, t in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
