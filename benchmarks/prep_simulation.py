"""The engine of data preparation at 100,000 recordings: is each accounted for exactly once, whatever fails, and what does it cost.

    python benchmarks/prep_simulation.py --work DIR                    # an hour of one core; writes results/prep_simulation.md
    python benchmarks/prep_simulation.py --work DIR --stop-after 240   # goes on from where the one before it stopped
    python benchmarks/prep_simulation.py --quick                       # 300 recordings, seconds

`prep=offline` through its real engine, from files to shards, with fake recordings and models (prep_fakes.py). Some recordings are
broken; at some a worker raises or is killed; the driver is killed again and again, and the same command run again until all is done.
Then shards are read by tarfile alone and compared with what was made. Costs are of a run of its own, in one process, undisturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import prep_fakes  # noqa: E402
import torch  # noqa: E402

import data_prep.turns  # noqa: E402
from csm.codec import SpectralCodec  # noqa: E402
from csm.config import CodecConfig, FilterConfig, PrepConfig, SegmentConfig, TextConfig  # noqa: E402

A_UNIT_MIN = 100 * prep_fakes.NUM_SAMPLES / prep_fakes.RATE / 60  # a hundred recordings
COSTS = (2_000, 10_000)  # recordings of the runs that costs are measured on


def prepare(arguments: argparse.Namespace) -> int:
    """The command under test, in this process."""
    misfortunes = arguments.work / "misfortunes" if arguments.part == "prepare" else None
    data_prep.turns.Listening = lambda *settings: prep_fakes.SimulatedListening(*settings, misfortunes=misfortunes)  # type: ignore
    return data_prep.turns.prepare_turns(
        PrepConfig(
            name="offline",
            input=str(arguments.work / "recordings"),
            output=str(arguments.work / "out"),
            executor=arguments.executor,
            num_workers=arguments.workers if arguments.part == "prepare" else 1,
            unit_min=A_UNIT_MIN,
            filter=FilterConfig(min_dnsmos=0.0, min_snr_db=-100.0, min_bandwidth_hz=0.0, max_words_per_s=100.0),
            segment=SegmentConfig(pad_s=0.0),
            codec=CodecConfig(source=str(arguments.work / "codec"), num_codebooks=4),
            text=TextConfig(tokenizer="bytes"),
        )
    )


def make(work: Path, num_recordings: int, num_errors: int, num_kills: int) -> None:
    if not (work / "made").is_file():
        prep_fakes.write_recordings(work / "recordings", num_recordings)
        audio = torch.randn(48_000, generator=torch.Generator().manual_seed(0)) * 0.1
        SpectralCodec.fit([audio], num_codebooks=4, codebook_size=16).save(work / "codec")
        shutil.rmtree(work / "misfortunes", ignore_errors=True)
        prep_fakes.plan_misfortunes(work / "misfortunes", num_recordings, num_errors, num_kills)
        (work / "made").write_text(str(num_recordings))


def run_and_kill(arguments: argparse.Namespace, kept: dict[str, Any], stop_at_s: float) -> bool:
    """Run the command, killed after some time, until a run is left alone to its end. True when that left nothing undone.

    Raises:
        SystemExit: when a run left alone got no further than those before it.
    """
    draw = random.Random(kept["num_kills"])
    before = None
    while time.monotonic() < stop_at_s:
        command = [sys.executable, __file__, "--part", "prepare", "--work", str(arguments.work), "--executor", arguments.executor]
        kill_after_s = draw.uniform(*arguments.kill_after) if kept["num_kills"] < arguments.driver_kills else float("inf")
        begun_s = time.monotonic()
        with (arguments.work / "log.txt").open("a") as log:
            child = subprocess.Popen([*command, "--workers", str(arguments.workers)], stdout=log, stderr=log, cwd=ROOT)
            try:
                status = child.wait(timeout=max(1.0, min(kill_after_s, stop_at_s - begun_s)))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                kept["num_kills"] += 1
                status = None
        kept["wall_s"] += time.monotonic() - begun_s
        kept["num_commands"] += 1
        summary = arguments.work / "out/summary.json"  # the last command's that came so far
        left = json.loads(summary.read_text())["units_not_done"] if status in (0, 1) and summary.is_file() else None
        print(f"command {kept['num_commands']}: {'killed' if status is None else f'status {status}, {left} units left'}", flush=True)
        if status not in (None, 0, 1, -9):
            raise SystemExit(f"status {status}; see {arguments.work / 'log.txt'}")
        if left == 0:
            return True
        if status is not None:
            now = (left, len(list((arguments.work / "misfortunes").iterdir())))
            if now == before:
                raise SystemExit(f"again {now[0]} units left and {now[1]} misfortunes to come; see {arguments.work / 'log.txt'}")
            before = now
    return False


def account(work: Path, num_recordings: int) -> dict[str, Any]:
    """Compare what is in the shards and in failures.jsonl with what was made; raises on any difference."""
    keys: Counter[str] = Counter()
    in_shards: Counter[str] = Counter()
    for path in sorted(work.glob("out/*/shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    meta = json.load(stream)
                    keys[meta["id"]] += 1
                    in_shards[meta["source"]] += 1
    rows = [json.loads(line) for line in (work / "out/failures.jsonl").read_text(encoding="utf-8").splitlines()]
    dropped = Counter((row["source"], row["stage"], row["reason"]) for row in rows if row["turn"] == -1)
    expected_in, expected_out = Counter[str](), Counter[tuple[str, str, str]]()
    for index in range(num_recordings):
        kind, source = prep_fakes.kind_of(index), prep_fakes.source_of(index)
        if kind is None:
            expected_in[source] = 1
        else:
            expected_out[(source, *prep_fakes.KINDS[kind][1:])] = 1
    assert in_shards == expected_in, f"in the shards: {list((in_shards - expected_in) + (expected_in - in_shards))[:5]}"
    assert dropped == expected_out, f"in failures.jsonl: {list((dropped - expected_out) + (expected_out - dropped))[:5]}"
    assert set(keys.values()) == {1}
    not_met = list((work / "misfortunes").iterdir())
    assert not not_met, f"{len(not_met)} misfortunes were not met"
    return {
        "recordings": num_recordings,
        "in_shards": len(in_shards),
        "dropped": len(dropped),
        "units": len(list(work.glob("out/prep/done/*"))),
    }


def measure(arguments: argparse.Namespace, num_recordings: int) -> dict[str, float]:
    """CPU milliseconds a recording, undisturbed, in a process of its own: the first command, and the same again."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        make(Path(folder), num_recordings, 0, 0)
        for run in ("first", "again"):
            command = [sys.executable, __file__, "--part", "measure", "--work", folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT)
            told = json.loads(done.stdout.splitlines()[-1])
            found |= {f"{run} {name}": 1_000 * value / num_recordings for name, value in told.items()}
    return found


