"""`csm plan`: the plan of a run as tables, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from csm.cli.hydra_entry import compose
from csm.config import PlanConfig
from csm.training.plan import GIB, Plan, make_plan


def plan_command(overrides: Sequence[str], *, as_json: bool) -> None:
    """Compose a plan from overrides such as `model=csm_8b devices=64 hours=1e5` and print it."""
    config = compose("plan", list(overrides), PlanConfig)
    plan = make_plan(config)
    if as_json:
        print(json.dumps(_as_dict(config, plan), indent=1))
    else:
        _print(config, plan)


def _as_dict(config: PlanConfig, plan: Plan) -> dict[str, object]:
    return {
        "config": asdict(config),
        "parameters": {**asdict(plan.parameters), "total": plan.parameters.total},
        "flops": asdict(plan.flops),
        "memory": [{**asdict(row), "total": row.total} for row in plan.memory],
        "num_frames": plan.num_frames,
        "frames_per_s": plan.frames_per_s,
        "device_hours": plan.device_hours,
        "wall_hours": plan.wall_hours,
    }


def _print(config: PlanConfig, plan: Plan) -> None:
    console = Console()
    parts = Table(title=f"{config.model.name}: {plan.parameters.total / 1e9:.3f}B parameters", title_justify="left")
    parts.add_column("part")
    parts.add_column("parameters", justify="right")
    for name, count in asdict(plan.parameters).items():
        parts.add_row(name.replace("_", " "), f"{count:,}")
    console.print(parts)

    flops = Table(title=f"training FLOPs a frame, rows of {config.seq_len}", title_justify="left")
    flops.add_column("depth decoder on")
    flops.add_column("GFLOP", justify="right")
    flops.add_row("every frame", f"{plan.flops.per_frame_full / 1e9:.2f}")
    flops.add_row(f"{config.amortization:.4g} of them", f"{plan.flops.per_frame / 1e9:.2f}")
    console.print(flops)

    memory = Table(
        title=f"GiB a device on {config.devices} devices, {config.precision}, {config.rows} x {config.seq_len} positions",
        title_justify="left",
        box=SIMPLE_HEAD,  # 80 columns are enough
        padding=(0, 1, 0, 0),
    )
    for name in ("strategy", "recom-\npute", "weights", "gradi-\nents", "opti-\nmizer", "activa-\ntions", "total", "host", "rows"):
        memory.add_column(name, justify="left" if name == "strategy" else "right", no_wrap=True)
    for row in plan.memory:
        sizes = (row.weights, row.gradients, row.optimizer, row.activations, row.total, row.host)
        memory.add_row(
            row.strategy,
            "on" if row.activation_checkpointing else "off",
            *(f"{size / GIB:.2f}" for size in sizes),
            str(row.rows_that_fit) if row.rows_that_fit else "none",
        )
    console.print(memory)

    console.print(
        f"{config.hours:,.0f} hours x {config.epochs:g} epochs = {plan.num_frames / 1e6:,.1f}M frames; at {config.mfu:.0%} of "
        f"{config.peak_tflops:g} TFLOP/s: {plan.frames_per_s:,.0f} frames/s a device, {plan.device_hours:,.1f} device-hours, "
        f"{plan.wall_hours:,.1f} hours on {config.devices}."
    )
    console.print(
        "recompute is trainer.activation_checkpointing; rows, how many fit into memory_gib, leaving nothing for the context, communication "
        "buffers and fragmentation. Not counted: ema.decay, 4 bytes a parameter; adapters, which need less.",
        style="dim",
    )
