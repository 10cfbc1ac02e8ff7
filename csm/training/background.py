"""Writing beside the training loop: tensors are copied in the step, and one thread does the slow part, one save at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

Job = Callable[[], object]
_log = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs the jobs of one save in order in a thread, or at once where `is_async` is off.

    At most one save is in flight: `make_room` waits for the one before. A job that fails keeps those after it from
    running, and its error is raised by the next call.

    Attributes:
        num_waits, waited_s: saves that found the one before still being written, and what waiting for it took.
    """

    def __init__(self, is_async: bool = True) -> None:
        self.is_async = is_async
        self.num_waits, self.waited_s = 0, 0.0
        self._pending: list[Future[object]] = []
        self._thread: ThreadPoolExecutor | None = None

    def make_room(self) -> None:
        """Wait until nothing is in flight."""
        if any(not job.done() for job in self._pending):
            before = time.monotonic()
            self.num_waits += 1
            self.finish()
            self.waited_s += time.monotonic() - before
        self.finish()

    def start(self, job: Job) -> None:
        """Begin a save with `job`, when the one before is done."""
        self.make_room()
        if self.is_async:
            self._submit(job)
        else:
            job()

    def then(self, job: Job) -> None:
        """Run `job` after what is in flight, or now when nothing is."""
        if not self._pending:
            job()
            return
        before = self._pending[-1]

        def run() -> None:
            before.result()
            job()

        self._submit(run)

    def check(self) -> None:
        """Raise the error of a job that failed; does not wait for one that runs."""
        if any(job.done() and job.exception() is not None for job in self._pending):
            self.finish()

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: the first error of a job, once.
        """
        pending, self._pending = self._pending, []
        errors = [job.exception() for job in pending]
        for error in errors:
            if error is not None:
                raise error

    def close(self) -> None:
        """Finish, and end the thread."""
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None

    def _submit(self, job: Job) -> None:
        if self._thread is None:  # not before the first save, so that a loader's workers are forked without it
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending.append(self._thread.submit(job))


class TensorCopies:
    """Copies of tensors in host memory, page-locked where the tensors are on a GPU; the memory is kept for the next time."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._has_said_no = False

    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors as they are now, each a copy that the next call overwrites; None where memory is too short for them."""
        missing = {name: tensor for name, tensor in tensors.items() if not self._fits(name, tensor)}
        num_bytes = sum(tensor.nbytes for tensor in missing.values())
        if num_bytes and not self._may_take(num_bytes):
            return None
        for name, tensor in missing.items():
            self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        for device in devices:
            torch.cuda.synchronize(device)
        return {name: self._buffers[name] for name in tensors}

    def _fits(self, name: str, tensor: Tensor) -> bool:
        buffer = self._buffers.get(name)
        return buffer is not None and buffer.shape == tensor.shape and buffer.dtype == tensor.dtype

    def _may_take(self, num_bytes: int) -> bool:
        available = available_memory_bytes()
        if available is None or num_bytes * 1.25 < available:  # the rest is for the next step's activations
            return True
        if not self._has_said_no:
            gib = 2**30
            _log.warning(
                "checkpoints are written in the step: copies for writing beside it need %.1f GiB, %.1f GiB are free",
                num_bytes / gib,
                available / gib,
            )
            self._has_said_no = True
        return False


def available_memory_bytes() -> int | None:
    """Host memory that this process may still take, the limits of its control groups included; None where Linux does not say."""
    try:
        free = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text(encoding="ascii").strip().rpartition("::/")[2]
    except (OSError, KeyError):
        return None
    for folder in (group, *group.parents):  # a batch system limits the job, whose processes are in groups below
        try:
            limit = int((folder / "memory.max").read_text(encoding="ascii"))
            used = int((folder / "memory.current").read_text(encoding="ascii")) - _numbers(folder / "memory.stat")["inactive_file"]
        except (OSError, KeyError, ValueError):  # no limit ("max"), or none that can be read
            continue
        free = min(free, limit - used)
    return free


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line of a kernel's table, by name."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
