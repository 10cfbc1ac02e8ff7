"""What glibc does with freed memory, each in a process of its own: its settings are the process's."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to")

TAKEN_AGAIN = """
import json, resource, sys
from csm.allocator import keep_freed_memory
keeps = sys.argv[1] == "keep" and keep_freed_memory()
def take():
    return sum(len(piece) for piece in [b"x" * size for size in (80_000_000, 12_000_000, 200_000, 4_000_000)])
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    take()
print(json.dumps({"keeps": keeps, "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}))
"""
GIVEN_BACK = """
import json, sys
from pathlib import Path
from csm.allocator import give_freed_memory_back, keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
held = [b"x" * 64_000 for _ in range(6_000)]  # pieces less than malloc takes from the system one by one
del held[:-1]  # the last is at the end of the heap, which therefore cannot shrink by itself
before = resident_mb()
give_freed_memory_back()
print(json.dumps({"given_mb": before - resident_mb()}))
"""


def run(script: str, argument: str, **environment: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script, argument], env=clean | environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_kept_memory_is_taken_again_without_a_page_fault():
    plain, kept = run(TAKEN_AGAIN, "no"), run(TAKEN_AGAIN, "keep")
    assert kept["keeps"]
    assert kept["faults"] < 100 < 50_000 < plain["faults"]  # 96 MB a time, in pages of 4 KiB


def test_who_set_glibc_is_left_alone():
    told = run(TAKEN_AGAIN, "keep", MALLOC_TRIM_THRESHOLD_="65536")
    assert not told["keeps"]
    assert told["faults"] > 50_000


@pytest.mark.parametrize("argument", ["no", "keep"])
def test_freed_memory_goes_back_to_the_system(argument):
    assert run(GIVEN_BACK, argument)["given_mb"] > 200
