"""How fast data preparation is: each stage times real time, turns encoded together beside one by one, and what is not models.

    python benchmarks/prep.py                    # 7 minutes; writes results/prep.md
    python benchmarks/prep.py --part encode_two  # one of: encode_one, encode_two, one, two
    python benchmarks/prep.py --quick            # a small Mimi, seconds of speech: whether it runs

Runs the stages of `prep=offline` as the command does (packaged Whisper base, int8; Mimi's shape with random weights, which cost what
trained ones do), on conversations of two synthetic voices at 44.1 kHz, FLAC and mp3. "two" are two processes of one thread, a slice
each, started together: two threads' worth of work as `num_workers=2` does it. Every part is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import soundfile
import soxr
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import MimiConfig, MimiModel

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dataloader import surroundings  # noqa: E402
from prep_truth import LINES  # noqa: E402
from train_step import measure_matmul_flops  # noqa: E402

from csm.codec.mimi import MimiCodec  # noqa: E402
from csm.config import CodecConfig, FilterConfig, PrepConfig  # noqa: E402
from csm.frames import SAMPLE_RATE_HZ  # noqa: E402
from data_prep import diarize, engine, ingest, stages, transcribe, turns  # noqa: E402
from data_prep.script import VOICES  # noqa: E402
from data_prep.synthesis import Synthesizer, random_for  # noqa: E402

PARTS = ("encode_one", "encode_two", "one", "two")  # of one thread or process, and of two
RECORDINGS = ("a.flac", "b.mp3")
STAGES = ("manifest", "transcribe", "segment", "filter", "encode", "merge")
SMALL_MIMI = dict(
    hidden_size=32, num_filters=4, upsample_groups=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    intermediate_size=64, codebook_size=64, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=8,
)  # fmt: skip
TURNS = "log-normal, median 2 s, sigma 0.9, of 0.3 to 20 s"


def mimi(is_quick: bool) -> MimiModel:
    torch.manual_seed(0)
    model = MimiModel(MimiConfig(**SMALL_MIMI) if is_quick else MimiConfig()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("embed_sum"):
            buffer.normal_(0, 0.02)
    return model


def measure_encode(num_threads: int, is_quick: bool) -> dict[str, Any]:
    """Seconds of audio a second by the clock, four ways in turns and at the matmul peak; whether alone gives the same codes."""
    torch.set_num_threads(num_threads)
    model = mimi(is_quick)
    codec = MimiCodec(model)
    random = np.random.default_rng(0)
    lengths = {TURNS: np.clip(random.lognormal(np.log(2.0), 0.9, 6 if is_quick else 10), 0.3, 20).tolist()}
    for length_s in (0.48, 2.0, 4.0):
        lengths[f"all of {length_s:g} s"] = [length_s] * (2 if is_quick else max(2, int(4 / length_s)))
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.encode(torch.zeros(1, 1, 25 * 1920), num_quantizers=codec.num_codebooks)
    flops_a_second = counter.get_total_flops() / (25 * 0.08)
    found = {}
    for name, durations_s in lengths.items():
        clips = [torch.from_numpy(random.standard_normal(int(s * 12.5 + 1) * 1920).astype(np.float32) * 0.1) for s in durations_s]
        num_frames = [len(clip) // 1920 for clip in clips]
        ways: dict[str, Callable[[], Any]] = {
            "theirs_alone": lambda clips=clips: [model.encode(clip[None, None], num_quantizers=codec.num_codebooks) for clip in clips],
            "theirs_together": lambda clips=clips, num_frames=num_frames: codec._encode_padded(clips, num_frames),
            "ours_alone": lambda clips=clips: [codec.encode([clip])[0] for clip in clips],
            "ours_together": lambda clips=clips: codec.encode(clips),
        }
        spent: dict[str, list[float]] = {way: [] for way in ways}
        peak = 0.0
        with torch.inference_mode():
            alone, together = ways["ours_alone"](), ways["ours_together"]()
            for _ in range(1 if is_quick else 3):
                peak = max(peak, *(measure_matmul_flops(torch.float32) for _ in range(3)))
                for way, run in ways.items():
                    begun = time.perf_counter()
                    run()
                    spent[way].append(time.perf_counter() - begun)
        audio_s = sum(num_frames) * 0.08
        found[name] = {way: audio_s / min(seconds) for way, seconds in spent.items()}
        found[name]["peak"] = peak / flops_a_second
        found[name]["is_same"] = all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    return found


def make_recordings(folder: Path, is_quick: bool) -> None:
    """Conversations of two voices that take turns, 0.2 to 1 s apart, at 44.1 kHz."""
    folder.mkdir()
    voices, lines = Synthesizer(), list(LINES)
    for number, name in enumerate(RECORDINGS):
        random = random_for(0, "benchmark", name)
        parts = []
        for turn in range(2 if is_quick else 16):
            said = voices.speak(str(random.choice(lines)), VOICES[(number + turn % 2) % 4], random).astype(np.float32) / 32_768
            parts += [said, np.zeros(int(random.uniform(0.2, 1.0) * SAMPLE_RATE_HZ), np.float32)]
        audio = soxr.resample(np.concatenate(parts), SAMPLE_RATE_HZ, 44_100)
        soundfile.write(folder / name, audio + random.normal(0, 5e-4, len(audio)), 44_100)


class Clock:
    """CPU seconds that calls took (all threads), by name, and by the clock; calls inside of calls count for the outer one."""

    def __init__(self) -> None:
        self.spent_s: dict[str, float] = {}
        self._is_inside = False

    def watch(self, owner: Any, name: str, as_name: str) -> None:
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            if self._is_inside:
                return call(*arguments, **keywords)
            self._is_inside, begun, begun_wall = True, time.process_time(), time.perf_counter()
            try:
                return call(*arguments, **keywords)
            finally:
                self._is_inside = False
                self.spent_s[as_name] = self.spent_s.get(as_name, 0.0) + time.process_time() - begun
                self.spent_s["wall_" + as_name] = self.spent_s.get("wall_" + as_name, 0.0) + time.perf_counter() - begun_wall

        setattr(owner, name, timed)


def run_slice(folder: Path, index: int, count: int, barrier: Any, results: Any, is_quick: bool) -> None:
    """Every stage of one slice, one after another; models are loaded by a short recording before."""
    torch.set_num_threads(1)
    clock = Clock()
    clock.watch(stages, "local_activity", "models")
    clock.watch(transcribe.Transcriber, "transcribe", "models")
    clock.watch(diarize.Diarizer, "diarize", "models")
    clock.watch(stages, "dnsmos", "models")
    clock.watch(MimiCodec, "encode", "models")
    for owner in (stages, engine):
        clock.watch(owner, "ingest", "decode")

    def prepare(name: str, input: Path, output: Path, index: int, count: int) -> None:
        config = PrepConfig(
            name="offline", input=str(input), output=str(output), stages=[name], num_workers=1, slice_index=index, slice_count=count,
            unit_min=0.5, val_share=0.0, filter=FilterConfig(dnsmos_turns=2),
            codec=CodecConfig("mimi", str(folder / "mimi"), 8 if is_quick else 32),
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            turns.prepare_turns(config)

    for name in STAGES[:5]:
        prepare(name, folder / "warm", folder / f"warm-{index}", 0, 1)
    found = {}
    for name in STAGES:
        barrier.wait()
        if name in ("manifest", "merge") and index > 0:
            continue
        clock.spent_s.clear()
        begun, begun_wall = time.process_time(), time.perf_counter()
        prepare(name, folder / "recordings", folder / "out", index, count)
        found[name] = {"s": time.process_time() - begun, "wall_s": time.perf_counter() - begun_wall, **clock.spent_s}
    results.put(found)


def measure_stages(count: int, is_quick: bool) -> dict[str, Any]:
    """Stage -> CPU seconds (of the slower slice, of all), of them in models and decoding, and all and models by the clock."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_recordings(folder / "recordings", is_quick)
        make_recordings(folder / "warm", True)
        mimi(is_quick).save_pretrained(folder / "mimi")
        durations_s = [soundfile.info(path).duration for path in (folder / "recordings").iterdir()]
        begun = time.process_time()
        for path in (folder / "recordings").iterdir():
            ingest.ingest(path, PrepConfig().ingest)
        decode_s = time.process_time() - begun
        context = multiprocessing.get_context("spawn")
        barrier, results = context.Barrier(count), context.SimpleQueue()
        workers = [context.Process(target=run_slice, args=(folder, index, count, barrier, results, is_quick)) for index in range(count)]
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers):
            if any(worker.exitcode for worker in workers):
                barrier.abort()  # the others wait for it
            time.sleep(0.05)
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a process failed; what it said is above")
        found = [results.get() for _ in workers]
        done = [json.loads(path.read_text()) for path in (folder / "out" / "prep" / "done").glob("*.json")]
    joined: dict[str, Any] = {"audio_s": sum(durations_s), "kept_s": sum(unit["counts"]["speech_s"] for unit in done), "ingest_s": decode_s}
    for name in STAGES:
        rows = [row[name] for row in found if name in row]
        keys = ("models", "decode", "wall_s", "wall_models")
        joined[name] = {"s": max(row["s"] for row in rows), "all_s": sum(row["s"] for row in rows)}
        joined[name] |= {key: sum(row.get(key, 0.0) for row in rows) for key in keys}
    return joined


