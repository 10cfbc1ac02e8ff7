"""In process, on Ray and in slices of SLURM the same shards come out, byte for byte, also when workers, slices and drivers are killed."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from csm.config import CodecConfig, EncodeConfig, PrepConfig, TextConfig
from data_prep.turns import prepare_turns
from tests.e2e.slurm_cluster import SlurmCluster, why_no_slurm
from tests.isolation import ROOT, run_isolated
from tests.test_prep_engine import checkpoint, content, write_recordings  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
NUM_UNITS = 8
NUM_PHASES = 8  # a unit takes a moment then, in which it can be killed


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("recordings"), num_each=6, duration_s=2.0)


@pytest.fixture(scope="module")
def undisturbed(recordings: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    config = PrepConfig(
        name="turns",
        input=str(recordings),
        output=str(output),
        num_workers=1,
        unit_min=0.08,
        val_share=0.2,
        encode=EncodeConfig(num_phases=NUM_PHASES),
        codec=CodecConfig(source=str(checkpoint), num_codebooks=4),
        text=TextConfig(tokenizer="words", source=str(checkpoint)),
    )
    assert prepare_turns(config) == 0
    assert len(list(output.glob("prep/done/*.json"))) >= NUM_UNITS
    return output


@pytest.fixture(scope="module")
def overrides(recordings: Path, checkpoint: Path) -> Callable[..., list[str]]:  # noqa: F811
    """The command line of `undisturbed`'s configuration, and more."""

    def make(*more: str) -> list[str]:
        settings = ["unit_min=0.08", "val_share=0.2", f"encode.num_phases={NUM_PHASES}", "codec.num_codebooks=4", "text=words"]
        sources = [f"codec.source={checkpoint}", f"text.source={checkpoint}"]
        return ["prep=turns", f"input={recordings}", *settings, *sources, *more]

    return make


def assert_went_on(told: dict, output: Path, undisturbed: Path) -> None:
    """The second command ended well, on what the first had left, and with the bytes of one that nobody disturbed."""
    assert told["again"]["status"] == 0, told["again"]["said"]
    assert 0 < len(told["before"]) < len(told["after"]), "killed before or after its work"
    assert {unit: told["after"][unit] for unit in told["before"]} == told["before"], "a finished unit was done again"
    assert content(output) == content(undisturbed)


def run_with_ray(what: str, work: Path, *overrides: str) -> dict:
    """What `tests.faults.killed_executors` tells of a Ray of its own. Its token is here, whether or not ~/.ray has one."""
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as own:  # a short path: it has sockets
        environment = {"RAY_TMPDIR": own, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "4" * 64}
        done = run_isolated([sys.executable, "-m", "tests.faults.killed_executors", what, work, *overrides], env=environment, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_on_ray_a_killed_driver_goes_on_and_a_killed_worker_is_replaced(overrides: Callable, undisturbed: Path, tmp_path: Path) -> None:
    told = run_with_ray("ray", tmp_path, *overrides("executor=ray"))
    assert "0 failed" in told["again"]["said"]  # in the second run, of which a worker was killed
    assert_went_on(told, tmp_path / "killed", undisturbed)


def test_a_cluster_without_the_commands_token_is_told_as_that(overrides: Callable, tmp_path: Path) -> None:
    told = run_with_ray("ray_without_token", tmp_path, *overrides("executor=ray"))
    assert told["status"] == 1
    assert "no worker could start" in told["said"] and "give both the same RAY_AUTH_MODE" in told["said"]


def test_on_slurm_killed_slices_are_named_and_a_killed_driver_goes_on(
    overrides: Callable, undisturbed: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    reason = why_no_slurm()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")  # a short path: it has sockets
    home = folder / "home"
    home.mkdir()
    for name in ("csm", "configs", "data_prep", "tests"):
        (home / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "slurm", home / "slurm")
    slurm = ["executor=slurm", "slurm.slices=2", 'slurm.options=["--cpus-per-task=1"]']
    with SlurmCluster(folder, home) as cluster:
        arguments = ["slurm", folder, *overrides(*slurm)]
        done = cluster.run([sys.executable, "-m", "tests.faults.killed_executors", *arguments], timeout=150)
        assert done.returncode == 0, done.stdout + done.stderr + cluster.log()
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["slices_killed"]["status"] == 1
    assert "of 2: " in told["slices_killed"]["said"] and "units not done (" in told["slices_killed"]["said"]
    assert "slurm/logs/csm-prep-" in told["slices_killed"]["said"]
    # "of an earlier command" is said where its array still runs; on a busy machine it may be over by then.
    assert_went_on(told, folder / "killed", undisturbed)
