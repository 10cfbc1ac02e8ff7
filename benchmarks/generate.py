"""Making frames: ours beside transformers' `CsmForConditionalGeneration.generate`, frames/s, operator calls, distance to the floor.

    python benchmarks/generate.py                   # 1 thread, then 2; writes benchmarks/results/generate.md; 10 minutes
    python benchmarks/generate.py --quick           # a tiny model, a few seconds: whether it runs

Both have the same weights (ours, exported), hear the same 12 tokens of text, sample at temperature 0.9 from the 50 likeliest
codes and make the same number of frames; a clip's whole time counts, prompt included. Variants take turns in one process, so
that a busy machine slows all of them; the best of the rounds counts, by the clock and by CPU time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: two that spin starve each other
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_step import ROOT, SMALL, TINY, Timing, _better, _in_words, _time, measure_matmul_flops, surroundings, their_model

from csm import CSM, ModelConfig, TransformerConfig
from csm.frames import FRAME_RATE_HZ, SAMPLE_RATE_HZ, text_rows
from csm.generation import DepthLoop, Generator, iterate_frames
from csm.generation.native import NativeLoop
from csm.generation.prompt import pad_prompts
from csm.generation.watermark import load_watermarker

DEMO = ModelConfig()
PROMPT = list(range(3, 15))  # token ids
BASELINE = "transformers float32"


@dataclass(frozen=True)
class Variant:
    """One way to make frames.

    Attributes:
        dtype: of the model.
        weights: of the compiled loop; None is the eager one.
        guesses: see `NativeLoop`.
    """

    is_ours: bool
    dtype: torch.dtype = torch.float32
    weights: str | None = None
    guesses: bool | None = None

    @property
    def bytes_of(self) -> tuple[int, int]:
        """Bytes a weight of the backbone and of the depth decoder is read as."""
        if self.weights == "int8":
            return 2, 1
        return (self.dtype.itemsize,) * 2

    def bytes_read(self, config: ModelConfig, loop: Any, batch_size: int) -> int:
        """Bytes of weights that a step reads."""
        backbone, depth = weights_read(config)
        wide, narrow = self.bytes_of
        if batch_size == 1 and getattr(loop, "guesses", False):  # all steps in int16, then each weight once in float32
            once = layer_weights(config.depth_decoder) + config.num_codebooks * config.depth_decoder.width * config.audio_vocab_size
            return backbone * wide + depth * 2 + once * 4
        return backbone * wide + depth * narrow


VARIANTS = {
    BASELINE: Variant(is_ours=False),
    "transformers bfloat16": Variant(is_ours=False, dtype=torch.bfloat16),
    "ours float32, eager": Variant(is_ours=True),
    "ours bfloat16, eager": Variant(is_ours=True, dtype=torch.bfloat16),
    "ours float32, compiled": Variant(is_ours=True, weights="float32"),
    "the same without guesses": Variant(is_ours=True, weights="float32", guesses=False),
    "ours bfloat16, compiled": Variant(is_ours=True, dtype=torch.bfloat16, weights="bfloat16"),
    "ours int8 depth and bfloat16 backbone, compiled": Variant(is_ours=True, weights="int8"),
}


class CallCounter(TorchDispatchMode):
    """Counts operator calls."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += 1
        return func(*args, **(kwargs or {}))


def make_theirs(model: nn.Module, batch_size: int) -> Callable[[int], Tensor]:
    ids = torch.tensor([PROMPT] * batch_size)

    def make(num_frames: int) -> Tensor:
        sampling = dict(do_sample=True, temperature=0.9, top_k=50)
        depth_sampling = {f"depth_decoder_{name}": value for name, value in sampling.items()}
        mask = torch.ones_like(ids)
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=num_frames, output_audio=False, **sampling, **depth_sampling
        )

    return make


def make_ours(model: CSM, loop: Any, batch_size: int) -> Callable[[int], Tensor]:
    tokens, mask = pad_prompts([text_rows(PROMPT, model.config.num_codebooks)] * batch_size)
    seeds = list(range(batch_size))

    def make(num_frames: int) -> Tensor:
        frames = iterate_frames(model, tokens, mask, seeds=seeds, max_frames=num_frames, stop_at_eos=False, loop=loop)
        return torch.stack(list(frames), dim=1)

    return make


