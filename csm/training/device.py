"""What the device of a run can do, and what it holds: the numbers that speed and memory are told against."""

from __future__ import annotations

import re
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from csm.config import AUTO, TrainConfig
from csm.model.checkpoint_folder import Say
from csm.model.products import has_bfloat16_products

# Dense bfloat16 tensor TFLOP/s by data sheet (where only the sparse rate is printed, half of it), by the name torch reports.
# The first pattern that is found counts. Cards without bfloat16 (V100, T4) are left out, and so are names not listed here:
# their share stays empty until trainer.peak_tflops says what they can do.
_DATA_SHEET_TFLOPS = (
    (r"\bGB200\b", 2500.0),
    (r"\bB200\b", 2250.0),
    (r"\bMI300X\b", 1307.4),
    (r"\bH200 NVL\b", 835.5),
    (r"\bG?H200\b", 989.0),
    (r"\bH100 NVL\b", 835.5),
    (r"\bH100 PCIe\b", 756.0),
    (r"\bH[18]00\b", 989.0),
    (r"\bH20\b", 148.0),
    (r"\bA[18]00\b", 312.0),
    (r"\bA30\b", 165.0),
    (r"\bA40\b", 149.7),
    (r"\bA10\b", 125.0),
    (r"\bL40S\b", 362.0),
    (r"\bL40\b", 181.0),
    (r"\bL4\b", 121.0),
    (r"\bRTX 6000 Ada\b", 364.2),
    (r"\bRTX A6000\b", 154.8),
    (r"\bRTX 5090\b", 209.5),
    (r"\bRTX 4090\b", 165.2),
    (r"\bRTX 3090\b", 71.0),
)
GIB = 2**30
_MEASURE_S = 0.1  # enough for a dozen products of this size on one core
_MEASURE_WIDTH = 768


def data_sheet_tflops(name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a GPU by the name torch gives it; None where it is not known, and for a slice (MIG) of one."""
    if "MIG" in name.split():
        return None
    return next((tflops for pattern, tflops in _DATA_SHEET_TFLOPS if re.search(pattern, name)), None)


def device_type(config: TrainConfig) -> str:
    """What the run's accelerator comes to here: "cuda" or "cpu"."""
    return "cpu" if config.trainer.accelerator == "cpu" or not torch.cuda.is_available() else "cuda"


def settle_precision(config: TrainConfig, say: Say) -> TrainConfig:
    """The configuration with `trainer.precision=auto` settled for this machine; says so where bfloat16 asked for gains no time."""
    kind, precision = device_type(config), config.trainer.precision
    is_fast = has_bfloat16_products(kind)
    if not is_fast and config.optim.name == "muon":
        say(f"optim=muon: torch makes its momentum orthogonal in bfloat16, which takes long on this {kind}: optim=adamw is faster")
    if precision == AUTO:
        return replace(config, trainer=replace(config.trainer, precision="bf16-mixed" if is_fast else "32"))
    if precision != "32" and not is_fast:
        say(f"trainer.precision={precision}: this {kind} has no bfloat16 products, so that it saves memory at most, and no time")
    return config


def find_peak_tflops(device: torch.device, precision: str) -> float | None:
    """What a device can do at best: a GPU by its data sheet (bfloat16, whatever the run's precision), a CPU by measuring."""
    if device.type == "cuda":
        return data_sheet_tflops(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return None
    return measure_cpu_tflops(torch.bfloat16 if precision != "32" and has_bfloat16_products("cpu") else torch.float32)


def measure_cpu_tflops(dtype: torch.dtype) -> float:
    """The best of the matrix products that fit in a tenth of a second, with the threads torch has now; draws no randomness."""
    square = torch.full((_MEASURE_WIDTH, _MEASURE_WIDTH), 0.5, dtype=dtype)
    out = square @ square  # the first one also prepares the kernel
    best_s, until_s = float("inf"), time.perf_counter() + _MEASURE_S
    while time.perf_counter() < until_s:
        before_s = time.perf_counter()
        torch.mm(square, square, out=out)
        best_s = min(best_s, time.perf_counter() - before_s)
    return 2.0 * _MEASURE_WIDTH**3 / best_s / 1e12


def memory_gib(device: torch.device) -> float:
    """GiB in use: on a GPU the most that torch held since the last call, elsewhere the resident set of this process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / GIB
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without /proc only the peak is told
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB
