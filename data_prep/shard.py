"""Shards and their index: the writer, and the indexer of tars made elsewhere.

A shard is a plain WebDataset tar whose bytes depend on nothing but its samples; beside it lies one JSON line a sample with
the place of every member, and `index.json`, written last, names the shards. Reading them for training is csm.data's job.
Format: docs/data_format.md.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from csm.frames import SAMPLE_RATE_HZ

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MAX_SHARD_BYTES = 64 * 2**20  # a shard is closed before it grows beyond this; one sample may still be larger
CODES, META, AUDIO = "codes.npy", "json", "flac"
_MEMBERS = (CODES, AUDIO, META)  # sorted
_PICKLES = (".pkl", ".pickle", ".pyd", ".pt", ".pth", ".ckpt")  # readers elsewhere run code in these
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)


@dataclass
class Sample:
    """One conversation as it is stored.

    Attributes:
        key: names the sample inside its split; no dots, no slashes.
        meta: the JSON member (`id, source, license, language, duration_s, turns`).
        codes: [K, F] int16, the turns' frames one after the other, no EOS rows.
        audio: [S] float32 or int16 at 24 kHz, kept as 16-bit FLAC, or None.
    """

    key: str
    meta: dict[str, Any]
    codes: np.ndarray
    audio: np.ndarray | None = None


@dataclass
class _Entry:
    """A line of `<shard>.samples.jsonl`: `members` maps a member's ending to (offset of its bytes, size)."""

    key: str
    num_frames: int
    num_characters: int
    duration_s: float
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    def line(self) -> str:
        members = {name: list(place) for name, place in sorted(self.members.items())}
        return _json(
            {
                "key": self.key,
                "num_frames": self.num_frames,
                "num_characters": self.num_characters,
                "duration_s": self.duration_s,
                "members": members,
            }
        )


def write_split(
    samples: Iterable[Sample], folder: Path, codec_entry: dict[str, object], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, Any]:
    """Write samples, in the order given, as shards with their index, and return the index.

    The same samples give the same bytes. Every file is written under a temporary name, synced and renamed; `index.json`
    comes last, so a folder with an index is whole.

    Args:
        codec_entry: `Codec.index_entry()` of the codec that made the codes.
        max_shard_bytes: of one tar.
    Raises:
        ValueError: on a bad key, a key given twice, or codes and turns that disagree.
        FileExistsError: if the folder already has an index.
    """
    if (folder / INDEX_NAME).exists():
        raise FileExistsError(f"{folder / INDEX_NAME} exists: a written split is never changed; give another folder or remove this one")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    seen: set[str] = set()
    writer: _ShardWriter | None = None
    try:
        for sample in samples:
            if sample.key in seen:
                raise ValueError(f"{folder}: key {sample.key} is given twice; keys name one sample of a split")
            seen.add(sample.key)
            members = _members_of(sample)
            size = sum(_tar_size(len(content)) for content in members.values())
            if writer is not None and writer.offset + size + len(_END_OF_TAR) > max_shard_bytes:
                shards.append(writer.close())
                writer = None
            if writer is None:
                writer = _ShardWriter(folder, f"shard-{len(shards):06d}")
            entry = check_sample(sample.key, sample.meta, sample.codes, codec_entry, where=str(folder))
            writer.add(entry, members)
        if writer is not None:
            shards.append(writer.close())
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    return _write_index(folder, codec_entry, shards)


