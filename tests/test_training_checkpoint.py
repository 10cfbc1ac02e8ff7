"""Checkpoint folders: whole or refused, no pickle, loadable anywhere, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open

from csm.cli.train import train
from csm.config import ModelConfig, OptimConfig, TrainConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.model.csm import CSM
from csm.training.background import BackgroundWriter, TensorCopies, available_memory_bytes
from csm.training.callbacks import Clock, DataPosition, Validation
from csm.training.checkpoint import (
    FolderCheckpointIO,
    _decode,
    _encode,
    checkpoint_step,
    find_fault,
    list_checkpoints,
    newest_valid_checkpoint,
    publish,
)
from csm.training.module import CSMModule
from csm.training.saving import Checkpoints
from csm.training.steps import StepLoader
from tests.isolation import run_isolated
from tests.test_training_module import read_rows, run_config


def _adamw_run(model: ModelConfig, run_dir: Path, **trainer: object) -> TrainConfig:
    settings = {"max_steps": 10, "log_every": 3, "validate_every": 4, "checkpoint_every": 5, "accumulate": 2, **trainer}
    config = run_config(model, run_dir, **settings)
    return replace(config, optim=OptimConfig(lr=0.01, warmup_steps=2), loss=replace(config.loss, amortization=0.25, frame_dropout=0.3))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten tiny AdamW steps, checkpoints at 5 and 10; read only."""
    from tests.conftest import tiny_config

    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    train(_adamw_run(tiny_config(), run_dir))
    return run_dir


