"""One training step of ours beside transformers' `CsmForConditionalGeneration`: speed, share of the matmul peak, memory.

    python benchmarks/train_step.py                 # 1 thread, then 2; writes benchmarks/results/train_step.md; 15 minutes
    python benchmarks/train_step.py --quick         # a tiny model, a few seconds: whether it runs

Both have the same weights (ours, exported), read the same rows, learn codebook 0 of every frame and codebooks 1..K-1 of the
same picked frames, and take the same fused AdamW step. Variants take turns in one process, so that a busy machine slows all
of them; the best of the rounds counts. Peak memory is read in a fresh process for each variant.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: two that spin starve each other
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages, as `import csm` asks for; both sides have them
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor, nn

from csm import CSM, ModelConfig, TransformerConfig, csm_loss
from csm.allocator import keep_freed_memory
from csm.config import LossConfig
from csm.frames import Batch, Rows, audio_rows, text_rows
from csm.loss import pick_depth_rows
from csm.model.pretrained import CodecWeights
from csm.model.products import has_bfloat16_products
from csm.training.plan import count_flops

ROOT = Path(__file__).resolve().parents[1]
AMORTIZATION = 1 / 16
MEMORY_ROWS = 2  # with one, weights, gradients and moments are most of what is there
GIB = 2**30
# csm_1b with every width divided by four: so the feed-forward parts keep their shares, 4 D and 8 E.
SMALL = ModelConfig(
    name="csm_1b / 4",
    backbone=TransformerConfig(num_layers=8, width=512, num_heads=8, num_kv_heads=2, ffn_width=2048),
    depth_decoder=TransformerConfig(num_layers=4, width=256, num_heads=4, num_kv_heads=1, ffn_width=2048),
    num_codebooks=32,
    audio_vocab_size=2051,
    text_vocab_size=258,
)
# The widths of csm_1b with fewer layers: what its products reach, in a process that holds both sides' weights and moments.
WIDE = ModelConfig(
    name="csm_1b with 3 of 16 layers",
    backbone=TransformerConfig(num_layers=3, width=2048, num_heads=32, num_kv_heads=8, ffn_width=8192),
    depth_decoder=TransformerConfig(num_layers=1, width=1024, num_heads=8, num_kv_heads=2, ffn_width=8192),
    num_codebooks=32,
    audio_vocab_size=2051,
    text_vocab_size=258,
)
TINY = ModelConfig(
    name="tiny",
    backbone=TransformerConfig(num_layers=2, width=64, num_heads=4, num_kv_heads=2, ffn_width=128),
    depth_decoder=TransformerConfig(num_layers=2, width=32, num_heads=2, num_kv_heads=1, ffn_width=64),
    num_codebooks=32,
    audio_vocab_size=131,
    text_vocab_size=258,
)
TINY_MIMI = {  # the reference model holds a codec, which takes no part: as small as it can be built
    "num_filters": 4, "hidden_size": 32, "upsample_groups": 32, "vector_quantization_hidden_dimension": 16, "codebook_dim": 16,
    "codebook_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 32,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One way to take the step.

    Attributes:
        amortization: share of frames the depth decoder learns from.
        recompute: activation checkpointing.
        depth_frames_at_once: as `loss.depth_frames_at_once`, whose default it is.
    """

    is_ours: bool
    precision: str = "float32"  # or "autocast", or "bfloat16": of weights, gradients and moments
    amortization: float = AMORTIZATION
    recompute: bool = False
    depth_frames_at_once: int | None = LossConfig().depth_frames_at_once


VARIANTS = {
    "transformers float32": Variant(is_ours=False),
    "ours float32": Variant(is_ours=True),
    "ours float32, depth of 16 frames at once": Variant(is_ours=True, depth_frames_at_once=16),
    "ours float32, activation checkpointing": Variant(is_ours=True, recompute=True),
    "transformers bf16 autocast": Variant(is_ours=False, precision="autocast"),
    "ours bf16 autocast": Variant(is_ours=True, precision="autocast"),
    "ours bf16 autocast, activation checkpointing": Variant(is_ours=True, precision="autocast", recompute=True),
    "ours bf16 weights and moments": Variant(is_ours=True, precision="bfloat16"),
    "ours float32, depth on every frame": Variant(is_ours=True, amortization=1.0),
    "ours bf16 autocast, depth on every frame": Variant(is_ours=True, precision="autocast", amortization=1.0),
}
HAS_BFLOAT16 = has_bfloat16_products("cpu")
if not HAS_BFLOAT16:  # torch's own bfloat16 products would take hours; ours run in float32 there
    del VARIANTS["transformers bf16 autocast"]
