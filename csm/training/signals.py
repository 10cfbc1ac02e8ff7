"""How a run ends before its last step: saved, on a signal, on all ranks after the same step."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from csm.training import slurm
from csm.training.checkpoint import Say
from csm.training.module import CSMModule
from csm.training.stop_request import TIME_LIMIT_SIGNALS, StopRequest, is_first_process


class StopOnSignal(Callback):
    """Ends the run after the step at hand when `request` says so; a second Ctrl-C ends it at once.

    A signal reaches the ranks at different moments. Each rank hands what it knows to the next step, where they agree
    (`CSMModule.should_stop`), so that none saves, which takes all of them, without the others.
    """

    def __init__(self, request: StopRequest | None = None) -> None:
        self._request = request if request is not None else StopRequest()

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        if threading.current_thread() is threading.main_thread():
            self._request.listen(signal.SIGINT, signal.SIGTERM)

    def on_train_batch_start(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        module.should_stop = self._request.number != 0

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        if module.should_stop:
            self._request.answered = self._highest(trainer, module)
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._request.stop_listening(signal.SIGINT, signal.SIGTERM)
        if module.step >= module.config.trainer.max_steps:
            self._request.answered = 0  # asked to stop in its last step: there is nothing to go on with

    def on_exception(self, trainer: Trainer, module: CSMModule, exception: BaseException) -> None:  # type: ignore[override]
        self._request.stop_listening(signal.SIGINT, signal.SIGTERM)

    def _highest(self, trainer: Trainer, module: CSMModule) -> int:
        """The request of all ranks: one of them may not have heard yet."""
        number = torch.tensor(self._request.number, device=module.device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number)


def answer(request: StopRequest, say: Say) -> int:
    """Requeue the SLURM job where that is asked for, and return the exit status; the last thing a saved run does.

    The table in `stop_request` says which signal gets which.
    """
    number = request.answered
    if not number or not is_first_process():
        return 0
    if slurm.started_by_srun() and (number in TIME_LIMIT_SIGNALS or slurm.is_preempted()):
        say(f"saved; putting job {slurm.job_id()} back into the queue, to go on from here")
        fault = slurm.requeue()  # which ends this job, and with it what it might say
        if fault is None:
            return 0
        say(f"job {slurm.job_id()} could not be put back ({fault}); submit it again with the same run_dir")
    return 128 + number