@pytest.fixture
def broken_run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of that run whose newest checkpoint lost a file, as after a crash at step 10."""
    run_dir = tmp_path / "broken"
    shutil.copytree(finished_run, run_dir)
    (run_dir / "checkpoints/step_000010/optimizer.safetensors").unlink()
    return run_dir


def test_checkpoint_is_a_folder_of_safetensors_and_json_with_a_manifest(finished_run: Path) -> None:
    folder = finished_run / "checkpoints/step_000010"
    names = set(_files(folder))
    assert names == {"config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == names - {"manifest.json"}
    assert not list(finished_run.rglob("*.tmp"))
    assert find_fault(folder) is None


def test_checkpoint_is_a_model_to_load(finished_run: Path) -> None:
    model = CSM.from_pretrained(finished_run)
    with safe_open(finished_run / "checkpoints/step_000010/model.safetensors", "pt") as file:
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, file.get_tensor(name))


def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(finished_run: Path, broken_run: Path, capsys: pytest.CaptureFixture) -> None:
    config = _adamw_run(CSM.from_pretrained(finished_run).config, broken_run)
    train(replace(config, resume="auto"))
    said = capsys.readouterr().out
    assert "step_000010: not usable, optimizer.safetensors is missing" in said
    assert "resuming" in said and "step_000005" in said
    assert _files(broken_run / "checkpoints") == _files(finished_run / "checkpoints")
    assert (broken_run / "metrics.csv").read_bytes() == (finished_run / "metrics.csv").read_bytes()
    assert [row["step"] for row in read_rows(broken_run)] == ["3", "4", "6", "8", "9", "10"]


def test_named_checkpoint_resumes_its_own_run_or_a_new_one(finished_run: Path, broken_run: Path, tmp_path: Path) -> None:
    model = CSM.from_pretrained(finished_run).config
    config = replace(_adamw_run(model, tmp_path / "new"), resume=str(broken_run / "checkpoints/step_000005"))
    assert train(config) == tmp_path / "new"
    assert [row["step"] for row in read_rows(tmp_path / "new")] == ["6", "8", "9", "10"]
    assert train(replace(config, run_dir=None)) == broken_run
    weights = "checkpoints/step_000010/model.safetensors"
    assert (broken_run / weights).read_bytes() == (tmp_path / "new" / weights).read_bytes()


def test_going_back_in_a_run_sets_its_newer_checkpoints_aside(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    config = _adamw_run(CSM.from_pretrained(finished_run).config, run_dir, checkpoint_every=0, max_steps=7)
    train(replace(config, resume=str(run_dir / "checkpoints/step_000005")))
    aside = run_dir / "checkpoints/set_aside_step_000010"
    assert f"step_000010 is newer than step 5: set aside as {aside.name}" in capsys.readouterr().out
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir / "checkpoints")] == [5, 7]
    train(replace(config, resume="auto"))  # takes step 7, not what lay behind the point that was gone back to
    assert "already at step 7 of 7" in capsys.readouterr().out
    train(replace(config, resume=str(aside), run_dir=str(tmp_path / "new"), trainer=replace(config.trainer, max_steps=11)))
    assert (tmp_path / "new/checkpoints/last.txt").read_text() == "step_000011\n"


@pytest.mark.parametrize("lead", ["", "checkpoints/last", "checkpoints/step_000005"])
def test_plain_lightning_goes_on_from_what_leads_to_a_checkpoint(lead: str, finished_run: Path) -> None:
    class Module(CSMModule):
        def on_train_start(self) -> None:
            self.started_at = self.step
            self.trainer.should_stop = True  # what was restored is all that matters here

    config = _adamw_run(CSM.from_pretrained(finished_run).config, finished_run, max_steps=20)
    model = CSM(config.model, seed=1)
    module = Module(model, config)
    data = CSMDataModule(config.data, config.model, seed=config.seed, accumulate=2)
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "max_epochs": 1}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        plugins=[FolderCheckpointIO(model)],
        callbacks=[DataPosition(data)],
        **settings,
    )
    steps = StepLoader(data.train_dataloader(), accumulate=2, amortization=0.25, num_steps=lambda: 1)
    trainer.fit(module, train_dataloaders=steps, ckpt_path=finished_run / lead)
    expected = 5 if lead.endswith("5") else 10
    assert module.started_at == expected and data.state_dict()["batch"] >= expected
    with safe_open(finished_run / f"checkpoints/step_{expected:06d}/optimizer.safetensors", "pt") as file:
        saved = [file.get_tensor(name) for name in sorted(file.keys()) if name.endswith("exp_avg")]
    restored = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
    assert sorted(float(tensor.sum()) for tensor in restored) == sorted(float(tensor.sum()) for tensor in saved)


def test_more_steps_can_be_asked_of_a_finished_run(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run_dir = tmp_path / "longer"
    shutil.copytree(finished_run, run_dir)
    config = _adamw_run(CSM.from_pretrained(finished_run).config, run_dir)
    train(replace(config, resume="auto"))
    assert "already at step 10 of 10" in capsys.readouterr().out
    longer = replace(config, resume="auto", trainer=replace(config.trainer, max_steps=12), optim=replace(config.optim, weight_decay=0.5))
    train(longer)
    assert "optim.weight_decay: 0.05 -> 0.5; trainer.max_steps: 10 -> 12" in capsys.readouterr().out
    state = json.loads((run_dir / "checkpoints/step_000012/state.json").read_text())
    assert [group["weight_decay"] for group in state["optimizer_states"][0]["param_groups"]] == [0.5, 0.0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "state.json").write_text("{}"), "state.json has 2 bytes"),
        (lambda folder: _flip_last_byte(folder / "model.safetensors"), "model.safetensors differs from the manifest's sha256"),
    ],
)
def test_damage_is_found_and_said(damage, expected: str, finished_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_000010"
    shutil.copytree(finished_run / "checkpoints/step_000010", folder)
    damage(folder)
    fault = find_fault(folder)
    assert fault is not None and expected in fault
    with pytest.raises(ValueError, match="not usable"):
        FolderCheckpointIO(CSM.from_pretrained(finished_run)).load_checkpoint(folder)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_run_without_one_whole_checkpoint_is_refused(broken_run: Path, finished_run: Path) -> None:
    (broken_run / "checkpoints/step_000005/manifest.json").unlink()
    config = _adamw_run(CSM.from_pretrained(finished_run).config, broken_run)
    assert newest_valid_checkpoint(broken_run / "checkpoints", lambda line: None) is None
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        train(replace(config, resume="auto"))


def test_resume_auto_starts_fresh_where_nothing_is(tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(replace(run_config(tiny_model_config, tmp_path / "new", max_steps=1), resume="auto"))
    assert "starting fresh" in capsys.readouterr().out


def test_checkpoint_of_another_model_is_refused(finished_run: Path, tmp_path: Path) -> None:
    from tests.conftest import tiny_config

    config = replace(_adamw_run(tiny_config(8), tmp_path / "new"), resume=str(finished_run / "checkpoints/step_000005"))
    with pytest.raises(ValueError, match=r"is of another model: audio_embeddings\.weight is \(132, 32\), this run's .* has \(264, 32\)"):
        train(config)


def test_old_checkpoints_go_and_the_best_stays(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    # A rate that ruins the model: the first validation is the best.
    config = run_config(tiny_model_config, tmp_path, max_steps=6, checkpoint_every=1, validate_every=1, keep_checkpoints=2)
    train(replace(config, optim=OptimConfig(name="sgd", lr=8.0, warmup_steps=0, clip_norm=0.0)))
    losses = {int(row["step"]): float(row["val/loss"]) for row in read_rows(tmp_path)}
    best = min(losses, key=lambda step: losses[step])
    assert (tmp_path / "checkpoints/best.txt").read_text() == f"step_{best:06d}\n"
    assert (tmp_path / "checkpoints/last.txt").read_text() == "step_000006\n"
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "checkpoints")] == sorted({best, 5, 6})


def test_run_killed_between_its_last_checkpoint_and_its_name_is_put_right(finished_run: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    shutil.copytree(finished_run, run_dir)
    for name in ("last", "best"):
        (run_dir / f"checkpoints/{name}.txt").write_text("step_000005\n")
    config = _adamw_run(CSM.from_pretrained(finished_run).config, run_dir, keep_checkpoints=1)  # this call's own is not asked
    train(replace(config, resume="auto"))
    assert _files(run_dir / "checkpoints") == _files(finished_run / "checkpoints")


def test_every_kth_checkpoint_is_kept_for_good(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config = run_config(tiny_model_config, tmp_path, max_steps=9, checkpoint_every=1, keep_every=4, keep_checkpoints=1)
    train(config)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "checkpoints")] == [4, 8, 9]
    with pytest.raises(ValueError, match="trainer.keep_every=3: expected a multiple of trainer.checkpoint_every=2"):
        replace(config.trainer, checkpoint_every=2, keep_every=3)


def test_writing_beside_the_step_changes_no_byte(finished_run: Path, tmp_path: Path) -> None:
    config = _adamw_run(CSM.from_pretrained(finished_run).config, tmp_path / "in_step", async_checkpoint=False)
    assert not config.trainer.async_checkpoint and TrainerConfig().async_checkpoint
    train(config)
    assert _files(tmp_path / "in_step/checkpoints") == _files(finished_run / "checkpoints")


def test_steps_go_on_while_a_checkpoint_is_written_and_last_moves_after_it(
    tiny_model_config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first write is held until two more steps are done; what it holds is of its own step all the same."""
    gone_on, threads, pointers = threading.Event(), [], []
    step_of, last = CSMModule.training_step, tmp_path / "held/checkpoints/last.txt"

    def step(module: CSMModule, batch: object, batch_idx: int) -> None:
        step_of(module, batch, batch_idx)
        pointers.append(last.exists())
        if module.step == 4:
            gone_on.set()

    def held(*arguments: object, **named: object) -> None:
        threads.append(threading.current_thread())
        assert gone_on.wait(timeout=60)
        publish(*arguments, **named)

    monkeypatch.setattr(CSMModule, "training_step", step)
    monkeypatch.setattr("csm.training.checkpoint.publish", held)
    settings = {"max_steps": 4, "checkpoint_every": 2}
    train(_adamw_run(tiny_model_config, tmp_path / "held", **settings))
    assert threads[0] is not threading.main_thread() and pointers == [False] * 4
    assert threads[1] is threading.main_thread()  # nothing goes on beside the last save
    assert last.read_text() == "step_000004\n"
    monkeypatch.undo()
    train(_adamw_run(tiny_model_config, tmp_path / "free", **settings, async_checkpoint=False))
    assert _files(tmp_path / "held/checkpoints") == _files(tmp_path / "free/checkpoints")


