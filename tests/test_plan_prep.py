"""`csm plan prep`: arithmetic that can be done by hand."""

from __future__ import annotations

import json

import pytest

from csm.cli.commands import main
from csm.cli.plan_prep import make_prep_plan
from csm.config import PrepPlanConfig


def test_a_million_hours_by_hand():
    plan = make_prep_plan(PrepPlanConfig(hours=1e6, devices=64, cores=4096, kept_share=1.0))
    assert plan.storage_mb["codes"] == pytest.approx(2.88e6)  # 32 codebooks x 2 bytes x 12.5 a second: 2.88 MB an hour
    assert plan.gpu_hours == pytest.approx(1e6 / 48)
    assert plan.core_hours["transcribe and diarize"] == 0.0
    assert plan.num_recordings == plan.num_units == plan.num_shards == 2_000_000
    assert plan.wall_hours == pytest.approx(max(1e6 / 48 / 64, sum(plan.core_hours.values()) / 4096))


def test_larger_units_leave_fewer_files_and_cores_do_what_gpus_would():
    small, large = (make_prep_plan(PrepPlanConfig(hours=1e4, unit_min=minutes)) for minutes in (30.0, 600.0))
    assert large.num_units == small.num_units / 20 and large.num_files < small.num_files / 10
    assert small.gpu_hours == 0.0 and small.core_hours["transcribe and diarize"] == pytest.approx(1e4 / 5.0)


def test_the_command_prints_tables_and_json_and_refuses_a_typo(capsys):
    assert main(["plan", "prep", "hours=1e6", "devices=64"]) == 0
    assert "GPU-hours" in capsys.readouterr().out
    assert main(["plan", "prep", "hours=1e6", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_recordings"] == 2_000_000
    assert main(["plan", "prep", "houres=1e6"]) == 2
    assert "did you mean hours" in capsys.readouterr().err
