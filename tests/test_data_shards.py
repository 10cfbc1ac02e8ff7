"""Reading shards: what was written comes back, and every way a folder can be wrong is told apart."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from csm.data.bad_samples import BadSamples
from csm.data.corpora import split_folders
from csm.data.index import ShardIndex
from csm.data.shards import ShardReader, iter_samples
from csm.data.storage import sha256_of

CONVERSATIONS = [[(i % 4, "one two", 3 + i % 5), ((i + 1) % 4, "three", 4)] for i in range(40)]


@pytest.fixture
def split(tmp_path: Path, write_conversations) -> Path:
    return write_conversations(tmp_path / "data" / "train", CONVERSATIONS)


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _overwrite(folder: Path, sample_index: int, member: str, content: bytes) -> None:
    """Overwrite the head of one member inside its tar; the tar keeps its size."""
    lines = [(tar, json.loads(line)) for tar in sorted(folder.glob("*.tar")) for line in tar.with_suffix(".samples.jsonl").open()]
    tar, line = lines[sample_index]
    with tar.open("r+b") as file:
        file.seek(line["members"][member][0])
        file.write(content)


def test_samples_come_back_as_written(split: Path):
    assert len(list(split.glob("*.tar"))) > 2
    samples = list(iter_samples(split))
    assert [sample.key for sample in samples] == [f"{i:016x}-0" for i in range(40)]
    codes = np.random.default_rng(0)
    for sample, conversation in zip(samples, CONVERSATIONS, strict=True):
        expected = torch.from_numpy(codes.integers(1, 33, (4, sum(turn[2] for turn in conversation))))
        assert torch.equal(torch.cat([turn.codes for turn in sample.turns], dim=1), expected)
        assert [(turn.speaker, turn.text, turn.codes.shape[1]) for turn in sample.turns] == conversation
        assert sample.turns[0].codes.dtype == torch.int64
        assert sample.audio() is None


def test_index_counts_are_the_samples(split: Path):
    index, reader = ShardIndex.load(split), ShardReader(split)
    assert index.num_samples == len(reader) == 40
    assert index.num_frames == reader.num_frames.sum() == sum(turn[2] for conversation in CONVERSATIONS for turn in conversation)
    assert index.duration_s == pytest.approx(reader.duration_s.sum())
    assert (np.diff(reader.shard) >= 0).all() and reader.shard[-1] == len(index.shards) - 1
    index.verify()


def test_audio_is_decoded_on_request(tmp_path: Path, write_conversations):
    sample = next(iter_samples(write_conversations(tmp_path / "heldout", CONVERSATIONS[:1], audio=True)))
    assert sample.audio().shape == (7 * 1920,)
    assert torch.allclose(sample.audio(), torch.sin(torch.arange(7 * 1920) / 20) / 2, atol=1e-4)


def test_learn_switches_reach_the_turns(tmp_path: Path):
    from data_prep.shard import Sample, write_split

    turns = [
        {"speaker": 0, "text": "a", "frames": [0, 2], "learn": {"c0": False, "depth": True}},
        {"speaker": 1, "text": "b", "frames": [2, 3]},
    ]
    sample = Sample("k-0", {"duration_s": 0.24, "turns": turns}, np.ones((4, 3), np.int16))
    codec = {"name": "spectral", "num_codebooks": 4, "frame_rate_hz": 12.5, "sample_rate_hz": 24_000, "digest": "d"}
    write_split([sample], tmp_path / "train", codec)
    first, second = next(iter_samples(tmp_path / "train")).turns
    assert (first.learn_c0, first.learn_depth, second.learn_c0, second.learn_depth) == (False, True, True, True)


def _read_all(reader: ShardReader) -> list[int]:
    return [int(reader.read(i).turns[0].codes.sum()) for i in range(len(reader))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_reader_that_has_read_works_in_other_processes(split: Path, method: str):
    reader = ShardReader(split)
    expected = _read_all(reader)
    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply(_read_all, (reader,)) == expected
    assert _read_all(reader) == expected  # the child closed nothing of ours
    assert _read_all(pickle.loads(pickle.dumps(reader))) == expected


def test_open_files_stay_bounded(split: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("csm.data.storage.MAX_OPEN_SHARDS", 2)
    reader = ShardReader(split)
    expected = _read_all(reader)
    assert _read_all(reader) == expected
    assert len(reader._files._descriptors) == 2


def test_several_folders_read_as_one(tmp_path: Path, write_conversations):
    for name in ("a", "b"):
        write_conversations(tmp_path / name / "train", CONVERSATIONS[:5])
    folders = split_folders(tmp_path / "*", "train")
    assert folders == [tmp_path / "a" / "train", tmp_path / "b" / "train"]
    assert len(ShardReader(folders)) == 10
    write_conversations(tmp_path / "c" / "train", CONVERSATIONS[:5], digest="e" * 64)
    with pytest.raises(ValueError, match=r"dddd.*|eeee"):
        ShardReader(split_folders(tmp_path / "*", "train"))


def test_missing_folder_says_which_command_makes_it(tmp_path: Path):
    message = rf"{tmp_path}/data/train: no such folder.*python -m data_prep prep=demo output={tmp_path}/data"
    with pytest.raises(FileNotFoundError, match=message):
        ShardIndex.load(tmp_path / "data" / "train")


def test_missing_index_says_which_command_writes_it(split: Path):
    (split / "index.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"index.json: shards without an index.*stages=\[index\] output={split.parent}"):
        ShardIndex.load(split)
    for tar in split.glob("*.tar"):
        tar.unlink()
    with pytest.raises(FileNotFoundError, match="no shards either.*prep=demo"):
        ShardIndex.load(split)


def test_missing_shard_and_missing_sample_table_are_named(split: Path):
    (split / "shard-000001.samples.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001.samples.jsonl: not there"):
        ShardReader(split)
    (split / "shard-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="shard-000001.tar: not there"):
        ShardIndex.load(split)


def test_truncated_shard_is_refused_when_opened(split: Path):
    tar = split / "shard-000001.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[: size // 2])
    with pytest.raises(ValueError, match=rf"shard-000001.tar: {size // 2} bytes, the index says {size}: it is truncated"):
        ShardIndex.load(split)


def test_changed_bytes_are_found_on_request(split: Path):
    _overwrite(split, 0, "codes.npy", b"\x93NUMPX")
    with pytest.raises(ValueError, match="shard-000000.tar: sha256"):
        ShardIndex.load(split).verify()


def test_bytes_are_compared_once_until_a_shard_changes(split: Path, monkeypatch: pytest.MonkeyPatch):
    read: list[str] = []
    monkeypatch.setattr("csm.data.index.sha256_of", lambda path: (read.append(path.name), sha256_of(path))[1])
    index = ShardIndex.load(split)
    names = sorted(shard.name for shard in index.shards)
    for expected in (names, []):
        read.clear()
        assert index.compare_digests() == {} and sorted(read) == expected
    _overwrite(split, 0, "codes.npy", b"\x93NUMPX")
    read.clear()
    assert list(index.compare_digests()) == read == ["shard-000000.tar"]


def test_other_format_version_is_refused(split: Path):
    _edit_index(split, format_version=2)
    with pytest.raises(ValueError, match="format_version 2, this code reads 1"):
        ShardIndex.load(split)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 1}', '{"format_version": 1, "codec": {}, "shards": []}'])
def test_broken_index_is_refused_in_one_message(split: Path, content: str):
    (split / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index.json: .*stages=\[index\]"):
        ShardIndex.load(split)


def test_wrong_codec_message_names_both(split: Path):
    index = ShardIndex.load(split)
    index.check_codec(num_codebooks=4, digest="d" * 64, name="spectral")
    message = "codec spectral with 4 codebooks, digest dddddddddddd; this run expects mimi with 32 codebooks digest 123"
    with pytest.raises(ValueError, match=message):
        index.check_codec(num_codebooks=32, digest="123", name="mimi")


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        ("codes.npy", b"not a npy file", "does not start like a .npy"),
        ("codes.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'", "codes|header|descr"),
        ("json", b"not json", "Expecting value"),
        ("json", b'{"turns": []}' + b" " * 400, "no turns|Extra data|Expecting"),
    ],
)
def test_bad_sample_is_named(split: Path, member: str, content: bytes, message: str):
    _overwrite(split, 3, member, content)
    with pytest.raises(ValueError, match=rf"shard-000000.tar: sample {3:016x}-0: .*({message})"):
        list(iter_samples(split))


def test_pickled_codes_are_refused_unread(tmp_path: Path):
    import io

    from csm.data.members import parse_codes

    buffer = io.BytesIO()
    np.save(buffer, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"codes are \|O"):
        parse_codes(buffer.getvalue(), 1)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_codes_of_both_header_versions_are_read(version: tuple[int, int]):
    import io

    from csm.data.members import parse_codes

    buffer, codes = io.BytesIO(), np.arange(12, dtype=np.int16).reshape(4, 3)
    np.lib.format.write_array(buffer, codes, version=version, allow_pickle=False)
    assert np.array_equal(parse_codes(buffer.getvalue(), 4), codes)
    for wrong in (codes.astype(np.int32), np.asfortranarray(codes), codes[:2], codes.ravel()):
        buffer = io.BytesIO()
        np.save(buffer, wrong)
        with pytest.raises(ValueError, match="expected int16|index says"):
            parse_codes(buffer.getvalue(), 4)


def test_bad_samples_stop_the_run_above_their_share():
    bad = BadSamples(100, max_share=0.02)
    bad.add(5, "first reason")
    bad.add(5, "again")
    bad.add(6, "second reason")
    with pytest.raises(
        ValueError, match=r"3 of 100 samples are bad, more than data.max_bad_share=0.02; repair them or raise it; the first: first reason"
    ):
        bad.add(7, "third reason")


def test_quarantine_is_kept_once_across_starts_and_a_torn_line(tmp_path: Path):
    def start() -> BadSamples:
        bad = BadSamples(100, max_share=0.5, name_of=lambda sample: (f"shard-{sample // 10}", f"key-{sample}"))
        bad.add_shard(range(90, 100), "not there")  # found when the data are opened, at every start
        bad.keep_in(tmp_path / "run" / "quarantine.jsonl")
        return bad

    first = start()
    first.add(5, "torn", at=(0, 3))
    first.add(7, "torn", at=(1, 2))
    path = tmp_path / "run" / "quarantine.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [None, "key-5", "key-7"]
    assert json.loads(lines[0]) == {
        "shard": "shard-9", "sample": None, "num_samples": 10, "reason": "not there", "epoch": None, "batch": None,
    }  # fmt: skip
    path.write_text("\n".join(lines) + '\n{"shard": "sh')  # killed in the middle of a line
    again = start()
    again.resume((1, 1), lambda shard, key: int(key.removeprefix("key-")))
    assert set(again.reasons) == {5, *range(90, 100)}  # 7 was found later than that
    again.add(7, "torn", at=(1, 2))
    assert path.read_text().splitlines() == lines
