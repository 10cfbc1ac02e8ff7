"""What asks a run to stop before its last step. Listens from the start of a run, before torch and Lightning are imported.

| signal | sent by | answer | exit status |
|---|---|---|---|
| SIGUSR1, SIGUSR2 | SLURM before the time limit (`--signal=USR1@120`; submitit takes USR2) | save, requeue the job | 0 |
| the same | anybody, outside a SLURM job, or where the job cannot be requeued | save, stop | 138, 140 |
| SIGTERM | scancel, a node that shuts down, a service manager | save, stop | 143 |
| SIGTERM | SLURM, to make room for another job | save, and requeue the job if SLURM gave it time to | 0 |
| SIGINT | Ctrl-C | save, stop; the second stops at once | 130 |

So status 0 says that all steps are done, or that SLURM will go on with them; 128 + the signal, that `resume=auto` will.
Of several processes the first tells the status, for it leaves last: srun ends the others when one fails.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

TIME_LIMIT_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """The signal that asked this process to stop. Handlers do no more than to set it: nothing is saved inside one.

    Attributes:
        number: of the signal, 0 while nobody asked. The highest, so that SIGTERM, which leaves least time, wins.
        answered: the number that all ranks ended the run for; 0 while it goes on, and when it came to its last step.
    """

    def __init__(self) -> None:
        self.number = 0
        self.answered = 0
        self._pid = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.listen(*TIME_LIMIT_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        for number in TIME_LIMIT_SIGNALS:
            if self._before[number] == signal.SIG_DFL:
                self._before[number] = signal.SIG_IGN  # a run that is done must not die of it while it closes its files
        self.stop_listening(*self._before)

    def listen(self, *numbers: int) -> None:
        """Take these signals, from the main thread only."""
        for number in numbers:
            self._before.setdefault(number, signal.signal(number, self._note))

    def stop_listening(self, *numbers: int) -> None:
        """Give signals back to whom they belonged before."""
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a data worker, forked from the run, is told with it: it ends when the run has no more need of it
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.number and is_first_process():
            os.write(sys.stderr.fileno(), b"\nstopping after this step; saving a checkpoint first\n")
        self.number = max(self.number, number)


def is_first_process() -> bool:
    """Whether this process talks: the first of those that Lightning, torchrun or srun started."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"))
