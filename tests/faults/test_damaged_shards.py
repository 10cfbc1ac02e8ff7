"""Flipped bits, cuts, losses and swaps in every file of a data folder.

Each is named; what it hits is left out and counted, or the run stops with one message; nothing else is lost.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from csm.config import CodecConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, TextConfig, TrainConfig, TrainerConfig
from csm.data.datamodule import CSMDataModule
from csm.data.shards import ShardReader

NUM_SHARDS = 4
TALKS = [[(i % 4, "one two", 6), ((i + 1) % 4, "three", 4)] for i in range(36)]  # of one length, so that shards have one size
TARGET = 12  # the sample that is hit; in the second shard


@dataclass
class Case:
    """A fault.

    Attributes:
        damage: does it, to the training split's folder.
        lost: "nothing", "sample" (TARGET), "shard" (the second), "two shards" or "run".
        message: part of what is said.
        verify: data.verify.
        num_bad: samples counted; None where it is those lost.
    """

    damage: Callable[[Path], None]
    lost: str
    message: str
    verify: str = "size"
    num_bad: int | None = None


def _flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def flip_text(name: str, text: str, offset: int = 0, bit: int = 0) -> Callable[[Path], None]:
    """Flip a bit of the `offset`-th character of the first `text` in a file."""
    return lambda folder: _flip(folder / name, (folder / name).read_bytes().index(text.encode()) + offset, bit)


def cut(pattern: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path, *_) = sorted(folder.glob(pattern))
        os.truncate(path, int(path.stat().st_size * share))

    return damage


def _line(folder: Path) -> dict:
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.open()]
    return lines[TARGET]


def flip_in_tar(member: str, offset: int, bit: int = 0) -> Callable[[Path], None]:
    """Flip a bit of the target's member; a negative offset lies in the tar header in front of it (-512 is its start)."""
    return lambda folder: _flip(folder / TAR, _line(folder)["members"][member][0] + offset, bit)


def flip_json(text: str, offset: int = 0, bit: int = 0) -> Callable[[Path], None]:
    """Flip a bit of `text` in the target's JSON."""

    def damage(folder: Path) -> None:
        start, size = _line(folder)["members"]["json"]
        found = (folder / TAR).read_bytes()[start : start + size].index(text.encode())
        _flip(folder / TAR, start + found + offset, bit)

    return damage


def flip_table(text: Callable[[dict], str], offset: int = 0, bit: int = 0) -> Callable[[Path], None]:
    """Flip a bit in the target's line of its table."""

    def damage(folder: Path) -> None:
        path, key = folder / TABLE, _line(folder)["key"]
        content = path.read_text()
        start = content.index(key)
        _flip(path, content.index(text(_line(folder)), start - 20) + offset, bit)

    return damage


def edit_index(old: Callable[[dict], str], offset: int = 0, bit: int = 0) -> Callable[[Path], None]:
    """Flip a bit of what `old` picks from the second shard's entry of the index."""

    def damage(folder: Path) -> None:
        path = folder / "index.json"
        content = path.read_text()
        entry = json.loads(content)["shards"][1]
        _flip(path, content.index(old(entry), content.index(entry["name"]) - 10) + offset, bit)

    return damage


def swap(folder: Path) -> None:
    first, second = folder / "shard-000000.tar", folder / TAR
    assert first.stat().st_size == second.stat().st_size, "of two sizes it would be too easy"
    first.rename(folder / "kept")
    second.rename(first)
    (folder / "kept").rename(second)


def grow(folder: Path) -> None:
    with (folder / TAR).open("ab") as file:
        file.write(bytes(512))


def make_folder(folder: Path) -> None:
    (folder / TAR).unlink()
    (folder / TAR).mkdir()


def add_shard(folder: Path) -> None:
    shutil.copy(folder / TAR, folder / "shard-000009.tar")


def empty(pattern: str) -> Callable[[Path], None]:
    return lambda folder: sorted(folder.glob(pattern))[0].write_bytes(b"")


def flip_lengths(position: int) -> Callable[[Path], None]:
    return lambda folder: _flip(next(folder.glob("lengths-*.npy")), position)