BASELINE = "transformers float32"
WIDE_VARIANTS = (BASELINE, "ours float32", "ours bf16 autocast")


@dataclass
class Timing:
    """Best of the rounds, in seconds: by the clock, and CPU time divided by the threads."""

    wall_s: float
    cpu_s: float


def made_up_batch(config: ModelConfig, num_positions: int, num_rows: int = 1) -> Batch:
    """Rows of a line of text, then frames of random codes and EOS."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(num_rows):
        text = torch.randint(3, config.text_vocab_size, (6,), generator=generator).tolist()
        codes = torch.randint(1, config.audio_vocab_size, (config.num_codebooks, num_positions - 7), generator=generator)
        rows.append([Rows.concatenate([text_rows(text, config.num_codebooks), audio_rows(codes)])])
    return Batch.from_documents(rows)


def their_model(ours: CSM) -> nn.Module:
    """transformers' model with our weights, by our export; without its codec."""
    from transformers import CsmForConditionalGeneration, MimiConfig, MimiModel

    codec = CodecWeights({**TINY_MIMI, "model_type": "mimi"}, MimiModel(MimiConfig(**TINY_MIMI)).state_dict())
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder, layout="transformers", codec=codec)
        model, info = CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    del model.codec_model
    return model.train()


def their_loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
    """The loss of the frames that `csm_loss` would pick, with transformers' own embedding, heads and losses."""
    tokens, mask = batch.tokens, batch.mask
    audio = model.backbone_model.embed_tokens(tokens[..., :-1])  # [B, T, D]
    embeds = torch.where(mask[..., :1], audio, model.embed_text_tokens(tokens[..., -1]))
    depth_index, num_picked = pick_depth_rows(batch.learn_depth, AMORTIZATION, (0, step, 0, 0))
    if num_picked == tokens.shape[-1] - 1:
        raise ValueError(f"{num_picked} picked frames: transformers 5.23 takes K frames for one; change the number of positions")
    is_picked = torch.zeros(mask.shape[:2], dtype=torch.bool).index_put(tuple(depth_index.T), torch.tensor(True))
    labels = tokens[..., :-1].masked_fill(~mask[..., :-1], -100)
    labels[..., 1:] = labels[..., 1:].masked_fill(~is_picked[..., None], -100)
    return model(inputs_embeds=embeds, labels=labels, use_cache=False).loss


def our_loss(model: CSM, batch: Batch, variant: Variant, step: int) -> Tensor:
    return csm_loss(model, batch, variant.amortization, step=step, depth_frames_at_once=variant.depth_frames_at_once).loss


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, variant: Variant) -> Callable[[int], float]:
    """One step of training; returns its loss."""

    def step(index: int) -> float:
        if variant.is_ours:
            model.activation_checkpointing = variant.recompute
        with torch.autocast("cpu", torch.bfloat16) if variant.precision == "autocast" else nullcontext():
            loss = our_loss(model, batch, variant, index) if variant.is_ours else their_loss(model, batch, index)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure_matmul_flops(dtype: torch.dtype) -> float:
    """Operations a second of one large product, by CPU time and by the clock: the better of the two.

    Of bfloat16 on a CPU that has no products of it, float32's, which it has to do with.
    """
    size, dtype = 2048, dtype if HAS_BFLOAT16 else torch.float32
    one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    timing = _time(lambda: one @ other)
    return 2 * size**3 / min(timing.wall_s, timing.cpu_s)


def _time(work: Callable[[], Any]) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Timing(time.perf_counter() - wall, (time.process_time() - cpu) / torch.get_num_threads())


def _better(timings: list[Timing]) -> Timing:
    return Timing(min(t.wall_s for t in timings), min(t.cpu_s for t in timings))