def measure_here(arguments: argparse.Namespace) -> None:
    prep_fakes.count_time()
    begun_s = time.process_time()
    prepare(arguments)
    all_s = time.process_time() - begun_s
    print(json.dumps({"all": all_s, "sound": sum(prep_fakes.SPENT.values())}))


def table(kept: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    told = kept["account"]
    lines = [
        "| what | |",
        "|---|---|",
        f"| recordings, each accounted for exactly once | {told['recordings']:,} |",
        f"| in the shards, once each | {told['in_shards']:,} |",
        f"| in failures.jsonl, once each, with the reason that it was made with | {told['dropped']:,} |",
        f"| units | {told['units']:,} |",
        f"| commands, of which killed (SIGKILL of the driver) | {kept['num_commands']}, {kept['num_kills']} |",
        f"| recordings at which a worker raised, was killed | {arguments.errors}, {arguments.worker_kills} |",
        f"| wall time of all commands, {arguments.workers} workers, executor={arguments.executor} | {kept['wall_s']:.0f} s |",
        "",
        "CPU milliseconds a recording, one process, undisturbed:",
        "",
        "| recordings | sound and fake models | engine | the same command again, all done |",
        "|---|---|---|---|",
    ]
    for size, costs in kept["costs"].items():
        engine = costs["first all"] - costs["first sound"]
        lines.append(f"| {int(size):,} | {costs['first sound']:.2f} | {engine:.2f} | {costs['again all']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="what it makes and keeps, 3 GB; needed without --quick")
    parser.add_argument("--recordings", type=int, default=100_000)
    parser.add_argument("--executor", choices=("local", "ray"), default="local")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--errors", type=int, default=100, help="recordings at which a worker raises, once")
    parser.add_argument("--worker-kills", type=int, default=30, help="recordings at which a worker is killed, once")
    parser.add_argument("--driver-kills", type=int, default=8)
    parser.add_argument("--kill-after", type=float, nargs=2, default=(60.0, 200.0), help="seconds, drawn between these")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds; run it again to go on")
    parser.add_argument("--quick", action="store_true", help="300 recordings; nothing is written unless --output is given")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/prep_simulation.md")
    parser.add_argument("--part", choices=("prepare", "measure"), help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "prepare":
        sys.exit(prepare(arguments))
    if arguments.part == "measure":
        return measure_here(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        sizes: tuple[int, ...] = COSTS
        if arguments.quick:
            arguments.work = arguments.work or Path(temporary)
            arguments.recordings, arguments.errors, arguments.worker_kills, arguments.driver_kills = 300, 2, 1, 1
            arguments.kill_after, sizes = (6.0, 8.0), ()
        if arguments.work is None:
            parser.error("give --work=<a folder with 3 GB of room>, or --quick")
        run(arguments, sizes)


def run(arguments: argparse.Namespace, sizes: tuple[int, ...]) -> None:
    stop_at_s = time.monotonic() + arguments.stop_after
    arguments.work.mkdir(parents=True, exist_ok=True)
    path = arguments.work / "kept.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"num_kills": 0, "num_commands": 0, "wall_s": 0.0, "costs": {}}
    make(arguments.work, arguments.recordings, arguments.errors, arguments.worker_kills)
    kept["is_done"] = kept.get("is_done") or run_and_kill(arguments, kept, stop_at_s)
    keep(path, kept)
    if kept["is_done"]:
        kept["account"] = kept.get("account") or account(arguments.work, arguments.recordings)
        keep(path, kept)
        for size in sizes:
            if str(size) not in kept["costs"] and time.monotonic() < stop_at_s:
                kept["costs"][str(size)] = measure(arguments, size)
                keep(path, kept)
    if not kept["is_done"] or len(kept["costs"]) < len(sizes):
        return print("stopped; run it again to go on")
    lines = table(kept, arguments)
    print("\n".join(lines))
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/prep_simulation.md")
    if output is not None:
        command_line = " ".join(["python benchmarks/prep_simulation.py", *sys.argv[1:]])
        part = output.with_name(output.name + ".tmp")
        part.write_text(
            "\n".join(["# The engine of data preparation, simulated", "", *surroundings(command_line), "", *lines, ""]), encoding="utf-8"
        )
        os.replace(part, output)
        print(f"written: {output}")


def keep(path: Path, kept: dict[str, Any]) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(kept, indent=1) + "\n")
    os.replace(part, path)


def surroundings(command_line: str) -> list[str]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return [
        f"- command: `{command_line}`",
        f"- commit: {commit}; date: {date.today()}; machine: {platform.machine()}, {os.cpu_count()} cores",
    ]


if __name__ == "__main__":
    main()
