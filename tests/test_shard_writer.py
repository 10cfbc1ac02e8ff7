"""Shards: the same bytes for the same samples, readable by a plain WebDataset reader, refused when unsafe or broken."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep.shard import Sample, index_split, write_split

CODEC = {"name": "spectral", "num_codebooks": 3, "frame_rate_hz": 12.5, "sample_rate_hz": 24_000, "digest": "d" * 64}


def make_samples(count: int, *, with_audio: bool = False) -> list[Sample]:
    random = np.random.default_rng(0)
    samples = []
    for index in range(count):
        lengths = random.integers(1, 9, size=2)
        codes = random.integers(1, 30, size=(3, lengths.sum())).astype(np.int16)
        ends = [0, *np.cumsum(lengths).tolist()]
        turns = [
            {
                "speaker": i,
                "text": f"turn {i} of {index}",
                "start_s": 0.08 * ends[i],
                "end_s": 0.08 * ends[i + 1],
                "frames": ends[i : i + 2],
            }
            for i in range(2)
        ]
        meta = {"id": f"s{index}", "source": "test", "license": "none", "language": "en", "duration_s": 0.08 * ends[-1], "turns": turns}
        audio = random.normal(0, 0.1, 1920 * ends[-1]).astype(np.float32) if with_audio else None
        samples.append(Sample(f"{index:016x}-0", meta, codes, audio))
    return samples


def read_all(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mtime = 1_700_000_000
    archive.addfile(info, io.BytesIO(content))


def npy(codes: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=codes.dtype == object)
    return buffer.getvalue()


def write_foreign_tar(path: Path, samples: list[Sample], extra: dict[str, bytes] | None = None) -> None:
    """As another program would: time stamps, members not sorted, a member we do not know."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for sample in samples:
            add_member(archive, f"./{sample.key}.json", json.dumps(sample.meta).encode())
            add_member(archive, f"./{sample.key}.codes.npy", npy(sample.codes))
            add_member(archive, f"./{sample.key}.note.txt", b"not ours")
        for name, content in (extra or {}).items():
            add_member(archive, name, content)


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_split(make_samples(7, with_audio=True), tmp_path / name, CODEC, max_shard_bytes=60_000)
    assert read_all(tmp_path / "first") == read_all(tmp_path / "second")
    with tarfile.open(tmp_path / "first/shard-000000.tar") as archive:
        members = archive.getmembers()
    assert all((m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) == (0, 0, 0, "", "", 0o644) for m in members)
    assert [m.name for m in members] == sorted(m.name for m in members)


def test_shards_stay_below_their_size_and_hold_every_sample_once(tmp_path: Path) -> None:
    samples = make_samples(20)
    index = write_split(samples, tmp_path, CODEC, max_shard_bytes=10_000)
    assert len(index["shards"]) > 1
    assert all((tmp_path / shard["name"]).stat().st_size == shard["num_bytes"] <= 10_000 for shard in index["shards"])
    keys = [json.loads(line)["key"] for p in sorted(tmp_path.glob("*.samples.jsonl")) for line in p.read_text().splitlines()]
    assert keys == [sample.key for sample in samples]
    assert sum(shard["num_frames"] for shard in index["shards"]) == sum(sample.codes.shape[1] for sample in samples)


def test_offsets_of_the_index_lead_to_the_members_bytes(tmp_path: Path) -> None:
    samples = {sample.key: sample for sample in make_samples(6, with_audio=True)}
    write_split(samples.values(), tmp_path, CODEC, max_shard_bytes=60_000)
    for path in tmp_path.glob("*.tar"):
        descriptor = os.open(path, os.O_RDONLY)
        for line in path.with_suffix(".samples.jsonl").read_text().splitlines():
            entry = json.loads(line)
            members = {name: os.pread(descriptor, size, offset) for name, (offset, size) in entry["members"].items()}
            sample = samples.pop(entry["key"])
            assert json.loads(members["json"]) == sample.meta
            np.testing.assert_array_equal(np.load(io.BytesIO(members["codes.npy"])), sample.codes)
            assert members["flac"][:4] == b"fLaC"
            assert entry["num_frames"] == sample.codes.shape[1]
            assert entry["num_characters"] == sum(len(turn["text"]) for turn in sample.meta["turns"])
        os.close(descriptor)
    assert not samples