TAR, TABLE = "shard-000001.tar", "shard-000001.samples.jsonl"
CASES = {
    "index: cut in half": Case(cut("index.json", 0.5), "run", "index.json: not a shard index"),
    "index: empty": Case(empty("index.json"), "run", "index.json: not a shard index"),
    "index: flipped brace": Case(lambda folder: _flip(folder / "index.json", 0), "run", "index.json: not a shard index"),
    "index: flipped key": Case(flip_text("index.json", '"shards"', 2), "run", "index.json: KeyError"),
    "index: flipped codec digest": Case(flip_text("index.json", "dddd"), "run", "shards were made with codec"),
    "index: flipped number of codebooks": Case(flip_text("index.json", '"num_codebooks": 4', 17), "run", "5 codebooks"),
    "index: flipped format version": Case(flip_text("index.json", '"format_version": 1', 18, 1), "run", "format_version 3"),
    "index: flipped size": Case(edit_index(lambda e: str(e["num_bytes"])), "shard", f"{TAR}: .* bytes, the index says"),
    "index: flipped number of samples": Case(
        edit_index(lambda e: f'"num_samples": {e["num_samples"]}', 16, 1), "shard", "11 lines, the index says 13 samples", num_bad=13
    ),
    "index: flipped number of frames": Case(
        edit_index(lambda e: f'"num_frames": {e["num_frames"]}', 15, 1), "shard", "frames, the index says"
    ),
    "index: flipped name": Case(edit_index(lambda e: e["name"], 11, 3), "shard", "not there"),
    "index: flipped digest": Case(edit_index(lambda e: e["sha256"], 0, 1), "shard", f"{TAR}: sha256 .*, the index says", "digest"),
    "table: cut in half": Case(cut(TABLE, 0.5), "shard", f"{TABLE}: "),
    "table: last line gone": Case(cut(TABLE, 0.95), "shard", f"{TABLE}: "),
    "table: not there": Case(lambda folder: (folder / TABLE).unlink(), "shard", f"{TABLE}: not there"),
    "table: flipped key": Case(flip_table(lambda line: line["key"], 3), "sample", "a shard or table of another place"),
    "table: flipped offset": Case(flip_table(lambda line: str(line["members"]["json"][0]), 0, 1), "sample", "json"),
    "table: flipped size": Case(flip_table(lambda line: f"{line['members']['codes.npy'][1]}]", 1), "sample", "codes.npy"),
    "table: flipped frames": Case(flip_table(lambda line: f'"num_frames":{line["num_frames"]}', 13, 1), "shard", "frames, the index says"),
    "table: flipped field name": Case(flip_table(lambda line: "num_frames", 2), "shard", f"{TABLE}: 'num_frames'"),
    "tar header: flipped name": Case(flip_in_tar("codes.npy", -512), "sample", "damaged tar header"),
    "tar header: flipped size": Case(flip_in_tar("codes.npy", -512 + 130), "sample", "damaged tar header"),
    "tar header: flipped time": Case(flip_in_tar("json", -512 + 140), "sample", "damaged tar header"),
    "tar header: flipped checksum": Case(flip_in_tar("json", -512 + 150), "sample", "damaged tar header"),
    "tar: cut in half": Case(cut(TAR, 0.5), "shard", "it is truncated"),
    "tar: one byte short": Case(lambda folder: os.truncate(folder / TAR, (folder / TAR).stat().st_size - 1), "shard", "it is truncated"),
    "tar: empty": Case(empty(TAR), "shard", "0 bytes, the index says"),
    "tar: grown": Case(grow, "shard", "it is changed"),
    "tar: not there": Case(lambda folder: (folder / TAR).unlink(), "shard", f"{TAR}: not there"),
    "tar: a folder": Case(make_folder, "shard", f"{TAR}: not there"),
    "tar: swapped with another": Case(swap, "two shards", "a shard or table of another place"),
    "tar: swapped, digests compared": Case(swap, "two shards", "sha256", "digest"),
    "tar: one more": Case(add_shard, "nothing", "not in the index, and not read: shard-000009.tar"),
    "codes: flipped magic": Case(flip_in_tar("codes.npy", 1), "sample", "does not start like a .npy"),
    "codes: flipped header": Case(flip_in_tar("codes.npy", 12, 3), "sample", "codes|header"),
    "codes: flipped shape": Case(flip_in_tar("codes.npy", 61), "sample", "codes|codebooks|header"),
    "codes: flipped beyond the vocabulary": Case(flip_in_tar("codes.npy", 129, 4), "sample", "the model takes 0 to 32"),
    "codes: flipped, unseen by eye": Case(flip_in_tar("codes.npy", 128), "shard", f"{TAR}: sha256", "digest"),
    "json: flipped brace": Case(flip_json("{"), "sample", f"sample {TARGET:016x}-0: "),
    "json: flipped field name": Case(flip_json('"frames"', 1), "sample", "missing 'frames'"),
    "json: flipped frames": Case(flip_json("[6,10]", 3, 1), "sample", r"frames \[6, 30\] of 10"),
    "json: flipped letter": Case(flip_json("one two", 1), "sample", "which this model never heard"),
    "json: flipped letter, digests compared": Case(flip_json("one two", 1), "shard", f"{TAR}: sha256", "digest"),
    "lengths: cut in half": Case(cut("lengths-*.npy", 0.5), "nothing", "measuring again"),
    "lengths: empty": Case(empty("lengths-*.npy"), "nothing", "measuring again"),
    "lengths: flipped header": Case(flip_lengths(20), "nothing", "damaged; measuring again"),
    "lengths: flipped sample": Case(flip_lengths(128 + 12 * 30), "nothing", "damaged; measuring again"),
    "lengths: flipped length": Case(flip_lengths(128 + 12 * 30 + 4), "nothing", "damaged; measuring again"),
    "stamps: cut in half": Case(cut("verified-*.json", 0.5), "nothing", "", "digest"),
}
NEEDS_NEW_LENGTHS = (
    "json: ",
    "index: flipped digest",
    "index: flipped name",
    "index: flipped number of samples",
)  # the kept lengths would hide it, or belong to another index


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, write_conversations) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_conversations(folder / "train", TALKS, max_shard_bytes=25_000)
    write_conversations(folder / "validation", TALKS[:4])
    assert len(list((folder / "train").glob("*.tar"))) == NUM_SHARDS
    return folder


