"""How fast it speaks on this machine. Apart from everything else, because a clock never gives the same number twice."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from csm.evaluation.metrics import seed_for
from csm.evaluation.suites import Utterance
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.generator import Generator


def measure_speed(
    generator: Generator, utterances: Sequence[Utterance], *, max_duration_s: float, temperature: float, top_k: int, seed: int
) -> dict[str, Any]:
    """Stream lines one by one, codec and watermark included, after one that warms up.

    Returns:
        Seconds to the first chunk (p50, p95), real-time factor (computing over speech, p50, p95 and over all), peak memory of the
        process so far in MiB (of the GPU where there is one), and what ran it.
    """
    first_s, factors, busy_s, spoken_s = [], [], 0.0, 0.0
    for index, utterance in enumerate([utterances[0], *utterances]):
        settings = dict(max_duration_s=max_duration_s, temperature=temperature, top_k=top_k, seed=seed_for(seed, "speak", utterance.key))
        started = time.perf_counter()
        first, num_samples = None, 0
        for chunk in generator.stream(utterance.text, utterance.speaker, utterance.context, **settings):  # type: ignore[arg-type]
            first = time.perf_counter() - started if first is None else first
            num_samples += chunk.shape[0]
        took_s = time.perf_counter() - started
        if index == 0 or first is None:
            continue
        first_s.append(first)
        factors.append(took_s / (num_samples / SAMPLE_RATE_HZ))
        busy_s, spoken_s = busy_s + took_s, spoken_s + num_samples / SAMPLE_RATE_HZ
    on_gpu = generator.model.projection.weight.is_cuda
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result: dict[str, Any] = {
        "clips": len(first_s),
        "empty_clips": len(utterances) - len(first_s),
        "peak_memory_mib": round(peak),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if first_s:
        result["first_audio_s"] = {name: round(float(np.percentile(first_s, q)), 4) for name, q in (("p50", 50), ("p95", 95))}
        result["rtf"] = {name: round(float(np.percentile(factors, q)), 4) for name, q in (("p50", 50), ("p95", 95))}
        result["rtf"]["all"] = round(busy_s / spoken_s, 4)
    return result