@dataclass
class Models:
    """A config's weights in every form; made once, as their packing takes seconds."""

    ours: dict[torch.dtype, CSM]
    theirs: dict[torch.dtype, nn.Module]
    loops: dict[str, Any]

    @staticmethod
    def of(config: ModelConfig) -> Models:
        ours = {torch.float32: CSM(config).eval(), torch.bfloat16: CSM(config).bfloat16().eval()}
        theirs = {dtype: their_model(ours[torch.float32]).eval().to(dtype) for dtype in ours}
        loops: dict[str, Any] = {}
        for name, variant in VARIANTS.items():
            if variant.is_ours:
                model = ours[variant.dtype]
                loops[name] = DepthLoop(model) if variant.weights is None else NativeLoop(model, variant.weights, guesses=variant.guesses)
        return Models(ours, theirs, loops)

    def makers(self, batch_size: int) -> dict[str, Callable[[int], Tensor]]:
        made = {}
        for name, variant in VARIANTS.items():
            if variant.is_ours:
                made[name] = make_ours(self.ours[variant.dtype], self.loops[name], batch_size)
            else:
                made[name] = make_theirs(self.theirs[variant.dtype], batch_size)
        return made


def measure_read_rate() -> float:
    """Bytes a second of summing 64 MiB of float32, more than the caches next to the cores hold."""
    numbers = torch.ones(16 * 2**20)
    return numbers.nbytes / min(_time(numbers.sum).wall_s for _ in range(5))


def layer_weights(shape: TransformerConfig) -> int:
    """Weights of all layers."""
    attention = shape.width * (2 * shape.width + 2 * shape.num_kv_heads * shape.head_dim)
    return shape.num_layers * (attention + 3 * shape.width * shape.ffn_width)


def weights_read(config: ModelConfig) -> tuple[int, int]:
    """Weights that one frame reads: of the backbone, and of depth decoder and heads, K-1 times where they are."""
    width, depth_width = config.backbone.width, config.depth_decoder.width
    head = width * config.audio_vocab_size
    depth = (config.num_codebooks - 1) * (layer_weights(config.depth_decoder) + depth_width * config.audio_vocab_size)
    return layer_weights(config.backbone), depth + head + width * depth_width


def measure_speed(models: Models, batch_size: int, num_threads: int, num_frames: int, num_rounds: int) -> dict[str, Timing]:
    """Seconds a frame of each variant; a first round warms up."""
    torch.set_num_threads(num_threads)
    makers = models.makers(batch_size)
    timings: dict[str, list[Timing]] = {name: [] for name in makers}
    for index in range(1 + num_rounds):
        for name, make in makers.items():
            num_made = num_frames if index else 2
            codes = None
            if index == 0:
                codes = make(num_made)
                assert codes.shape[0] == batch_size and codes.shape[1] >= num_made, codes.shape
            else:
                timing = _time(lambda make=make, num_made=num_made: make(num_made))
                timings[name].append(Timing(timing.wall_s / num_made, timing.cpu_s / num_made))
    return {name: _better(several) for name, several in timings.items()}


def count_calls(models: Models) -> dict[str, int]:
    """Operator calls of one frame at batch 1, without those of prompt and start."""
    counts = {}
    for name, make in models.makers(1).items():
        totals = []
        for num_frames in (3, 5):
            with CallCounter() as counter:
                make(num_frames)
            totals.append(counter.num_calls)
        counts[name] = (totals[1] - totals[0]) // 2
    return counts