@pytest.fixture
def make(tiny_model_config: ModelConfig, word_tokenizer) -> Callable[..., CSMDataModule]:
    def make(folder: Path, **changes: object) -> CSMDataModule:
        config = DataConfig(kind="shards", path=str(folder), seq_len=32, rows_per_batch=1, max_bad_share=0.7)
        return CSMDataModule(replace(config, **changes), tiny_model_config, word_tokenizer, "d" * 64, codec_name="spectral")

    return make


def _seen(module: CSMDataModule) -> set[str]:
    return {key for batch in module.train_dataloader() for key in batch.keys}


def _entries(run_dir: Path) -> Iterator[dict]:
    path = run_dir / "quarantine.jsonl"
    yield from (json.loads(line) for line in path.open()) if path.is_file() else ()


@pytest.mark.parametrize("name", CASES)
def test_fault_is_named_and_nothing_else_is_lost(name: str, whole: Path, make, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    case = CASES[name]
    data, run_dir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(whole, data)
    reader = ShardReader(data / "train")
    everything, shards = set(reader.keys), [set(np.array(reader.keys)[reader.shard == i].tolist()) for i in range(NUM_SHARDS)]
    lost = {"nothing": set(), "sample": {reader.keys[TARGET]}, "shard": shards[1], "two shards": shards[0] | shards[1]}.get(case.lost)
    assert reader.shard[TARGET] == 1
    if not name.startswith(NEEDS_NEW_LENGTHS):
        assert _seen(make(data, verify=case.verify)) == everything  # leaves lengths and stamps behind
    case.damage(data / "train")
    caplog.clear()
    module = make(data, verify=case.verify)
    if lost is None:
        with pytest.raises((ValueError, FileNotFoundError), match=case.message) as error:
            module.setup()
        assert "\n" not in str(error.value) and "python -m data_prep" in str(error.value)
        return
    module.keep_bad_samples_in(run_dir)
    assert _seen(module) == everything - lost
    num_bad = len(lost) if case.num_bad is None else case.num_bad
    assert module.num_bad_samples == num_bad == sum(entry["num_samples"] for entry in _entries(run_dir))
    said = caplog.text + "".join(entry["reason"] for entry in _entries(run_dir))
    assert re.search(case.message, said), said
    if lost:
        with pytest.raises(ValueError, match=r"\d+ of \d+ samples are bad, more than data.max_bad_share=0.0; repair them") as error:
            _seen(make(data, verify=case.verify, max_bad_share=0.0))
        assert "\n" not in str(error.value)


def test_order_of_all_others_stays_when_a_shard_goes_missing(whole: Path, make, tmp_path: Path):
    """A run that goes on without a shard sees the rows it would have seen, with gaps: its place in the data keeps its meaning."""
    data = tmp_path / "data"
    shutil.copytree(whole, data)
    first = make(data)
    rows = [batch.keys for batch in first.train_dataloader()]
    (data / "train" / TAR).unlink()
    second = make(data)
    second.load_state_dict({**first.state_dict(), "epoch": 0, "batch": 3})
    lost = {first._train.reader.keys[i] for i in first._train.reader.samples_of(1)}
    got = [batch.keys for batch in second.train_dataloader()]
    assert got == [[key for key in keys if key not in lost] for keys in rows[3:]]


def test_lengths_measured_without_a_shard_are_not_kept(whole: Path, make, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(whole, data)
    for path in (data / "train").glob("lengths-*"):
        path.unlink()
    (data / "train" / TAR).rename(tmp_path / "away")
    assert len(_seen(make(data))) < len(TALKS)
    assert not list((data / "train").glob("lengths-*"))
    (tmp_path / "away").rename(data / "train" / TAR)
    assert len(_seen(make(data))) == len(TALKS)


def _train_config(data: Path, run_dir: Path, model: ModelConfig, max_steps: int, **changes: object) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run_dir),
        model=model,
        optim=OptimConfig(warmup_steps=1),
        loss=LossConfig(amortization=1.0),
        data=DataConfig(kind="shards", path=str(data), seq_len=32, rows_per_batch=2, max_bad_share=0.1, verify="size"),
        codec=CodecConfig(num_codebooks=4),
        text=TextConfig(tokenizer="words"),
        trainer=TrainerConfig(
            accelerator="cpu", max_steps=max_steps, log_every=1, validate_every=0, checkpoint_every=3, deterministic=True
        ),
        **changes,
    )


