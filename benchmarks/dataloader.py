"""The loader at 200 000 conversations: rows a second beside what training eats, useful share, memory, and the time of a resume.

    python benchmarks/dataloader.py                    # makes 6 GB of shards in data/benchmark once; writes results/dataloader.md
    python benchmarks/dataloader.py --part speed       # one measurement of corpus, open, speed, train, webdataset, memory, resume
    python benchmarks/dataloader.py --quick            # 600 conversations in a temporary folder, a tiny model: whether it runs

Every measurement is a fresh process of one thread (with --quick, this one); what they found is kept in <data>/measured.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
import yaml

from csm import CSM, csm_loss
from csm.config import DataConfig, ModelConfig, TransformerConfig
from csm.data.datamodule import CSMDataModule
from csm.frames import Batch, frames_from_seconds, rows_from_turns
from csm.text import ByteTokenizer
from data_prep.shard import Sample, write_split

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("corpus", "open", "speed", "train", "webdataset", "memory", "resume")
SEQ_LEN = 2048
CHARACTERS_PER_S = 15  # of speech
TINY = TransformerConfig(num_layers=1, width=32, num_heads=2, num_kv_heads=1, ffn_width=48)
DISTRIBUTION = (
    "2 to 20 turns (log-normal, median 6, sigma 0.7), each of 0.4 to 30 s (log-normal, median 3 s, sigma 0.8), 15 characters a second; "
    "codes uniform, 32 codebooks of 2048"
)


def made_up_conversations(num: int) -> Iterator[Sample]:
    random = np.random.default_rng(0)
    letters = np.frombuffer(b"etaoin shrdlu ", dtype=np.uint8)
    pool = random.integers(1, 2048, (32, 200_000), dtype=np.int16)
    text = "".join(map(chr, random.choice(letters, 100_000)))
    for index in range(num):
        num_turns = int(np.clip(round(float(random.lognormal(np.log(6), 0.7))), 2, 20))
        durations_s = np.clip(random.lognormal(np.log(3), 0.8, num_turns), 0.4, 30)
        turns: list[dict[str, Any]] = []
        first, start_s = 0, 0.0
        for turn, duration_s in enumerate(durations_s.tolist()):
            num_frames, num_characters = frames_from_seconds(duration_s), max(2, int(duration_s * CHARACTERS_PER_S))
            at = int(random.integers(100_000 - num_characters))
            said = text[at : at + num_characters]
            turns.append({"speaker": turn % 2, "speaker_name": None, "text": said, "start_s": round(start_s, 3)})
            turns[-1] |= {"end_s": round(start_s + duration_s, 3), "frames": [first, first + num_frames], "words": []}
            turns[-1] |= {"overlap": False, "backchannel": False, "quality": {"dnsmos": 3.1}, "emotion": None}
            turns[-1]["learn"] = {"c0": True, "depth": True}
            first, start_s = first + num_frames, start_s + duration_s
        at = int(random.integers(200_000 - first))
        meta = {"id": f"{index:016x}-0", "source": "made up", "license": "CC0-1.0", "language": "en", "duration_s": round(start_s, 3)}
        yield Sample(f"{index:016x}-0", {**meta, "turns": turns}, pool[:, at : at + first])


def make_corpus(data: Path, num: int) -> dict[str, float]:
    """Shards of `num` conversations and 200 for validation, unless they are there."""
    started_s = time.perf_counter()
    codec: dict[str, object] = {"name": "mimi", "num_codebooks": 32, "frame_rate_hz": 12.5, "sample_rate_hz": 24_000, "digest": "0" * 64}
    for split, count in (("train", num), ("validation", min(num, 200))):
        index = data / split / "index.json"
        if index.is_file() and sum(shard["num_samples"] for shard in json.loads(index.read_text())["shards"]) != count:
            raise ValueError(f"{index}: of another number of conversations than --samples {num}; remove {data}")
        if not index.is_file():
            write_split(made_up_conversations(count), data / split, codec)
    shards = json.loads((data / "train/index.json").read_text())["shards"]
    return {
        "num_samples": sum(shard["num_samples"] for shard in shards),
        "num_shards": len(shards),
        "gb": sum(shard["num_bytes"] for shard in shards) / 1e9,
        "hours": sum(shard["duration_s"] for shard in shards) / 3600,
        "seconds": time.perf_counter() - started_s,
    }


def small_model(is_quick: bool) -> ModelConfig:
    """configs/model/csm_small.yaml, or a tiny one of its codebooks."""
    values = yaml.safe_load((ROOT / "configs/model/csm_small.yaml").read_text(encoding="utf-8"))
    config = ModelConfig()
    if is_quick:
        values |= {"backbone": vars(TINY), "depth_decoder": vars(TINY)}
    parts = {part: replace(getattr(config, part), **values.pop(part)) for part in ("backbone", "depth_decoder")}
    return replace(config, **parts, **values)


def open_data(data: Path, is_quick: bool, *, rows_per_batch: int = 4, verify: str = "digest") -> CSMDataModule:
    config = DataConfig(kind="shards", path=str(data), seq_len=SEQ_LEN, rows_per_batch=rows_per_batch, verify=verify)
    module = CSMDataModule(config, small_model(is_quick), ByteTokenizer(), seed=0)
    module.setup()
    return module


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def measure_open(data: Path, is_quick: bool) -> dict[str, float]:
    """The first start, which compares digests and measures turns, and the starts after it."""
    for path in [*data.glob("*/lengths-*"), *data.glob("*/verified-*")]:
        path.unlink()
    started_s = time.perf_counter()
    CSMDataModule(DataConfig(kind="shards", path=str(data), seq_len=SEQ_LEN), small_model(is_quick), ByteTokenizer())._open("train")
    digests_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    module = open_data(data, is_quick)
    first_s = time.perf_counter() - started_s
    started_s = time.perf_counter()
    open_data(data, is_quick)
    again_s = time.perf_counter() - started_s
    stats = module.stats()
    return {"digests_s": digests_s, "first_s": first_s, "again_s": again_s, **{k: v for k, v in stats.items() if "/" not in k}}


def measure_rate(batches: Iterator[Batch], num_batches: int) -> dict[str, float]:
    """Rows, frames and the useful share of `num_batches` batches, after a few that are not counted."""
    for _ in itertools.islice(batches, 3):
        pass
    num_rows = num_frames = num_useful = num_positions = 0
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    for batch in itertools.islice(batches, num_batches):
        num_rows += len(batch.tokens)
        num_positions += batch.document_ids.numel()
        num_useful += int((batch.document_ids >= 0).sum())
        num_frames += batch.num_frames
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    return {
        "rows": num_rows,
        "rows_per_s": num_rows / wall_s,
        "rows_per_cpu_s": num_rows / cpu_s,
        "frames_per_s": num_frames / wall_s,
        "frames_per_row": num_frames / num_rows,
        "useful_share": num_useful / num_positions,
    }


def measure_speed(data: Path, is_quick: bool) -> dict[str, float]:
    return measure_rate(iter(open_data(data, is_quick).train_dataloader()), 10 if is_quick else 500)


def measure_train(data: Path, is_quick: bool) -> dict[str, float]:
    """Seconds a row of one training step of the small model (forward, backward, fused AdamW), best of the rounds."""
    batches = list(itertools.islice(open_data(data, is_quick, rows_per_batch=1, verify="size").train_dataloader(), 4))
    model = CSM(small_model(is_quick))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    found: dict[str, float] = {}
    for name, is_mixed in (("float32", False), ("bf16-mixed", True)):
        seconds = []
        for step, batch in enumerate(batches):
            started_s = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
                loss = csm_loss(model, batch, 1 / 16, step=step).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.process_time() - started_s)
        found[f"rows_per_s/{name}"] = 1 / min(seconds[1:])
    return found


def measure_webdataset(data: Path, is_quick: bool) -> dict[str, float]:
    """A plain WebDataset pipeline of the same shards: shuffle buffer, the same rows, packed first come, first served."""
    import webdataset

    tokenizer = ByteTokenizer()
    shards = [str(path) for path in sorted((data / "train").glob("*.tar"))]
    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(1000).decode()

    def batches(rows_per_batch: int = 4) -> Iterator[Batch]:
        from csm.data.members import parse_turn

        rows: list[list] = [[]]
        room = SEQ_LEN
        for sample in samples:
            document = rows_from_turns([parse_turn(turn, sample["codes.npy"]) for turn in sample["json"]["turns"]], tokenizer, 32)
            if len(document) > SEQ_LEN:
                continue  # ours cuts these at turn boundaries
            if len(document) > room:
                if len(rows) == rows_per_batch:
                    yield Batch.from_documents(rows, SEQ_LEN)
                    rows = []
                rows.append([])
                room = SEQ_LEN
            rows[-1].append(document)
            room -= len(document)

    return measure_rate(batches(), 10 if is_quick else 200)


def measure_memory(data: Path, is_quick: bool) -> dict[str, float]:
    """Resident memory on the way through one whole epoch."""
    module = open_data(data, is_quick, rows_per_batch=16)
    loader = module.train_dataloader()
    num_batches, num_samples = len(loader), 0
    marks = {max(1, round(share * num_batches)): share for share in (0.01, 0.25, 0.5, 0.75, 1.0)}
    found: dict[str, float] = {}
    for count, batch in enumerate(loader, start=1):
        num_samples += len(batch.keys or [])
        if count in marks:
            found[f"mib/{marks[count]:g}"] = resident_mib()
    found["num_documents"] = num_samples
    return found


def measure_resume(data: Path, is_quick: bool) -> dict[str, float]:
    """A fresh process: open the data, take up a position three quarters through the epoch, build the first batch there."""
    started_s = time.perf_counter()
    module = open_data(data, is_quick)
    loader = module.train_dataloader()
    position = len(loader) * 3 // 4
    module.load_state_dict({**module.state_dict(), "batch": position})
    batch = next(iter(loader))
    seconds = time.perf_counter() - started_s
    plan, rows = loader.plan(0), range(position * 4, position * 4 + 4)
    train = module._train
    expected = [train.reader.keys[train.documents.sample[document]] for row in rows for document in plan.row(row)]  # type: ignore[union-attr]
    assert batch.keys == expected, "another batch than the plan's"
    return {"seconds": seconds, "documents_before": int(plan.row_starts[position * 4])}  # type: ignore[attr-defined]


MEASURE = {
    "open": measure_open,
    "speed": measure_speed,
    "train": measure_train,
    "webdataset": measure_webdataset,
    "memory": measure_memory,
    "resume": measure_resume,
}


def measure(part: str, data: Path, num_samples: int, is_quick: bool) -> dict[str, float]:
    return make_corpus(data, num_samples) if part == "corpus" else MEASURE[part](data, is_quick)


def table(found: dict[str, dict[str, float]]) -> list[str]:
    corpus, opened, speed, train = found["corpus"], found["open"], found["speed"], found["train"]
    plain, memory, resume = found["webdataset"], found["memory"], found["resume"]
    marks = ", ".join(f"{float(k.split('/')[1]):.0%} {v:,.0f}" for k, v in memory.items() if k.startswith("mib/"))
    gb_per_s = corpus["gb"] / opened["digests_s"]
    about = (
        f"Corpus: {corpus['num_samples']:,} made-up conversations, {corpus['hours']:,.0f} h, {corpus['gb']:.1f} GB in "
        f"{corpus['num_shards']} shards: {DISTRIBUTION}. Byte tokenizer, rows of {SEQ_LEN} positions. One thread, no workers, files in "
        "the page cache."
    )
    left_out = (
        f"{opened['cut_conversations']:,} conversations longer than a row were cut between turns, {opened['left_out_turns']:,} turns "
        "longer than a row were left out."
    )
    about_plain = (
        "`webdataset.WebDataset(shards).shuffle(1000).decode()`, then the same `rows_from_turns` and `Batch.from_documents`, "
        "documents laid into rows as they come. It reads each tar from its start, keeps no position and drops what is longer than a row."
    )
    lines = [
        about,
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
        f"| useful share of positions, whole epoch | {opened['useful_share']:.2%} | 95% |",
        f"| packed rows a second | {speed['rows_per_s']:,.0f} ({speed['rows_per_cpu_s']:,.0f} by CPU time) | |",
        f"| frames a second | {speed['frames_per_s']:,.0f} | |",
    ]
    for name in ("float32", "bf16-mixed"):
        eaten = train[f"rows_per_s/{name}"]
        ratio = speed["rows_per_cpu_s"] / eaten
        eats = f"{eaten:.3f} rows/s, {eaten * speed['frames_per_row']:,.0f} frames/s"
        lines.append(f"| times what csm_small's training eats, {name} ({eats}), by CPU time | {ratio:,.0f} | 20 |")
    behind = f"a fresh process with {resume['documents_before']:,.0f} documents behind it: open, place, first batch"
    lines += [
        f"| resident memory on the way through an epoch of {memory['num_documents']:,.0f} documents, MiB | {marks} | flat |",
        f"| {behind} | {resume['seconds']:.2f} s | 2 s |",
        f"| first start: sha256 of every shard, and their tables | {opened['digests_s']:.1f} s ({gb_per_s:.1f} GB/s) | once |",
        f"| first start: lengths of every turn, packing, first plan | {opened['first_s']:.1f} s | once |",
        f"| a start after that, without the first batch | {opened['again_s']:.2f} s | |",
        "",
        left_out,
        "",
        "### Beside a plain WebDataset pipeline",
        "",
        about_plain,
        "",
        "| | rows a second | by CPU time | useful share |",
        "|---|---|---|---|",
        f"| ours | {speed['rows_per_s']:,.0f} | {speed['rows_per_cpu_s']:,.0f} | {speed['useful_share']:.2%} |",
        f"| webdataset | {plain['rows_per_s']:,.0f} | {plain['rows_per_cpu_s']:,.0f} | {plain['useful_share']:.2%} |",
        "",
    ]
    return lines


def surroundings(command: str) -> list[str]:
    """What a reader needs to get the numbers again; no host names."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"- command: `{command}`",
        f"- commit: {commit or 'not in git'}; {date.today().isoformat()}",
        f"- machine: {cpu}, {os.cpu_count()} cores; load average at the end {load}",
        f"- torch {torch.__version__}, numpy {np.__version__}, python {platform.python_version()}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--data", type=Path, default=ROOT / "data/benchmark")
    parser.add_argument("--part", choices=PARTS, help="only this one; the others' numbers are those of <data>/measured.json")
    parser.add_argument("--quick", action="store_true", help="600 conversations, a tiny model; nothing written unless --output is given")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/dataloader.md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in the process that measures
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        print(json.dumps(measure(arguments.part, arguments.data, arguments.samples, is_quick=False)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data" if arguments.quick else arguments.data
        kept = data / "measured.json"
        found = json.loads(kept.read_text()) if kept.is_file() else {}
        for part in [arguments.part] if arguments.part else PARTS:
            if arguments.quick:
                found[part] = measure(part, data, 600, is_quick=True)
            else:
                command = [sys.executable, __file__, "--alone", "--part", part, "--data", str(data), "--samples", str(arguments.samples)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
                found[part] = json.loads(done.stdout.splitlines()[-1])
            print(part, json.dumps(found[part]), flush=True)
            kept.write_text(json.dumps(found, indent=1) + "\n")
    if set(found) != set(PARTS):
        return
    lines = table(found)
    print("\n".join(lines))
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/dataloader.md")
    if output is not None:
        command_line = "python benchmarks/dataloader.py" + (" --quick" if arguments.quick else "")
        part_file = output.with_name(output.name + ".tmp")
        part_file.write_text("\n".join(["# Data loader", "", *surroundings(command_line), "", *lines]), encoding="utf-8")
        os.replace(part_file, output)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