def speed_table(
    config: ModelConfig, models: Models, batch_size: int, num_threads: int, timings: dict[str, Timing], calls: dict[str, int]
) -> list[str]:
    rate = measure_read_rate()
    peaks = {dtype: measure_matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    backbone, depth = weights_read(config)
    base = timings[BASELINE]
    rates = f"memory {rate / 1e9:.0f} GB/s, matmul {peaks[torch.float32] / 1e9:,.0f} GFLOP/s float32"
    columns = ["frames by", "ms a step", "CPU ms a thread", "frames/s", "ratio", "ratio by CPU time", "calls a frame", "MB a step"]
    lines = [
        f"### {config.name}, batch {batch_size}, {num_threads} thread{'s' if num_threads > 1 else ''}",
        "",
        f"Peaks in the same run: {rates}, {peaks[torch.bfloat16] / 1e9:,.0f} bfloat16.",
        "",
        f"| {' | '.join([*columns, 'floor, ms', 'of the floor'])} |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for name, timing in timings.items():
        variant = VARIANTS[name]
        num_bytes = variant.bytes_read(config, models.loops.get(name), batch_size)
        peak = peaks[torch.float32 if variant.bytes_of[0] == 4 else torch.bfloat16]
        floor_s = max(num_bytes / rate, 2 * batch_size * (backbone + depth) / peak)
        columns = [f"{timing.wall_s * 1e3:.1f}", f"{timing.cpu_s * 1e3:.1f}", f"{batch_size / timing.wall_s:.1f}"]
        columns += [f"{base.wall_s / timing.wall_s:.2f}", f"{base.cpu_s / timing.cpu_s:.2f}", f"{calls[name]:,}"]
        columns += [f"{num_bytes / 1e6:,.0f}", f"{floor_s * 1e3:.1f}", f"{floor_s / min(timing.wall_s, timing.cpu_s):.0%}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return [*lines, ""]


def speakers(config: ModelConfig) -> dict[str, Generator]:
    """Ours as a user has it: codec, watermark. Random weights throughout, whose speed is that of trained ones."""
    from csm.text import ByteTokenizer, WordTokenizer

    model = CSM(config)
    if config.num_codebooks == 32:
        from transformers import MimiConfig

        from csm.codec.mimi import MimiCodec

        with torch.random.fork_rng():
            torch.manual_seed(0)
            codec: Any = MimiCodec(MimiConfig()) if config.audio_vocab_size > 2048 else None
        if codec is None:
            return {}
        tokenizer: Any = ByteTokenizer()
    else:
        from csm.codec import SpectralCodec

        generator = torch.Generator().manual_seed(0)
        clips = [torch.randn(24_000, generator=generator) * 0.1 for _ in range(60)]
        codec = SpectralCodec.fit(clips, num_codebooks=config.num_codebooks, codebook_size=config.audio_vocab_size - 1)
        tokenizer = WordTokenizer(["one", "two", "three"], num_speakers=4)
    mark = load_watermarker()
    return {
        "float32, eager": Generator(model, codec, tokenizer, mark),
        "float32, compiled": Generator(model, codec, tokenizer, mark, compile=True),
        "int8, compiled": Generator(model, codec, tokenizer, mark, compile=True, int8=True),
    }


def stream_table(config: ModelConfig, num_threads: int, duration_s: float, num_rounds: int) -> list[str]:
    """Time to the first chunk and real-time factor of `Generator.stream`, codec and watermark included."""
    torch.set_num_threads(num_threads)
    lines = []
    options = dict(max_duration_s=duration_s, min_duration_s=duration_s, seed=0)
    for name, speaker in speakers(config).items():
        best: tuple[float, ...] = (1e9,) * 4
        list(speaker.stream("one two", **options))
        for _ in range(num_rounds):
            started, cpu = time.perf_counter(), time.process_time()
            chunks = speaker.stream("one two", **options)
            first = next(chunks)
            first_s = time.perf_counter() - started
            num_samples = first.shape[0] + sum(chunk.shape[0] for chunk in chunks)
            spoken_s, cpu_s = num_samples / SAMPLE_RATE_HZ, time.process_time() - cpu
            codes = speaker.last.codes
            frames_s = _time(lambda speaker=speaker: speaker.generate_codes("one two", **options)).wall_s
            assert codes.shape[0] == round(spoken_s * FRAME_RATE_HZ)
            row = (first_s, (time.perf_counter() - started - frames_s) / spoken_s, cpu_s / spoken_s, frames_s / spoken_s)
            best = tuple(min(pair) for pair in zip(best, row, strict=True))
        lines.append(f"| {config.name} | {num_threads} | {name} | {best[0] * 1e3:.0f} | {best[1]:.2f} | {best[2]:.2f} | {best[3]:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--frames", type=int, default=25, help="of a clip; 12.5 are a second (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written unless --output is given")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/generate.md")
    arguments = parser.parse_args()
    configs = [TINY] if arguments.quick else [SMALL, DEMO]
    num_frames, num_rounds = (6, 1) if arguments.quick else (arguments.frames, arguments.rounds)
    about = (
        f"A step makes a frame for every row of the batch; {num_frames} of them after 12 tokens of text, sampled at temperature 0.9, "
        f"top-k 50; the best of {num_rounds} rounds counts. Ratios are to the first row. MB a step: every weight as often as a step needs "
        "it, in the bytes it is kept in. The floor: those bytes at the rate of memory, or the products at the matmul peak: the longer."
    )
    lines = [about, "", *(f"- {_in_words(config)}" for config in configs), ""]
    for config in configs:
        models = Models.of(config)
        calls = count_calls(models)
        for num_threads in arguments.threads:
            for batch_size in arguments.batch_sizes:
                timings = measure_speed(models, batch_size, num_threads, num_frames, num_rounds)
                table = speed_table(config, models, batch_size, num_threads, timings, calls)
                lines += table
                print("\n".join(table), flush=True)
    table = [
        "### Streaming, codec (random weights; Mimi, or the spectral codec for the demo) and watermark included",
        "",
        "RTF is computing time over speech time: below 1 is faster than real time.",
        "",
        "| model | threads | loop | first chunk, ms | RTF | RTF by CPU time, all threads | of which frames |",
        "|---|---|---|---|---|---|---|",
    ]
    for config in [DEMO] if arguments.quick else configs:
        for num_threads in arguments.threads:
            table += stream_table(config, num_threads, 0.8 if arguments.quick else 2.4, min(num_rounds, 2))
    print("\n".join(table))
    lines += [*table, ""]
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/generate.md")
    if output is not None:
        command = " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]])
        part = output.with_name(output.name + ".tmp")
        part.write_text("\n".join(["# Generation", "", *surroundings(command), "", *lines]), encoding="utf-8")
        os.replace(part, output)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