def index_split(folder: Path, codec_entry: dict[str, object]) -> dict[str, Any]:
    """Write the index of a folder of `*.tar` shards made elsewhere, and return it.

    Members are read as streams and checked: the JSON, the codes' shape and type, and that the turns cover the codes.
    Members with other endings are ignored.

    Raises:
        FileNotFoundError: if the folder has no tars.
        ValueError: on links, devices and pickles, a truncated tar, a key that comes twice, or a sample that does not hold
            together; the message names the tar and the sample.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"{folder}: no *.tar there; give the folder of a split, or a folder of such folders")
    shards = []
    seen: set[str] = set()
    for path in tars:
        entries = list(_scan_tar(path, codec_entry))
        for entry in entries:
            if entry.key in seen:
                raise ValueError(f"{path}: key {entry.key} is in this split twice; keys name one sample of a split")
            seen.add(entry.key)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        write_atomic(path.with_suffix(".samples.jsonl"), "".join(entry.line() + "\n" for entry in entries).encode())
        shards.append(_shard_entry(path.name, digest, path.stat().st_size, entries))
    return _write_index(folder, codec_entry, shards)


def check_sample(key: str, meta: dict[str, Any], codes: np.ndarray, codec_entry: dict[str, object], where: str) -> _Entry:
    """Refuse a sample whose key, turns and codes do not hold together; return its index line, places not yet known."""
    at = f"{where}: sample {key}"
    if not key or any(c in key for c in "./\\"):
        raise ValueError(f"{where}: key {key!r}; expected <recording digest>-<start ms>, without dots or slashes")
    num_codebooks = codec_entry["num_codebooks"]
    if codes.dtype != np.int16 or codes.ndim != 2:
        raise ValueError(f"{at}: codes are {codes.dtype} {codes.shape}, expected int16 [K, F]; re-run data_prep")
    if codes.shape[0] != num_codebooks:
        raise ValueError(f"{at} has {codes.shape[0]} codebooks, codec {codec_entry['name']} has {num_codebooks}; re-run data_prep")
    if codes.size and int(codes.min()) < 0:
        raise ValueError(f"{at}: code {int(codes.min())}, expected codes from 0; re-run data_prep")
    if bool((codes == 0).all(axis=0).any()):
        raise ValueError(f"{at}: a frame of {num_codebooks} zero codes, which means EOS; encode the recording again")
    try:
        duration_s = float(meta["duration_s"])
        ranges = [(int(turn["frames"][0]), int(turn["frames"][1])) for turn in meta["turns"]]
        num_characters = sum(len(turn["text"]) for turn in meta["turns"])
        for turn in meta["turns"]:
            int(turn["speaker"])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{at}: its JSON is not ours ({type(error).__name__}: {error}); see docs/data_format.md") from error
    ends = [0, *(last for _, last in ranges)]
    if [first for first, _ in ranges] != ends[:-1] or ends[-1] != codes.shape[1] or any(last <= first for first, last in ranges):
        raise ValueError(f"{at}: turns cover frames {ranges} of {codes.shape[1]}; expected each turn to follow the one before, to the end")
    return _Entry(key, codes.shape[1], num_characters, duration_s)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, sync it and rename it: a reader sees all of it or nothing."""
    part = path.with_name(path.name + ".tmp")
    with part.open("wb") as stream:
        stream.write(content)
        _sync(stream)
    os.replace(part, path)


class _ShardWriter:
    """One tar being written. Headers are built by hand of fixed fields, so that nothing of the machine enters them."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.path = folder / f"{stem}.tar"
        self.part = folder / f"{stem}.tar.tmp"
        self.offset = 0
        self._stream = self.part.open("wb")
        self._digest = hashlib.sha256()
        self._entries: list[_Entry] = []

    def add(self, entry: _Entry, members: dict[str, bytes]) -> None:
        for ending, content in sorted(members.items()):
            info = tarfile.TarInfo(f"{entry.key}.{ending}")  # mtime, uid, gid 0, no owner names: TarInfo's defaults
            info.size = len(content)
            info.mode = 0o644
            header = info.tobuf(tarfile.USTAR_FORMAT)
            entry.members[ending] = (self.offset + len(header), len(content))
            self._write(header + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        self._entries.append(entry)

    def close(self) -> dict[str, Any]:
        """Finish the tar and its samples file; return its entry of the index."""
        self._write(_END_OF_TAR)
        _sync(self._stream)
        self._stream.close()
        os.replace(self.part, self.path)
        write_atomic(self.path.with_suffix(".samples.jsonl"), "".join(entry.line() + "\n" for entry in self._entries).encode())
        return _shard_entry(self.path.name, self._digest.hexdigest(), self.offset, self._entries)

    def discard(self) -> None:
        self._stream.close()
        self.part.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        self._stream.write(content)
        self._digest.update(content)
        self.offset += len(content)


def _members_of(sample: Sample) -> dict[str, bytes]:
    """The sample's members as bytes, by ending."""
    buffer = io.BytesIO()
    np.save(buffer, sample.codes, allow_pickle=False)
    members = {CODES: buffer.getvalue(), META: _json(sample.meta).encode()}
    if sample.audio is not None:
        members[AUDIO] = _flac(sample.audio)
    return members


