"""How a run ends before its last step: saved, on a signal."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer

from csm.training.module import CSMModule


class StopOnSignal(Callback):
    """Ctrl-C or SIGTERM ends the run after the step at hand, saved; a second Ctrl-C ends it at once."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, _: FrameType | None) -> None:
            if module.should_stop and number == signal.SIGINT:
                raise KeyboardInterrupt
            module.should_stop = True
            os.write(sys.stderr.fileno(), b"\nstopping after this step; saving a checkpoint first\n")

        self._before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        if module.should_stop:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, module: CSMModule) -> None:  # type: ignore[override]
        self._restore()

    def on_exception(self, trainer: Trainer, module: CSMModule, exception: BaseException) -> None:  # type: ignore[override]
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