def table(found: dict[str, Any]) -> list[str]:
    encode_one, encode_two, one, two = (found[part] for part in PARTS)
    lines = [
        "## Stages",
        "",
        f"{one['audio_s'] / 60:.1f} min of dense conversation in {len(RECORDINGS)} recordings, {one['kept_s'] / 60:.1f} min of it",
        "in turns; DNSMOS hears two turns of each, as much of them as the default's six are of three minutes. Seconds of recording a CPU",
        "second; of two processes, of the slower one: what both do while it works a second.",
        "",
        "| stage | one process | two processes | | of the time: models | decoding |",
        "|---|---|---|---|---|---|",
    ]
    for name in STAGES:
        slow, fast = one[name], two[name]
        scaling = f"{slow['s'] / fast['s']:.2f} times" if name not in ("manifest", "merge") else "one process does it"
        shares = " | ".join(f"{slow[key] / slow['s']:.1%}" for key in ("models", "decode"))
        lines.append(f"| {name} | {one['audio_s'] / slow['s']:,.1f} | {two['audio_s'] / fast['s']:,.1f} | {scaling} | {shares} |")
    lines.append(f"| (ingest alone: decode, resample, level) | {one['audio_s'] / one['ingest_s']:,.1f} | | | | |")
    for way, title in ((one, "one process"), (two, "two processes")):
        total_s, model_s, decode_s, wall_s, wall_model_s = (
            sum(way[name][key] for name in STAGES) for key in ("all_s", "models", "decode", "wall_s", "wall_models")
        )
        speed = way["audio_s"] / sum(way[name]["s"] for name in STAGES)
        lines += [
            "",
            f"All stages, {title}: {speed:.2f} times real time; **{1 - model_s / total_s:.1%} of the CPU time is not models**",
            f"({1 - wall_model_s / wall_s:.1%} by the clock, with waits for the disk); decoding, which three stages do, is",
            f"{decode_s / total_s:.1%}.",
        ]
    lines += [
        "",
        "## Mimi: turns together and one by one",
        "",
        "Seconds of audio a second by the clock, the best of three rounds. *theirs* is transformers' `MimiModel.encode`, a turn",
        "a call, or padded in batches of like length up to 60 s; *ours* is `MimiCodec.encode`. The peak is the operations that the model's",
        "products take, at the speed of one large float32 product in the same run: what nothing of these weights can be faster than.",
    ]
    for num_threads, encode in ((1, encode_one), (2, encode_two)):
        lines += [
            "",
            f"### {num_threads} thread{'s' if num_threads > 1 else ''} of one process",
            "",
            "| turns | theirs | theirs, padded | ours, singly | ours | peak | ours / theirs | peak / theirs | ours / singly | same codes |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for name, row in encode.items():
            speeds = " | ".join(f"{row[way]:.1f}" for way in ("theirs_alone", "theirs_together", "ours_alone", "ours_together", "peak"))
            over_theirs, over_ours = row["ours_together"] / row["theirs_alone"], row["ours_together"] / row["ours_alone"]
            ratios = f"**{over_theirs:.2f}** | {row['peak'] / row['theirs_alone']:.2f} | {over_ours:.2f}"
            lines.append(f"| {name} | {speeds} | {ratios} | {'yes' if row['is_same'] else '**no**'} |")
    return [*lines, ""]


def measure(part: str, is_quick: bool) -> dict[str, Any]:
    count = 1 if part.endswith("one") else 2
    return measure_encode(count, is_quick) if part.startswith("encode") else measure_stages(count, is_quick)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="only this one; the others' numbers are those of --kept")
    parser.add_argument("--kept", type=Path, help="file that keeps what parts found, for runs part by part")
    parser.add_argument("--quick", action="store_true", help="a small Mimi; nothing written unless --output is given")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/prep.md")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # in the process that measures
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        print(json.dumps(measure(arguments.part, arguments.quick)))
        return
    found = json.loads(arguments.kept.read_text()) if arguments.kept and arguments.kept.is_file() else {}
    for part in [arguments.part] if arguments.part else PARTS:
        command = [sys.executable, __file__, "--alone", "--part", part, *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
        found[part] = json.loads(done.stdout.splitlines()[-1])
        print(part, json.dumps(found[part]), flush=True)
        if arguments.kept:
            arguments.kept.write_text(json.dumps(found, indent=1) + "\n")
    if set(found) != set(PARTS):
        return
    lines = table(found)
    print("\n".join(lines))
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/prep.md")
    if output is not None:
        command_line = "python benchmarks/prep.py" + (" --quick" if arguments.quick else "")
        part_file = output.with_name(output.name + ".tmp")
        part_file.write_text("\n".join(["# Speed of data preparation", "", *surroundings(command_line), "", *lines]), encoding="utf-8")
        os.replace(part_file, output)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
