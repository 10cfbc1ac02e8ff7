"""`csm plan prep`: hours of cores and GPUs, storage and numbers of files for preparing recordings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from rich.console import Console
from rich.table import Table

from csm.cli.hydra_entry import compose
from csm.config import PrepPlanConfig
from csm.frames import FRAME_RATE_HZ

_MB = 1e6
_SHARD_BYTES = 64 * 2**20  # data_prep.shard closes a shard before it grows beyond this
_DNSMOS_S = 54.0  # six turns of a recording, 9 s each
_BYTES_PER_CODE = 2


@dataclass
class PrepPlan:
    """Closed forms of a `PrepPlanConfig`.

    Attributes:
        core_hours: by stage.
        gpu_hours: of transcribing and finding speakers, 0 without GPUs.
        wall_hours: cores and GPUs side by side, all busy to the end.
        storage_mb: by kind.
    """

    core_hours: dict[str, float]
    gpu_hours: float
    wall_hours: float
    storage_mb: dict[str, float]
    num_recordings: int
    num_units: int
    num_shards: int
    num_files: int


def make_prep_plan(config: PrepPlanConfig) -> PrepPlan:
    """Work and storage are proportional to hours; every unit leaves its own shards, so there are never fewer shards than units."""
    kept_hours = config.hours * config.kept_share
    num_recordings = math.ceil(config.hours * 60 / config.recording_min)
    core_hours = {
        "decode, three times": 3 * config.hours / config.ingest_x,
        "transcribe and diarize": 0.0 if config.devices else config.hours / config.transcribe_x,
        "DNSMOS": num_recordings * min(_DNSMOS_S, config.recording_min * 60) / 3600 / config.dnsmos_x,
        "encode": kept_hours / config.encode_x,
    }
    gpu_hours = config.hours / config.transcribe_gpu_x if config.devices else 0.0
    wall_hours = max(sum(core_hours.values()) / config.cores, gpu_hours / config.devices if config.devices else 0.0)
    storage_mb = {
        "codes": kept_hours * 3600 * FRAME_RATE_HZ * config.num_codebooks * _BYTES_PER_CODE / _MB,
        "samples' JSON": kept_hours * config.sample_mb_per_hour,
        "FLAC": kept_hours * config.flac_mb_per_hour if config.keep_audio else 0.0,
        "between stages": config.hours * config.stages_mb_per_hour,
    }
    num_units = max(1, math.ceil(config.hours * 60 / max(config.unit_min, config.recording_min)))
    unit_bytes = (sum(storage_mb.values()) - storage_mb["between stages"]) * _MB / num_units
    num_shards = num_units * max(1, math.ceil(unit_bytes / _SHARD_BYTES))
    # A unit: a file a stage, a note, a lock, an index, and a tar with its table, both linked into the split.
    num_files = 6 * num_units + 4 * num_shards
    return PrepPlan(core_hours, gpu_hours, wall_hours, storage_mb, num_recordings, num_units, num_shards, num_files)


def plan_prep_command(overrides: Sequence[str], *, as_json: bool) -> None:
    """Compose a plan from overrides such as `hours=1e6 devices=64` and print it."""
    config = compose("plan_prep", list(overrides), PrepPlanConfig)
    plan = make_prep_plan(config)
    if as_json:
        print(json.dumps({"config": asdict(config), **asdict(plan)}, indent=1))
    else:
        _print(config, plan)


def _print(config: PrepPlanConfig, plan: PrepPlan) -> None:
    console = Console()
    work = Table(title=f"{config.hours:,.0f} hours in {plan.num_recordings:,} recordings", title_justify="left")
    work.add_column("work")
    work.add_column("core-hours", justify="right")
    work.add_column("GPU-hours", justify="right")
    for name, hours in plan.core_hours.items():
        gpu = plan.gpu_hours if name.startswith("transcribe") else 0.0
        work.add_row(name, f"{hours:,.1f}" if hours or not gpu else "", f"{gpu:,.1f}" if gpu else "")
    console.print(work)
    storage = Table(title="storage", title_justify="left")
    storage.add_column("what")
    storage.add_column("GB", justify="right")
    for name, size_mb in plan.storage_mb.items():
        storage.add_row(name, f"{size_mb / 1e3:,.1f}")
    console.print(storage)
    on = f"{config.cores} cores" + (f" and {config.devices} GPUs" if config.devices else "")
    console.print(
        f"{plan.wall_hours:,.1f} hours on {on}; {plan.num_units:,} units, {plan.num_shards:,} shards, {plan.num_files:,} files "
        "(a unit leaves at least one shard: a larger unit_min makes fewer)."
    )
    console.print(
        "Rates of a core were measured on one core of a shared Xeon, that of a GPU is an estimate from what others publish; "
        f"all of them are keys: {', '.join(field.name for field in fields(config) if field.name.endswith('_x'))}.",
        style="dim",
    )
