"""The plan's closed forms against the real model, and its memory against a real process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from csm.cli.hydra_entry import compose
from csm.config import ModelConfig, PlanConfig
from csm.training.plan import count_activations, count_flops, count_parameters, make_plan, meta_parameters, state_bytes


def _model(name: str) -> ModelConfig:
    return compose("plan", [f"model={name}"], PlanConfig).model


@pytest.mark.parametrize(("name", "billions"), [("csm_1b", 1.553), ("csm_3b", 3.775), ("csm_8b", 8.194), ("demo", 0.004192)])
def test_closed_form_counts_what_the_model_has(name: str, billions: float) -> None:
    model = _model(name)
    total = count_parameters(model).total
    assert total == meta_parameters(model)
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("name", "full", "amortized"), [("csm_1b", 28.4, 7.65), ("csm_3b", 67.9, 21.1), ("csm_8b", 104.6, 47.4)])
def test_flops_a_frame(name: str, full: float, amortized: float) -> None:
    flops = count_flops(_model(name), seq_len=2048, amortization=1 / 16)
    assert flops.per_frame_full / 1e9 == pytest.approx(full, rel=0.01)
    assert flops.per_frame / 1e9 == pytest.approx(amortized, rel=0.01)


def test_states_shrink_with_devices_as_each_stage_says() -> None:
    count = count_parameters(_model("csm_8b")).total
    gib = {stage: sum(state_bytes(count, stage, 8, "bf16-mixed")[:3]) / 2**30 for stage in ("ddp", "zero1", "zero2", "zero3")}
    assert [round(gib[stage]) for stage in ("ddp", "zero1", "zero2", "zero3")] == [122, 42, 29, 15]
    on_device = state_bytes(count, "zero3_offload", 8, "bf16-mixed")
    assert on_device[2] == 0 and on_device[3] == pytest.approx(12 * count / 8)


def test_plan_is_valid_json_with_one_row_a_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    from csm.cli.plan import plan_command

    plan_command(["model=demo", "seq_len=256", "devices=4"], as_json=True)
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["memory"]) == 10
    assert plan["parameters"]["total"] == count_parameters(ModelConfig()).total
    assert plan["device_hours"] == pytest.approx(4 * plan["wall_hours"])


def test_plan_is_whole_on_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from csm.cli.plan import plan_command

    monkeypatch.setenv("COLUMNS", "80")
    plan_command(["model=demo", "seq_len=256", "devices=1", "rows=1000"], as_json=False)  # activations of three digits
    said = capsys.readouterr().out
    assert "zero3_offload" in said and "…" not in said
    assert max(len(line) for line in said.splitlines()) <= 80


@pytest.mark.slow
def test_checkpointing_and_bfloat16_take_less_memory() -> None:
    config = PlanConfig(model=_model("csm_small"), precision="32", seq_len=2048, rows=2)
    plain = count_activations(config, activation_checkpointing=False, depth_frames_at_once=None)
    assert count_activations(config, activation_checkpointing=False, depth_frames_at_once=64) < 0.8 * plain
    assert count_activations(config, activation_checkpointing=True, depth_frames_at_once=None) < 0.6 * plain
    config.precision = "bf16-true"
    assert count_activations(config, activation_checkpointing=False, depth_frames_at_once=None) < 0.75 * plain


@pytest.mark.slow
def test_memory_that_does_not_fit_is_said_so() -> None:
    plan = make_plan(PlanConfig(model=_model("csm_8b"), devices=1, seq_len=256, memory_gib=24))
    assert all(row.rows_that_fit == 0 for row in plan.memory if row.strategy != "zero3_offload")


_MEASURE = """
import resource, sys, torch
from csm.cli.hydra_entry import compose
from csm.config import PlanConfig
from csm.model import functions
from csm.model.csm import CSM
from csm.training.plan import _step
functions._CHUNK_ELEMENTS *= 16  # as on a GPU, which the plan is for
torch.set_num_threads(1)
rows, seq_len, checkpointing, at_once = (int(argument) for argument in sys.argv[1:])
config = compose("plan", ["model=csm_small"], PlanConfig)
model = CSM(config.model)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
optimizer.step()
_step(model, 1, 32, 1 / 16, at_once or None)  # libraries load and pools open
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
model.activation_checkpointing = bool(checkpointing)
_step(model, rows, seq_len, 1 / 16, at_once or None)
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(before, peak - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to read a process's peak memory")
@pytest.mark.parametrize(
    ("rows", "seq_len", "is_checkpointed", "at_once"),
    [(1, 1024, False, 64), (4, 1024, False, 64), (4, 1024, True, 64), (4, 1024, False, None)],
)
def test_planned_memory_is_within_15_percent_of_a_real_step(rows: int, seq_len: int, is_checkpointed: bool, at_once: int | None) -> None:
    config = PlanConfig(model=_model("csm_small"), precision="32", seq_len=seq_len, rows=rows, devices=1)
    planned = count_activations(config, activation_checkpointing=is_checkpointed, depth_frames_at_once=at_once)
    # Freed memory goes back to the system at once, so that the peak is what is live and not what was kept for later.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "PYTHONPATH": os.getcwd()}
    arguments = [sys.executable, "-c", _MEASURE, *map(str, (rows, seq_len, int(is_checkpointed), at_once or 0))]
    run = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True, timeout=300)
    before, measured = map(int, run.stdout.split())
    assert planned == pytest.approx(measured, rel=0.15)
    states = sum(state_bytes(count_parameters(config.model).total, "ddp", 1, "32"))
    assert states < before < states + 0.6 * 2**30  # the interpreter and torch are the rest