def _flac(audio: np.ndarray) -> bytes:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, audio, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _scan_tar(path: Path, codec_entry: dict[str, object]) -> Iterator[_Entry]:
    """The index lines of a tar made elsewhere, in its order; a sample's members must stand together."""
    size = path.stat().st_size
    pending: dict[str, tuple[int, int]] = {}
    current: str | None = None
    done: set[str] = set()
    with path.open("rb") as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                infos = list(archive)
        except tarfile.TarError as error:
            raise ValueError(f"{path}: not a whole, uncompressed tar ({error}); copy it again") from error
        for info in infos:
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise ValueError(f"{path}: member {info.name!r} is a link or a device; a shard holds plain files only")
            if info.name.lower().endswith(_PICKLES):
                raise ValueError(f"{path}: member {info.name!r} is a pickle, which can run code; write codes as .codes.npy")
            if info.offset_data + info.size > size:
                raise ValueError(f"{path}: cut off inside {info.name!r}; copy it again")
            key, _, ending = info.name.rsplit("/", 1)[-1].partition(".")
            if ending not in _MEMBERS:
                continue
            if key != current:
                if current is not None:
                    yield _read_entry(path, stream, current, pending, codec_entry)
                    done.add(current)
                if key in done:
                    raise ValueError(f"{path}: the members of sample {key} do not stand together; write the tar sample by sample")
                current, pending = key, {}
            pending[ending] = (info.offset_data, info.size)
        if current is not None:
            yield _read_entry(path, stream, current, pending, codec_entry)


def _read_entry(path: Path, stream: BinaryIO, key: str, members: dict[str, tuple[int, int]], codec_entry: dict[str, object]) -> _Entry:
    missing = [ending for ending in (CODES, META) if ending not in members]
    if missing:
        raise ValueError(f"{path}: sample {key} has no .{missing[0]}; the tar is incomplete")
    content = {}
    for ending in (CODES, META):
        offset, size = members[ending]
        stream.seek(offset)
        content[ending] = stream.read(size)
    try:
        meta = json.loads(content[META])
        codes = np.load(io.BytesIO(content[CODES]), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: sample {key} cannot be read ({error}); expected JSON and an int16 .npy") from error
    entry = check_sample(key, meta, codes, codec_entry, where=str(path))
    entry.members = members
    return entry


def _shard_entry(name: str, digest: str, num_bytes: int, entries: list[_Entry]) -> dict[str, Any]:
    return {
        "name": name,
        "sha256": digest,
        "num_bytes": num_bytes,
        "num_samples": len(entries),
        "num_frames": sum(entry.num_frames for entry in entries),
        "duration_s": round(sum(entry.duration_s for entry in entries), 3),
        "num_characters": sum(entry.num_characters for entry in entries),
    }


def _write_index(folder: Path, codec_entry: dict[str, object], shards: list[dict[str, Any]]) -> dict[str, Any]:
    index = {"format_version": FORMAT_VERSION, "codec": codec_entry, "shards": shards}
    write_atomic(folder / INDEX_NAME, (json.dumps(index, indent=1, ensure_ascii=False) + "\n").encode())
    return index


def _tar_size(num_bytes: int) -> int:
    """Bytes a member takes in the tar: its header, and its content in whole blocks."""
    return tarfile.BLOCKSIZE + num_bytes + -num_bytes % tarfile.BLOCKSIZE


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