def test_a_plain_webdataset_reader_reads_them(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = make_samples(5)
    write_split(samples, tmp_path, CODEC)
    read = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [raw["__key__"] for raw in read] == [sample.key for sample in samples]
    for raw, sample in zip(read, samples, strict=True):
        np.testing.assert_array_equal(np.load(io.BytesIO(raw["codes.npy"])), sample.codes)


def test_our_reader_reads_them(tmp_path: Path) -> None:
    from csm.data.shards import iter_samples

    samples = make_samples(5, with_audio=True)
    write_split(samples, tmp_path, CODEC, max_shard_bytes=60_000)
    for read, sample in zip(iter_samples(tmp_path), samples, strict=True):
        assert (read.key, read.meta) == (sample.key, sample.meta)
        np.testing.assert_array_equal(np.concatenate([turn.codes.numpy() for turn in read.turns], axis=1), sample.codes)


def test_indexing_our_own_shards_again_gives_the_same_index(tmp_path: Path) -> None:
    write_split(make_samples(8, with_audio=True), tmp_path, CODEC, max_shard_bytes=60_000)
    before = read_all(tmp_path)
    for path in [tmp_path / "index.json", *tmp_path.glob("*.samples.jsonl")]:
        path.unlink()
    index_split(tmp_path, CODEC)
    assert read_all(tmp_path) == before


def test_shards_made_elsewhere_are_indexed_and_unknown_members_ignored(tmp_path: Path) -> None:
    from csm.data.shards import iter_samples

    samples = make_samples(4)
    write_foreign_tar(tmp_path / "part.tar", samples, extra={"readme.md": b"hello"})
    index = index_split(tmp_path, CODEC)
    assert [shard["num_samples"] for shard in index["shards"]] == [4]
    assert [sample.key for sample in iter_samples(tmp_path)] == [sample.key for sample in samples]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        info = tarfile.TarInfo("a-0.codes.npy")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(ValueError, match="link or a device"):
        index_split(tmp_path, CODEC)


def test_pickles_are_refused(tmp_path: Path) -> None:
    write_foreign_tar(tmp_path / "a.tar", make_samples(1), extra={"x-0.pyd": b"\x80\x04."})
    with pytest.raises(ValueError, match="pickle"):
        index_split(tmp_path, CODEC)
    (tmp_path / "a.tar").unlink()
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        add_member(archive, "x-0.codes.npy", npy(np.array([{}, None], dtype=object)))
        add_member(archive, "x-0.json", b"{}")
    with pytest.raises(ValueError, match="x-0 cannot be read"):
        index_split(tmp_path, CODEC)


def test_a_cut_off_tar_is_refused(tmp_path: Path) -> None:
    write_split(make_samples(3), tmp_path, CODEC)
    path = tmp_path / "shard-000000.tar"
    offset, size = json.loads((tmp_path / "shard-000000.samples.jsonl").read_text().splitlines()[-1])["members"]["json"]
    path.write_bytes(path.read_bytes()[: offset + size // 2])
    with pytest.raises(ValueError, match=r"cut off|not a whole"):
        index_split(tmp_path, CODEC)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: setattr(s, "codes", s.codes.astype(np.int64)), "expected int16"),
        (lambda s: setattr(s, "codes", s.codes[:2]), "has 2 codebooks, codec spectral has 3"),
        (lambda s: s.codes.__setitem__((slice(None), 1), 0), "means EOS"),
        (lambda s: s.meta["turns"][1]["frames"].__setitem__(0, 0), "turns cover frames"),
        (lambda s: s.meta.pop("duration_s"), "its JSON is not ours"),
        (lambda s: setattr(s, "key", "a.b-0"), "without dots"),
    ],
)
def test_a_sample_that_does_not_hold_together_is_refused(tmp_path: Path, change, message: str) -> None:
    samples = make_samples(2)
    change(samples[1])
    with pytest.raises(ValueError, match=message):
        write_split(samples, tmp_path, CODEC)
    assert not (tmp_path / "index.json").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given twice"):
        write_split(make_samples(2) * 2, tmp_path, CODEC)


def test_a_written_split_is_never_overwritten(tmp_path: Path) -> None:
    write_split(make_samples(1), tmp_path, CODEC)
    with pytest.raises(FileExistsError, match="never changed"):
        write_split(make_samples(1), tmp_path, CODEC)
