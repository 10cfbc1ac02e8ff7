"""What the C library does with memory that is freed: glibc's settings, which are the process's. Elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep what is freed for the next tensors, where glibc would give large pieces back at once and get them anew, zeroed.

    For work that takes the same memory again and again. Measured on an AVX2 EPYC: a training step of csm_small takes 8 to 11% less
    time, of csm_1b 21% less; the peak of csm_1b is 3% higher. Whoever set glibc's own variables (`MALLOC_TRIM_THRESHOLD_`, ...) is
    left alone.

    Returns:
        Whether it does.
    """
    mallopt = _glibc("mallopt")
    if mallopt is None or any(f"MALLOC_{name}_" in os.environ for name in ("TRIM_THRESHOLD", "MMAP_MAX", "MMAP_THRESHOLD")):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_freed_memory_back() -> None:
    """Give all that is free back to the system now, for what comes next or runs beside."""
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> ctypes._NamedFuncPointer | None:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