def test_writer_has_one_save_in_flight_and_counts_waits() -> None:
    writer, done, may_end = BackgroundWriter(), [], threading.Event()
    writer.start(lambda: (may_end.wait(60), done.append("first")))
    writer.then(lambda: done.append("pointers"))
    writer.check()
    assert not done and not writer.num_waits
    threading.Timer(0.2, may_end.set).start()
    writer.start(lambda: done.append("second"))
    assert done[:2] == ["first", "pointers"] and writer.num_waits == 1 and writer.waited_s > 0.05
    writer.close()
    assert done == ["first", "pointers", "second"]
    at_once = BackgroundWriter(is_async=False)
    at_once.start(lambda: done.append("third"))
    at_once.then(lambda: done.append("pointers"))
    assert done[3:] == ["third", "pointers"]


@pytest.mark.parametrize("call", ["check", "finish", "make_room", "close"])
def test_error_of_a_write_is_raised_once_and_stops_what_follows(call: str) -> None:
    def fail() -> None:
        raise OSError("disk full")

    writer, done = BackgroundWriter(), []
    writer.start(fail)
    writer.then(lambda: done.append("pointers"))
    while any(not job.done() for job in writer._pending):
        threading.Event().wait(0.01)
    with pytest.raises(OSError, match="disk full"):
        getattr(writer, call)()
    writer.check()
    writer.close()
    assert not done


def test_copies_are_of_the_moment_and_their_memory_is_used_again() -> None:
    copies, weight = TensorCopies(), torch.arange(6.0).view(2, 3)
    first = copies.take({"w": weight, "t": weight.t()})
    weight += 10
    assert torch.equal(first["w"], torch.arange(6.0).view(2, 3)) and torch.equal(first["t"], torch.arange(6.0).view(2, 3).t())
    second = copies.take({"w": weight, "t": weight.t().double()})
    assert second["w"].data_ptr() == first["w"].data_ptr() and torch.equal(second["w"], weight)
    assert second["t"].dtype == torch.float64 and second["t"].is_contiguous()


