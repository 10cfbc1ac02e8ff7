"""How long a training step is held by saving a checkpoint: written in the step, beside it, and by Lightning's own writer.

    python benchmarks/checkpoint.py                 # csm_small, 96M parameters; writes benchmarks/results/checkpoint.md; a minute
    python benchmarks/checkpoint.py --quick         # a tiny model, seconds: whether it runs

Each save holds the same weights and AdamW moments. The ways take turns in one process, so that a busy machine slows all of
them; medians of the rounds are shown, and of writing beside the step also the first, whose memory is fresh.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import yaml
from lightning.fabric.plugins.io import TorchCheckpointIO

from csm import CSM, ModelConfig, TransformerConfig, csm_loss
from csm.config import DataConfig
from csm.data.datamodule import CSMDataModule
from csm.training.background import BackgroundWriter
from csm.training.checkpoint import FolderCheckpointIO

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


def read_model_config(name: str) -> ModelConfig:
    """configs/model/<name>.yaml over ModelConfig's defaults."""
    values = yaml.safe_load((ROOT / "configs/model" / f"{name}.yaml").read_text(encoding="utf-8"))
    parts = {part: TransformerConfig(**values.pop(part)) for part in ("backbone", "depth_decoder")}
    return ModelConfig(**parts, **values)


class Training:
    """A model with its AdamW moments, and steps on made-up rows."""

    def __init__(self, config: ModelConfig, positions: int) -> None:
        self.model = CSM(config, seed=0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        data = CSMDataModule(DataConfig(kind="random", seq_len=positions, rows_per_batch=1), config)
        self._batch = next(iter(data.train_dataloader()))
        self.num_steps = 0

    def step(self) -> tuple[float, float]:
        """Seconds of one step, by the clock and of this thread's CPU time, which leaves out what other programs took."""
        before, cpu_before = time.perf_counter(), time.thread_time()
        csm_loss(self.model, self._batch, step=self.num_steps).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
        return time.perf_counter() - before, time.thread_time() - cpu_before

    def checkpoint(self) -> dict[str, object]:
        """What Lightning hands to a writer."""
        weights = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        return {"global_step": self.num_steps, "state_dict": weights, "optimizer_states": [self.optimizer.state_dict()]}


def seconds(work: Callable[[], object]) -> float:
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


def measure(training: Training, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by what was measured, one number a round."""
    writer = BackgroundWriter()
    beside, in_step = FolderCheckpointIO(training.model, writer=writer), FolderCheckpointIO(training.model)
    lightning = TorchCheckpointIO()
    times: dict[str, list[float]] = {}
    training.step()  # makes the moments

    def note(name: str, value: float) -> None:
        times.setdefault(name, []).append(value)

    def note_quiet_step() -> None:
        step_s, cpu_s = training.step()
        note("quiet step", step_s)
        note("quiet step, CPU", cpu_s)

    for index in range(rounds):
        print(f"round {index + 1} of {rounds}", file=sys.stderr, flush=True)
        note_quiet_step()
        note("in the step", seconds(lambda: in_step.save_checkpoint(training.checkpoint(), folder / "step_000001")))
        note_quiet_step()
        began = time.perf_counter()
        note("beside the step", seconds(lambda: beside.save_checkpoint(training.checkpoint(), folder / "step_000002")))
        busy = []
        while any(not job.done() for job in writer._pending):
            busy.append(training.step())
        writer.finish()
        note("until it is on disk", time.perf_counter() - began)
        busy = busy[:-1] or busy  # the last one may outlive the write
        note("step beside a write", statistics.mean(step_s for step_s, _ in busy))
        note("step beside a write, CPU", statistics.mean(cpu_s for _, cpu_s in busy))
        note_quiet_step()
        note("Lightning", seconds(lambda: lightning.save_checkpoint(training.checkpoint(), folder / "lightning.ckpt")))
    writer.close()
    return times


def report(times: dict[str, list[float]], training: Training, num_bytes: int, command: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cpus = (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    median = {name: statistics.median(values) for name, values in times.items()}
    sync, first, step = median["in the step"], times["beside the step"][0], median["quiet step"]
    rows = [
        ("Lightning's `TorchCheckpointIO` (pickle, not flushed, not checked)", median["Lightning"]),
        ("ours, written in the step (`trainer.async_checkpoint=false`)", sync),
        ("ours, beside the step, the first of a run", first),
        ("ours, beside the step", median["beside the step"]),
    ]
    about = (
        f"{training.model.num_parameters / 1e6:.1f}M parameters in float32 with AdamW's moments: {num_bytes / GIB:.2f} GiB a checkpoint. "
        f"A step takes {step:.2f} s. Medians of {len(times['Lightning'])} rounds."
    )
    busy, busy_cpu = median["step beside a write"] / step, median["step beside a write, CPU"] / median["quiet step, CPU"]
    meanwhile = (
        f"Beside the step a checkpoint is on disk {median['until it is on disk']:.2f} s after the save began. A step meanwhile takes "
        f"{busy:.2f} of a quiet one's time by the clock, {busy_cpu:.2f} by its thread's CPU time, which leaves out other programs."
    )
    lines = [
        "# Checkpoint",
        "",
        f"- command: `{command}`",
        f"- commit: {commit or 'not in git'}; {date.today().isoformat()}",
        f"- machine: {next(cpus, platform.machine())}, {os.cpu_count()} cores; load average at the end {load}",
        f"- torch {torch.__version__}, python {platform.python_version()}, torch threads {torch.get_num_threads()}",
        "",
        about,
        "",
        "| a save | the step is held, s | of writing in the step |",
        "|---|---|---|",
        *(f"| {name} | {value:.3f} | {value / sync:.2f} |" for name, value in rows),
        "",
        meanwhile,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--positions", type=int, default=256, help="of the one row of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written unless --output is given")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/checkpoint.md")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tiny = TransformerConfig(num_layers=1, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
    config = ModelConfig(backbone=tiny, depth_decoder=tiny, max_seq_len=256) if arguments.quick else read_model_config("csm_small")
    training = Training(config, arguments.positions)
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=ROOT / "runs" if (ROOT / "runs").is_dir() else None))
    try:
        times = measure(training, folder, 1 if arguments.quick else arguments.rounds)
        num_bytes = sum(path.stat().st_size for path in (folder / "step_000002").rglob("*") if path.is_file())
    finally:
        shutil.rmtree(folder)
    text = report(times, training, num_bytes, " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]))
    print(text)
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/checkpoint.md")
    if output is not None:
        output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