def measure_speed(config: ModelConfig, num_positions: int, num_threads: int, num_rounds: int, variants: Sequence[str]) -> dict[str, Any]:
    """The variants in turn. A first round warms up; before it, both models' losses are compared."""
    torch.set_num_threads(num_threads)
    keep_freed_memory()  # as training on a CPU does; both sides gain
    batch = made_up_batch(config, num_positions)
    ours = CSM(config)
    theirs = their_model(ours)
    first = {whose: _first_loss(model, batch, whose == "ours") for whose, model in (("ours", ours), ("theirs", theirs))}
    assert abs(first["ours"] - first["theirs"]) < 1e-3, first
    models = {name: (model, make_optimizer(model)) for name, model in (("ours", ours), ("theirs", theirs))}
    if any(VARIANTS[name].precision == "bfloat16" for name in variants):
        narrow = CSM(config, dtype=torch.bfloat16)
        models["bfloat16"] = narrow, make_optimizer(narrow)
    steps = {}
    for name in variants:
        variant = VARIANTS[name]
        whose = "ours" if variant.is_ours else "theirs"
        steps[name] = make_step(*models["bfloat16" if variant.precision == "bfloat16" else whose], batch, variant)
    timings: dict[str, list[Timing]] = {name: [] for name in steps}
    peaks: dict[str, float] = {"float32": 0.0, "bf16": 0.0}
    for index in range(1 + num_rounds):
        for name, step in steps.items():
            if VARIANTS[name].amortization == 1.0 and index > 2:  # slow, and no close call: twice, warm
                continue
            timing = _time(lambda step=step, index=index: step(index))
            if index:
                timings[name].append(timing)
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            peaks[name] = max(peaks[name], *(measure_matmul_flops(dtype) for _ in range(3)))
    return {"timings": {name: _better(values) for name, values in timings.items()}, "peaks": peaks}


def _first_loss(model: nn.Module, batch: Batch, is_ours: bool) -> float:
    with torch.no_grad():
        return float(csm_loss(model, batch, AMORTIZATION).loss if is_ours else their_loss(model, batch, 0))


def measure_memory(config: ModelConfig, name: str, num_positions: int) -> dict[str, float]:
    """Peak resident bytes of a step after the first, and what the states alone take. Meant for a process of its own."""
    variant = VARIANTS[name]
    torch.set_num_threads(1)
    batch = made_up_batch(config, num_positions, MEMORY_ROWS)
    model: nn.Module = CSM(config, dtype=torch.bfloat16 if variant.precision == "bfloat16" else torch.float32)
    if not variant.is_ours:
        model = their_model(model)  # type: ignore[arg-type]
    step = make_step(model, make_optimizer(model), batch, variant)
    step(0)  # the moments come to life, libraries load, pools open
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    step(1)
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    return {"peak": peak, "states": sum(4.0 * p.element_size() * p.numel() for p in model.parameters())}