def test_run_too_large_for_copies_saves_in_the_step_and_says_so(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = available_memory_bytes()
    assert free is None or 2**20 < free < 2**45
    monkeypatch.setattr("csm.training.background.available_memory_bytes", lambda: 1000)
    with caplog.at_level(logging.WARNING):
        train(_adamw_run(CSM.from_pretrained(finished_run).config, tmp_path / "large"))
    assert caplog.text.count("checkpoints are written in the step") == 1
    assert _files(tmp_path / "large/checkpoints") == _files(finished_run / "checkpoints")


def test_ranks_that_go_on_from_different_steps_are_stopped(finished_run: Path, tmp_path: Path) -> None:
    config = run_config(CSM.from_pretrained(finished_run).config, tmp_path)
    module = CSMModule(CSM(config.model), config)
    module.step = 5
    # What a shared disk that lags would make of it, without the second machine.
    trainer = SimpleNamespace(global_rank=1, strategy=SimpleNamespace(broadcast=lambda step: 10))
    checkpoints = Checkpoints(tmp_path, config, Validation(list, config, Clock()), Clock())
    with pytest.raises(ValueError, match=r"rank 1 goes on from step 5, rank 0 from step 10: .* start again with resume=.*step_000005$"):
        checkpoints.on_train_start(trainer, module)
    module.step = 10
    checkpoints.on_train_start(trainer, module)


_ON_A_FULL_DISK = """
import os, subprocess, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from csm.cli.train import main

def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)

def run(*overrides):
    sys.argv = ["train.py", *sys.argv[2:], "run_dir=run", "resume=auto", *overrides]
    try:
        main()
        return 0
    except SystemExit as left:
        return left.code
    finally:
        sys.argv = ["-c", *saved]

saved = sys.argv[1:]
os.chdir(sys.argv[1])
Path("run/checkpoints").mkdir(parents=True)
mount("-t", "tmpfs", "-o", "ro", "tmpfs", "run/checkpoints")
print("read-only:", run(), flush=True)
subprocess.run(["umount", "run/checkpoints"], check=True)
mount("-t", "tmpfs", "-o", "size=320k", "tmpfs", "run/checkpoints")
print("full:", run(), sorted(path.name for path in Path("run/checkpoints").iterdir()), flush=True)
mount("-o", "remount,size=4m", "run/checkpoints")
print("room:", run(), sorted(path.name for path in Path("run/checkpoints").iterdir()), flush=True)
"""


@pytest.mark.slow
def test_full_or_read_only_disk_is_one_clear_line_and_earlier_checkpoints_stay(tmp_path: Path) -> None:
    from tests.test_train_cli import TINY

    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path), *TINY, "trainer.max_steps=6", "trainer.checkpoint_every=1"]
    done = run_isolated([*command, "trainer.validate_every=0", "trainer.keep_checkpoints=9"], timeout=300)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("read-only:", "full:", "room:"))]
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 2, done.stderr
    assert said[0] == "read-only: 1"
    assert errors[0] == (
        "error: checkpoint run/checkpoints/step_000001 could not be written: Read-only file system; there is no earlier checkpoint. "
        "Make room there, or let the run write there, then resume=auto"
    )
    whole = [f"step_{step:06d}" for step in range(1, 7) if f"step_{step:06d}" in said[1]]
    assert 1 <= len(whole) < 6
    assert said[1] == f"full: 1 {['best.txt', 'last.txt', *whole]}"  # nothing half written
    assert f"step_{len(whole) + 1:06d} could not be written: No space left on device; {whole[-1]} and those before it are" in errors[1]
    assert said[2] == f"room: 0 {['best.txt', 'last.txt', *(f'step_{step:06d}' for step in range(1, 7))]}"
    assert f"resuming run/checkpoints/{whole[-1]}" in done.stdout


def test_state_survives_encoding() -> None:
    tensors: dict[str, torch.Tensor] = {}
    state = {"a": [1, 2.5, None, True, "x"], "b": {0: {"step": torch.tensor(3.0)}, 1: (0.9, 0.95)}, "inf": float("inf")}
    encoded = json.loads(json.dumps(_encode(state, "s", tensors)))
    decoded = _decode(encoded, tensors)
    assert torch.equal(decoded["b"][0].pop("step"), state["b"][0].pop("step"))
    assert decoded == state
    with pytest.raises(TypeError, match="s.f: function cannot be written"):
        _encode({"f": lambda: None}, "s", tensors)
