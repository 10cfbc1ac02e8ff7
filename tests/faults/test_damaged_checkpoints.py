"""Bit flips, truncation and edits in a run's checkpoints: each is named, the run goes on from the newest that is whole,
and nothing else is lost."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from csm import CSM
from csm.cli.train import train
from csm.codec import SpectralCodec
from csm.config import TrainConfig
from csm.model.checkpoint_folder import MANIFEST, _own_digest, find_fault, newest_valid_checkpoint
from csm.model.pretrained import resolve_checkpoint
from csm.text import WordTokenizer
from tests.faults.killed_runs import outcome, run_config, write_data

FILES = (
    "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "codec/codec.json",
    "codec/codec.safetensors", MANIFEST,
)  # fmt: skip


def flip(path: Path) -> None:
    """One bit of one byte, drawn by the file's name."""
    data, draw = bytearray(path.read_bytes()), random.Random(path.name)
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(7)
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def edit_manifest(folder: Path, *, is_signed: bool = False, **changes: object) -> None:
    """Change a manifest's entries; signed, as somebody would who knows the format."""
    manifest = {**json.loads((folder / MANIFEST).read_text()), **changes}
    if is_signed:
        manifest["sha256"] = _own_digest({key: value for key, value in manifest.items() if key != "sha256"})
    (folder / MANIFEST).write_text(json.dumps(manifest))


def replace_by_older(folder: Path, name: str) -> None:
    """A file of the checkpoint before, as a copy that went wrong leaves it."""
    shutil.copyfile(folder.with_name("step_000006") / name, folder / name)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, write_conversations: Callable, word_tokenizer: WordTokenizer, small_codec: SpectralCodec
) -> tuple[TrainConfig, Path]:
    """A run of nine steps with checkpoints at 3, 6 and 9, and its configuration; read only."""
    work = tmp_path_factory.mktemp("damaged")
    config = run_config(write_data(work / "data", write_conversations, word_tokenizer, small_codec), work / "whole")
    config = replace(config, trainer=replace(config.trainer, max_steps=9, keep_checkpoints=3, log_every=1))
    train(config)
    return config, work / "whole"


@pytest.fixture
def broken(finished: tuple[TrainConfig, Path], tmp_path: Path) -> tuple[TrainConfig, Path]:
    """A copy to damage: its configuration and its newest checkpoint."""
    config, whole = finished
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    return replace(config, run_dir=str(run_dir)), run_dir / "checkpoints/step_000009"


def assert_named_and_passed_over(folder: Path, *parts: str) -> None:
    """The fault of a checkpoint is told with these parts, and the one before is taken; nothing is touched."""
    before = outcome(folder.parents[1])
    said: list[str] = []
    assert newest_valid_checkpoint(folder.parent, said.append) == folder.with_name("step_000006")
    assert len(said) == 1 and str(folder) in said[0] and "trying the one before" in said[0]
    for part in parts:
        assert part in said[0]
    assert outcome(folder.parents[1]) == before


@pytest.mark.parametrize("damage", [flip, truncate, empty, remove])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_named_and_passed_over(name: str, damage: Callable, broken: tuple[TrainConfig, Path]) -> None:
    _, folder = broken
    assert set(FILES) == {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    damage(folder / name)
    told = {flip: "differs from the manifest's sha256", truncate: "bytes, the manifest says", empty: "has 0 bytes", remove: "is missing"}
    if name == MANIFEST and damage is not remove:
        assert_named_and_passed_over(folder, MANIFEST)
    else:
        assert_named_and_passed_over(folder, name, told[damage])


@pytest.mark.parametrize("position", range(0, 1000, 90))
def test_a_flipped_bit_anywhere_in_the_manifest_is_named(position: int, broken: tuple[TrainConfig, Path]) -> None:
    _, folder = broken
    data = bytearray((folder / MANIFEST).read_bytes())
    data[position % len(data)] ^= 1
    (folder / MANIFEST).write_bytes(bytes(data))
    assert_named_and_passed_over(folder, MANIFEST)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: edit_manifest(folder, world_size=2), "manifest.json was changed after it was written"),
        (lambda folder: edit_manifest(folder, step=6), "manifest.json was changed after it was written"),
        (lambda folder: edit_manifest(folder, files={}), "manifest.json was changed after it was written"),
        (lambda folder: edit_manifest(folder, is_signed=True, step=6), "manifest.json is of step 6, the folder's name is step_000009"),
        (
            lambda folder: edit_manifest(folder, is_signed=True, format_version=3),
            "has format version 3, this program reads 2",
        ),
        (lambda folder: edit_manifest(folder, is_signed=True, files={"../x": {"num_bytes": 1, "sha256": ""}}), "file outside the folder"),
        (lambda folder: edit_manifest(folder, is_signed=True, files={"x": {}}), "manifest.json cannot be read (it has no 'num_bytes')"),
        (lambda folder: replace_by_older(folder, MANIFEST), "manifest.json is of step 6"),
        (lambda folder: replace_by_older(folder, "model.safetensors"), "model.safetensors differs from the manifest's sha256"),
        (lambda folder: replace_by_older(folder, "optimizer.safetensors"), "optimizer.safetensors differs from the manifest's sha256"),
    ],
)
def test_edits_and_mixed_up_files_are_named_and_passed_over(damage: Callable, told: str, broken: tuple[TrainConfig, Path]) -> None:
    _, folder = broken
    damage(folder)
    assert_named_and_passed_over(folder, told)