def test_training_goes_on_without_a_damaged_sample_and_says_so(
    tmp_path: Path, write_conversations, small_codec, word_tokenizer, tiny_model_config: ModelConfig, capfd: pytest.CaptureFixture
):
    """The whole command: quarantine.jsonl, metrics.csv and the terminal agree; a resumed run ends with the same rows."""
    from csm.cli.train import train

    data = tmp_path / "data"
    for split in ("train", "validation"):
        write_conversations(data / split, TALKS, digest=small_codec.digest, max_shard_bytes=25_000)
    small_codec.save(data / "codec")
    word_tokenizer.save(data)
    flip_in_tar("codes.npy", 1)(data / "train")
    key = f"{TARGET:016x}-0"

    def rows(run: str) -> list[str]:
        with (tmp_path / run / "metrics.csv").open() as file:
            return [f"{row['step']} {row['train/loss']} {row['bad_samples']}" for row in csv.DictReader(file)]

    train(_train_config(data, tmp_path / "whole", tiny_model_config, max_steps=12))
    (entry,) = _entries(tmp_path / "whole")
    assert (entry["sample"], entry["num_samples"]) == (key, 1) and entry["shard"].endswith(TAR)
    assert "does not start like a .npy" in entry["reason"]
    counts = [int(row.split()[-1]) for row in rows("whole")]
    assert counts == sorted(counts) and counts[-1] == 1
    assert "36 conversations" in capfd.readouterr().out
    stop = counts.index(1) + 1  # the step that found it
    train(_train_config(data, tmp_path / "stopped", tiny_model_config, max_steps=stop))
    train(_train_config(data, tmp_path / "stopped", tiny_model_config, max_steps=12, resume="auto"))
    assert [row.split()[2] for row in rows("stopped")] == [row.split()[2] for row in rows("whole")]
    assert list(_entries(tmp_path / "stopped")) == [entry]
