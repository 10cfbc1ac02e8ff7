"""Trains a small run again and again in forked children that are killed or told to stop; prints what came of it as JSON.

    python -m tests.faults.killed_runs DATA WORK

Importing torch and Lightning takes seconds of CPU, so they are imported once, here, where no thread is started and nothing
is computed; a forked child then begins training within a moment. DATA holds shards and a tokenizer, runs go below WORK.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import csm.data.datamodule
import csm.training.background
import csm.training.loggers
import csm.training.metrics
import csm.training.progress
import csm.training.run_folder
import csm.training.samples
import csm.training.saving
import csm.training.signals
import csm.training.trainer  # noqa: F401  (imported by `train` only when it runs)
from csm.cli.train import train
from csm.codec import SpectralCodec
from csm.config import CodecConfig, DataConfig, LossConfig, OptimConfig, TextConfig, TrainConfig, TrainerConfig
from csm.text import WordTokenizer
from csm.training.module import CSMModule
from csm.training.steps import Step
from tests.conftest import tiny_config

NUM_STEPS = 24
NUM_CONVERSATIONS, ROWS_A_STEP = 24, 4  # one conversation a row: six steps an epoch
NUM_KILLS, NUM_KILLS_IN_WRITES = 30, 12
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def write_data(folder: Path, write_conversations: Callable, tokenizer: WordTokenizer, codec: SpectralCodec) -> Path:
    """Shards, tokenizer and codec; every conversation fills more than half a row of 32, so that none shares one."""
    conversations = [[(index % 4, "one two", 14 + index % 7)] for index in range(NUM_CONVERSATIONS)]
    for split, part in (("train", conversations), ("validation", conversations[:3])):
        write_conversations(folder / split, part, digest=codec.digest)
    codec.save(folder / "codec")
    tokenizer.save(folder)
    return folder


def run_config(data: Path, run_dir: Path) -> TrainConfig:
    """Some hundred milliseconds of training that draws, drops, clips, averages, validates and saves."""
    return TrainConfig(
        run_dir=str(run_dir),
        resume="auto",
        model=tiny_config(),
        data=DataConfig(kind="shards", path=str(data), seq_len=32, rows_per_batch=2, max_val_batches=1),
        codec=CodecConfig(num_codebooks=4),
        text=TextConfig(tokenizer="words"),
        loss=LossConfig(amortization=0.25, frame_dropout=0.3),
        optim=OptimConfig(lr=0.01, warmup_steps=3),
        trainer=TrainerConfig(
            max_steps=NUM_STEPS, accumulate=2, checkpoint_every=3, keep_every=9, validate_every=6, log_every=2, deterministic=True
        ),
    )


def outcome(run_dir: Path) -> dict[str, bytes]:
    """Every byte that a run is judged by: metrics and checkpoints, pointers included."""
    files = [run_dir / "metrics.csv", *(path for path in sorted((run_dir / "checkpoints").rglob("*")) if path.is_file())]
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in files}


class Children:
    """Forks children that train; each writes the samples of every step it did to a file beside its run folder."""

    def __init__(self, data: Path, work: Path) -> None:
        self.data, self.work = data, work

    def start(self, name: str, *, signal_number: int | None = None, is_in_step: bool = False, num_workers: int = 0) -> int:
        """The process id of a child that trains run `name`, from its newest checkpoint on.

        Args:
            signal_number: the child sends it to itself: before its first step, which is then its only one, or
            is_in_step: in the midst of it, which gives it a second one.
        """
        config = run_config(self.data, self.work / name)
        config = replace(config, data=replace(config.data, num_workers=num_workers))
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            log = os.open(self.work / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            _record_steps(self.work / f"{name}.seen")
            if signal_number is not None:
                _send_once("training_step" if is_in_step else "on_train_start", signal_number)
            train(config)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def finish(self, name: str) -> None:
        self.wait(self.start(name), name)

    def wait(self, pid: int, name: str) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            raise SystemExit(f"{name} ended with {status}:\n{(self.work / f'{name}.log').read_text()[-3000:]}")

    def kill(self, pid: int, is_time: Callable[[], bool]) -> bool:
        """Kill a child when it is time; False where it was done before."""
        while not is_time():
            if os.waitpid(pid, os.WNOHANG)[0]:
                return False
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def _record_steps(path: Path) -> None:
    """Let every step append a line (step, samples) when it is done."""
    training_step = CSMModule.training_step

    def recorded(module: CSMModule, batch: Step, batch_idx: int) -> None:
        training_step(module, batch, batch_idx)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([module.step, batch.keys]) + "\n")

    setattr(CSMModule, "training_step", recorded)  # noqa: B010  (a plain assignment is refused by mypy)


def _send_once(hook: str, number: int) -> None:
    """Let the first call of a hook begin with a signal to this process."""
    original = getattr(CSMModule, hook)
    sent: list[int] = []

    def signalled(module: CSMModule, *arguments: object) -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        original(module, *arguments)

    setattr(CSMModule, hook, signalled)


def kill_at_random_moments(children: Children, whole_s: float) -> list[dict[str, object]]:
    """Kill runs, some of the kills inside the writing of a checkpoint, and resume each until it is done.

    Args:
        whole_s: wall time of an uninterrupted run.
    """
    draw = random.Random(0)
    in_writes = [index < NUM_KILLS_IN_WRITES for index in range(NUM_KILLS)]
    draw.shuffle(in_writes)
    kills: list[dict[str, object]] = []
    run = 0
    while len(kills) < NUM_KILLS:
        name = f"killed_{run}"
        run += 1
        for _ in range(4):  # kills of one run at most, so that none is killed for ever
            if len(kills) == NUM_KILLS:
                break
            is_in_write = in_writes[len(kills)]
            delay_s = draw.uniform(0.0, 0.02) if is_in_write else draw.uniform(0.0, whole_s)
            skipped = draw.randrange(3)  # writes that are let pass
            is_time = _in_write(children.work / name / "checkpoints", skipped, delay_s) if is_in_write else _after(delay_s)
            if not children.kill(children.start(name), is_time):
                break
            folder = children.work / name / "checkpoints"
            left = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
            kills.append({"run": name, "in_write": is_in_write, "left": left})
        children.finish(name)
    return kills


def _after(delay_s: float) -> Callable[[], bool]:
    due_s = time.monotonic() + delay_s
    return lambda: time.monotonic() >= due_s


def _in_write(folder: Path, skipped: int, delay_s: float) -> Callable[[], bool]:
    """Whether a half-written checkpoint has been seen for `delay_s`, after `skipped` others."""
    seen: list[str] = []
    due_s = float("inf")

    def is_time() -> bool:
        nonlocal due_s
        for path in folder.glob("step_*.tmp"):
            if path.name not in seen:
                seen.append(path.name)
                due_s = time.monotonic() + delay_s if len(seen) > skipped else due_s
        return time.monotonic() >= due_s

    return is_time


def main(data: Path, work: Path) -> None:
    assert threading.active_count() == 1, "a fork would not copy the other threads"
    torch.set_num_threads(1)
    children = Children(data, work)
    started_at_s = time.monotonic()
    children.finish("whole")
    whole_s = time.monotonic() - started_at_s
    for num_workers in (1, 2):
        children.wait(children.start(f"workers_{num_workers}", num_workers=num_workers), f"workers_{num_workers}")
    for name, num_stops in (("stopped", NUM_STEPS - 1), ("stopped_in_step", NUM_STEPS // 2 - 1)):
        for index in range(num_stops):
            pid = children.start(name, signal_number=SIGNALS[index % 2], is_in_step=name == "stopped_in_step")
            children.wait(pid, name)
        children.finish(name)
    stopped_s = time.monotonic() - started_at_s - whole_s
    kills = kill_at_random_moments(children, whole_s)
    print(json.dumps({"kills": kills, "whole_s": whole_s, "stopped_s": stopped_s, "all_s": time.monotonic() - started_at_s}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