@pytest.mark.parametrize(
    ("damages", "from_step"),
    [
        ([("step_000009/model.safetensors", flip)], 6),
        ([("step_000009/optimizer.safetensors", truncate)], 6),
        ([("step_000009/" + MANIFEST, remove), ("last.txt", empty)], 6),
        ([("step_000009/state.json", remove), ("step_000006/codec/codec.safetensors", flip), ("best.txt", remove)], 3),
    ],
)
def test_resume_goes_on_from_the_newest_whole_one_and_ends_as_if_nothing_had_happened(
    damages: list, from_step: int, broken: tuple[TrainConfig, Path], finished: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture
) -> None:
    config, folder = broken
    for name, damage in damages:
        damage(folder.parent / name)
    train(config)
    said = capsys.readouterr().out
    assert f"resuming {folder.with_name(f'step_{from_step:06d}')}" in said
    assert said.count("not usable") == (9 - from_step) // 3
    assert outcome(folder.parents[1]) == outcome(finished[1])  # metrics.csv is one unbroken series, too


def test_all_damaged_is_refused_in_one_line_and_nothing_is_touched(broken: tuple[TrainConfig, Path]) -> None:
    config, folder = broken
    for checkpoint in sorted(folder.parent.glob("step_*")):
        flip(checkpoint / "model.safetensors")
    before = outcome(folder.parents[1])
    with pytest.raises(ValueError, match=r"checkpoints: no checkpoint is whole; start a new run, or copy one back$"):
        train(config)
    assert outcome(folder.parents[1]) == before


def test_damaged_checkpoint_that_is_named_is_refused_in_one_line(broken: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, folder = broken
    config = replace(config, trainer=replace(config.trainer, max_steps=12))
    flip(folder / "optimizer.safetensors")
    for run_dir in (config.run_dir, str(tmp_path / "new")):
        before = outcome(folder.parents[1])
        with pytest.raises(ValueError, match=r"step_000009: not usable, optimizer.safetensors differs .*resume=auto takes") as caught:
            train(replace(config, resume=str(folder), run_dir=run_dir))
        assert "\n" not in str(caught.value)
        assert outcome(folder.parents[1]) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("best", b"step_000099\n", "best.txt names 'step_000099', which is no checkpoint there"),
        ("best", b"", "best.txt names '', which is no checkpoint there"),
        ("last", b"\xff\x00\xfe" * 40, "last.txt names"),
        ("last", b"../../elsewhere\n", "last.txt names '../../elsewhere', which is no checkpoint there"),
    ],
)
def test_pointer_to_nowhere_is_named_with_one_to_use_and_stops_no_resume(
    name: str, content: bytes, told: str, broken: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture
) -> None:
    config, folder = broken
    run_dir = folder.parents[1]
    (folder.parent / f"{name}.txt").write_bytes(content)
    with pytest.raises(FileNotFoundError) as caught:
        resolve_checkpoint(run_dir, name=name)
    assert told in str(caught.value) and f"the newest that is whole is {folder}: give that one" in str(caught.value)
    train(config)
    assert "already at step 9 of 9" in capsys.readouterr().out
    train(replace(config, trainer=replace(config.trainer, max_steps=12)))
    assert resolve_checkpoint(run_dir, name="last").name == "step_000012" and resolve_checkpoint(run_dir, name="best").is_dir()


def test_speaking_with_a_damaged_checkpoint_names_one_that_is_whole(broken: tuple[TrainConfig, Path]) -> None:
    _, folder = broken
    run_dir = folder.parents[1]
    (folder.parent / "best.txt").write_text("step_000009\n")
    (folder / "optimizer.safetensors").unlink()  # not needed to speak
    CSM.from_pretrained(run_dir)
    truncate(folder / "codec/codec.safetensors")
    with pytest.raises(ValueError, match=r"step_000009: not usable, codec/codec.safetensors has .* whole is .*step_000006: give that one$"):
        resolve_checkpoint(run_dir)
    shutil.copyfile(folder.with_name("step_000006") / "codec/codec.safetensors", folder / "codec/codec.safetensors")
    flip(folder / "model.safetensors")
    for path in (run_dir, folder):
        with pytest.raises(ValueError, match=r"step_000009: not usable, model.safetensors differs .*step_000006: give that one$"):
            CSM.from_pretrained(path)
    CSM.from_pretrained(folder.with_name("step_000006"))
    assert find_fault(folder.with_name("step_000006")) is None