def measure_memory_apart(name: str, num_positions: int, is_quick: bool) -> dict[str, float]:
    # Freed memory goes back to the system at once: the peak is what is live, not what was kept for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--memory-of", name, "--positions", str(num_positions), *(["--quick"] if is_quick else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def speed_table(config: ModelConfig, num_positions: int, num_threads: int, speed: dict[str, Any]) -> list[str]:
    """Markdown of one thread count."""
    timings, peaks = speed["timings"], speed["peaks"]
    flops = count_flops(config, num_positions, 1.0)
    base = timings[BASELINE]
    lines = [
        f"### {config.name}, {num_positions} positions, {num_threads} thread{'s' if num_threads > 1 else ''}",
        "",
        f"Matmul peak in the same run: {peaks['float32'] / 1e9:,.0f} GFLOP/s float32, "
        + (f"{peaks['bf16'] / 1e9:,.0f} GFLOP/s bfloat16." if HAS_BFLOAT16 else "also for bfloat16, of which this CPU has no products."),
        "",
        "| step | s | CPU-s a thread | frames/s | ratio | ratio by CPU time | of matmul peak | floor, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, timing in timings.items():
        variant = VARIANTS[name]
        num_picked = max(1, round((num_positions - 6) * variant.amortization))
        operations = flops.backbone * num_positions + flops.depth * num_picked
        peak = peaks["float32" if variant.precision == "float32" else "bf16"]
        floor_s = operations / peak
        columns = [f"{timing.wall_s:.2f}", f"{timing.cpu_s:.2f}", f"{num_positions / timing.wall_s:,.0f}"]
        columns += [f"{base.wall_s / timing.wall_s:.2f}", f"{base.cpu_s / timing.cpu_s:.2f}"]
        columns += [f"{floor_s / min(timing.wall_s, timing.cpu_s):.0%}", f"{floor_s:.2f}"]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    for dtype in ("float32", "bf16 autocast"):
        if f"ours {dtype}, depth on every frame" not in timings:
            continue
        full, few = timings[f"ours {dtype}, depth on every frame"], timings[f"ours {dtype}"]
        bound = (flops.backbone + flops.depth) / (flops.backbone + flops.depth * AMORTIZATION)
        lines.append("")
        lines.append(
            f"Depth on 1/16 of the frames is {full.wall_s / few.wall_s:.1f} times as fast as on all, {dtype} "
            f"({full.cpu_s / few.cpu_s:.1f} by CPU time; the operations alone say {bound:.1f})."
        )
    return [*lines, ""]


def _in_words(config: ModelConfig) -> str:
    backbone, depth = config.backbone, config.depth_decoder
    return (
        f"{config.name}: backbone {backbone.num_layers} x {backbone.width}, ffn {backbone.ffn_width}; depth decoder {depth.num_layers} x "
        f"{depth.width}, ffn {depth.ffn_width}; K {config.num_codebooks}, V {config.audio_vocab_size}"
    )


def memory_table(config: ModelConfig, num_positions: int, memory: dict[str, dict[str, float]]) -> list[str]:
    base = memory[BASELINE]
    lines = [
        f"### Peak memory of a step, each in a fresh process: {config.name}, {MEMORY_ROWS} rows of {num_positions} positions",
        "",
        "| step | peak, GiB | of which weights, gradients and moments | the rest | peak, share of the first | rest, share |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in memory.items():
        rest, base_rest = row["peak"] - row["states"], base["peak"] - base["states"]
        lines.append(
            f"| {name} | {row['peak'] / GIB:.2f} | {row['states'] / GIB:.2f} | {rest / GIB:.2f} | {row['peak'] / base['peak']:.2f} | "
            f"{rest / base_rest:.2f} |"
        )
    return [*lines, ""]


def surroundings(command: str) -> list[str]:
    """What a reader needs to get the numbers again; no host names."""
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.machine(),
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return [
        f"- command: `{command}`",
        f"- commit: {commit or 'not in git'}; {date.today().isoformat()}",
        f"- machine: {cpu}, {os.cpu_count()} cores, {memory_gib:.0f} GiB; load average at the end {load}",
        f"- torch {torch.__version__}, transformers {transformers.__version__}, python {platform.python_version()}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--positions", type=int, default=1024, help="of the one row; all but 6 are frames; memory and the wide model: twice"
    )
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round, nothing written unless --output is given")
    parser.add_argument("--output", type=Path, help="default benchmarks/results/train_step.md")
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config, num_rounds = (TINY, 1) if arguments.quick else (SMALL, arguments.rounds)
    if arguments.memory_of:
        print(json.dumps(measure_memory(config, arguments.memory_of, arguments.positions)))
        return
    about = (
        f"One row, depth on 1/16 of the frames unless said. A step: forward, backward, fused AdamW; "
        f"the best of {num_rounds} rounds counts. Ratios are to the first row; the floor is the operations at the matmul peak."
    )
    lines = [about, "", f"- {_in_words(config)}", *([] if arguments.quick else [f"- {_in_words(WIDE)}"]), ""]
    cases = [(config, arguments.positions, num_threads, tuple(VARIANTS)) for num_threads in arguments.threads]
    if not arguments.quick:
        cases += [(WIDE, 2 * arguments.positions, num_threads, WIDE_VARIANTS) for num_threads in arguments.threads]
    for shapes, num_positions, num_threads, variants in cases:
        table = speed_table(shapes, num_positions, num_threads, measure_speed(shapes, num_positions, num_threads, num_rounds, variants))
        lines += table
        print("\n".join(table), flush=True)
    if os.path.exists("/proc/self/clear_refs"):
        num_positions = 2 * arguments.positions
        # Depth on every frame of two long rows takes more than 20 GiB: its cost is in the speed table.
        names = [name for name, variant in VARIANTS.items() if variant.amortization < 1]
        table = memory_table(config, num_positions, {name: measure_memory_apart(name, num_positions, arguments.quick) for name in names})
        print("\n".join(table))
        lines += table
    output = arguments.output or (None if arguments.quick else ROOT / "benchmarks/results/train_step.md")
    if output is not None:
        command = " ".join(["python", "benchmarks/train_step.py", *sys.argv[1:]])
        part = output.with_name(output.name + ".tmp")
        part.write_text("\n".join(["# Training step", "", *surroundings(command), "", *lines]), encoding="utf-8")
        os.replace(part, output)
        print(f"written: {output}")


if __name__ == "__main__":
    main()
