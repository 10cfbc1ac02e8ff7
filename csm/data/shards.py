"""Reads prepared conversations from shards: the index, and any sample of any shard by one `pread` for each member.

The format is docs/data-format.md: `<data>/<split>/` holds `index.json`, tar files in WebDataset layout and, beside each
tar, a `.samples.jsonl` with the byte range of every member. Tars are never opened as tars and nothing is unpickled, so
a sample costs two reads wherever it lies. Order, packing and batches are left to the neighbours of this module.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ, Turn

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MAX_OPEN_SHARDS = 256  # file descriptors of one reader in one process; the least recently read is closed first
NUM_BAD_NAMED = 20  # bad samples that a run names in its log
MEMBERS = ("json", "codes.npy", "flac")
_NO_MEMBER = (-1, -1)  # offset and size

_log = logging.getLogger(__name__)
_Entry = TypeVar("_Entry", "CodecEntry", "ShardEntry")


@dataclass(frozen=True)
class CodecEntry:
    """The codec that made the codes, as an index names it."""

    name: str
    num_codebooks: int
    frame_rate_hz: float
    sample_rate_hz: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name} with {self.num_codebooks} codebooks, digest {self.digest[:12]}"


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a split, as the index names it."""

    name: str
    sha256: str
    num_bytes: int
    num_samples: int
    num_frames: int
    duration_s: float
    num_characters: int


@dataclass(frozen=True)
class ShardIndex:
    """What a split's `index.json` says.

    Attributes:
        folder: the split's folder.
        digest: sha256 (hex) of codec and shards: equal digests hold equal samples in equal order.
    """

    folder: Path
    codec: CodecEntry
    shards: list[ShardEntry]
    digest: str

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @property
    def num_frames(self) -> int:
        return sum(shard.num_frames for shard in self.shards)

    @property
    def duration_s(self) -> float:
        return sum(shard.duration_s for shard in self.shards)

    @classmethod
    def load(cls, folder: Path | str) -> ShardIndex:
        """Read `index.json` of a split and check that every shard it names is there, whole.

        Raises:
            FileNotFoundError: no folder, no index, or no shard; the message says which command makes it.
            ValueError: another format version, a broken index, or a shard of another size than the index says.
        """
        folder = Path(folder)
        raw = _read_index(folder)
        try:
            codec = _from_json(CodecEntry, raw["codec"])
            shards = [_from_json(ShardEntry, entry) for entry in raw["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / INDEX_NAME}: {error!r} is missing or malformed; {_index_advice(folder)}") from error
        for shard in shards:
            _check_size(folder / shard.name, shard.num_bytes)
        told = json.dumps([FORMAT_VERSION, raw["codec"], [[s.name, s.sha256, s.num_samples] for s in shards]], sort_keys=True)
        return cls(folder, codec, shards, hashlib.sha256(told.encode()).hexdigest())

    def check_codec(self, *, num_codebooks: int | None = None, digest: str | None = None, name: str | None = None) -> None:
        """Refuse shards that were made with another codec than the one expected; None is not compared.

        Raises:
            ValueError: names both codecs.
        """
        wanted = {"name": name, "num_codebooks": num_codebooks, "digest": digest}
        wrong = [key for key, value in wanted.items() if value is not None and value != getattr(self.codec, key)]
        if wrong:
            parts = [
                name or "a codec",
                f"with {num_codebooks} codebooks" if num_codebooks is not None else "",
                f"digest {digest[:12]}" if digest is not None else "",
            ]
            expected = " ".join(part for part in parts if part)
            raise ValueError(
                f"{self.folder}: shards were made with codec {self.codec}; this run expects {expected} "
                f"({', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}); use the codec in {self.folder.parent / 'codec'}, "
                f"or encode again: python -m data_prep"
            )

    def verify(self) -> None:
        """Compare the sha256 of every shard with the index: reads all bytes.

        Raises:
            ValueError: names the first shard that differs.
        """
        for shard in self.shards:
            with open(self.folder / shard.name, "rb") as file:
                got = hashlib.file_digest(file, "sha256").hexdigest()
            if got != shard.sha256:
                raise ValueError(
                    f"shard {self.folder / shard.name}: sha256 {got[:12]}, the index says {shard.sha256[:12]}; copy it again, or "
                    f"{_index_advice(self.folder)}"
                )


@dataclass
class Sample:
    """One conversation.

    Attributes:
        key: `<recording digest>-<start ms>`.
        turns: in order, with codes int64 [K, F] and learn flags.
        meta: the sample's JSON as it is stored.
    """

    key: str
    turns: list[Turn]
    meta: dict
    _read_flac: Callable[[], bytes] | None = field(repr=False, default=None)

    def audio(self) -> Tensor | None:
        """The conversation's audio, float32 [S] at 24 kHz, decoded now; None when the shard carries none."""
        if self._read_flac is None:
            return None
        import soundfile

        samples, rate_hz = soundfile.read(io.BytesIO(self._read_flac()), dtype="float32")
        if rate_hz != SAMPLE_RATE_HZ or samples.ndim != 1:
            raise ValueError(f"sample {self.key}: audio of {rate_hz} Hz, shape {samples.shape}; expected {SAMPLE_RATE_HZ} Hz mono")
        return torch.from_numpy(samples)


class ShardReader:
    """Random access to the samples of one split, or of several that were made with the same codec.

    Safe to fork and to pickle: every process opens its own file descriptors when it first reads.

    Attributes:
        indexes: one `ShardIndex` a folder.
        keys: [n] str, in index order.
        shard: [n] int32, the shard each sample lies in, counted over all folders.
        num_frames, num_characters: [n] int32.
        duration_s: [n] float64.
    """

    def __init__(self, folders: Path | str | Sequence[Path | str]) -> None:
        folders = [folders] if isinstance(folders, (str, Path)) else list(folders)
        self.indexes = [ShardIndex.load(folder) for folder in folders]
        for index in self.indexes[1:]:
            first = self.indexes[0].codec
            index.check_codec(num_codebooks=first.num_codebooks, digest=first.digest, name=first.name)
        self.paths = [index.folder / shard.name for index in self.indexes for shard in index.shards]
        entries = [entry for index in self.indexes for entry in index.shards]
        tables = [_read_samples_table(path, entry) for path, entry in zip(self.paths, entries, strict=True)]
        self.keys: list[str] = [key for table in tables for key in table.keys]
        sizes = [len(table.keys) for table in tables]
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
        counts = np.concatenate([table.counts for table in tables]) if tables else np.zeros((0, 3))
        self.num_frames, self.num_characters = counts[:, 0].astype(np.int32), counts[:, 1].astype(np.int32)
        self.duration_s = counts[:, 2]
        # [n, len(MEMBERS), 2]: byte offset and size of each member; -1 where a sample has none
        self._members = np.concatenate([t.members for t in tables]) if tables else np.zeros((0, len(MEMBERS), 2), np.int64)
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def codec(self) -> CodecEntry:
        return self.indexes[0].codec

    def read(self, sample_index: int) -> Sample:
        """Read one conversation.

        Raises:
            ValueError: the sample's JSON or codes are not what the format says; names shard and key.
        """
        meta, turns_meta = self.read_turns(sample_index)
        try:
            codes = _parse_codes(self._read_member(sample_index, "codes.npy"), self.codec.num_codebooks)
            turns = [_turn(turn, codes) for turn in turns_meta]
        except (ValueError, KeyError, TypeError) as error:
            raise self._bad(sample_index, error) from error
        has_audio = self._members[sample_index, MEMBERS.index("flac"), 0] >= 0
        return Sample(self.keys[sample_index], turns, meta, (lambda: self._read_member(sample_index, "flac")) if has_audio else None)

    def read_turns(self, sample_index: int) -> tuple[dict, list[dict]]:
        """A sample's JSON and its turns, checked against the index; the codes are not read."""
        try:
            meta = json.loads(self._read_member(sample_index, "json"))
            turns = meta["turns"]
            for turn in turns:
                first, last = turn["frames"]
                if not (0 <= first < last <= self.num_frames[sample_index] and isinstance(turn["text"], str)):
                    raise ValueError(f"a turn has frames {turn['frames']} of {self.num_frames[sample_index]}, text {turn['text']!r}")
            if not turns:
                raise ValueError("no turns")
        except (ValueError, KeyError, TypeError) as error:
            raise self._bad(sample_index, error) from error
        return meta, turns

    def close(self) -> None:
        """Close what this process opened."""
        if self._owner == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)
        self._descriptors.clear()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_descriptors": OrderedDict(), "_owner": -1}

    def __del__(self) -> None:
        if hasattr(self, "_descriptors"):
            self.close()

    def _bad(self, sample_index: int, error: Exception) -> ValueError:
        shard = self.paths[self.shard[sample_index]]
        reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
        return ValueError(f"shard {shard}: sample {self.keys[sample_index]}: {reason}")

    def _read_member(self, sample_index: int, member: str) -> bytes:
        offset, size = self._members[sample_index, MEMBERS.index(member)].tolist()
        if offset < 0:
            raise ValueError(f"no {member} in the tar")
        data = os.pread(self._descriptor(int(self.shard[sample_index])), size, offset)
        if len(data) != size:
            raise ValueError(f"{member}: {len(data)} bytes at {offset}, the index says {size}; the shard was cut while we read it")
        return data

    def _descriptor(self, shard: int) -> int:
        """This process's file descriptor of a shard. A child of a fork must not share its parent's table: it would close it."""
        if self._owner != os.getpid():
            self._descriptors, self._owner = OrderedDict(), os.getpid()
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            descriptor = self._descriptors[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._descriptors.move_to_end(shard)
        return descriptor


class BadSamples:
    """Counts and names samples that cannot be used, and stops the run above a share of them."""

    def __init__(self, num_samples: int, max_share: float) -> None:
        self.num_samples, self.max_share = num_samples, max_share
        self.reasons: dict[int, str] = {}

    def add(self, sample_index: int, reason: str) -> None:
        """Quarantine a sample.

        Raises:
            ValueError: more than `max_share` of all samples are bad; names the first.
        """
        if sample_index in self.reasons:
            return
        self.reasons[sample_index] = reason
        if len(self.reasons) <= NUM_BAD_NAMED:
            and_on = "; more will only be counted" if len(self.reasons) == NUM_BAD_NAMED else ""
            _log.warning("left out a bad sample (%d so far): %s%s", len(self.reasons), reason, and_on)
        if len(self.reasons) > self.max_share * self.num_samples:
            raise ValueError(
                f"{len(self.reasons)} of {self.num_samples} samples are bad, more than data.max_bad_share={self.max_share}; "
                f"the first: {next(iter(self.reasons.values()))}"
            )


def iter_samples(folder: Path | str) -> Iterator[Sample]:
    """Every sample of a split in index order.

    Raises:
        ValueError: at the first bad sample: an evaluation must not quietly shrink.
    """
    reader = ShardReader(folder)
    for sample_index in range(len(reader)):
        yield reader.read(sample_index)


def split_folders(path: Path | str, split: str) -> list[Path]:
    """The folders of a split: `path` is a data folder, or a glob of several."""
    if not glob.has_magic(str(path)):
        return [Path(path) / split]
    folders = sorted(Path(match) / split for match in glob.glob(str(path)))
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise FileNotFoundError(f"data.path={path!s}: no folder matches that has a {split!r} split; {_prep_advice(Path(path))}")
    return folders


def _prep_advice(data: Path) -> str:
    return (
        f"point data.path at prepared shards, make the demo corpus with `python -m data_prep prep=demo output={data}` (model=demo), or "
        "try a model on made-up rows with data=random"
    )


def _index_advice(folder: Path) -> str:
    return f"write the index again with `python -m data_prep stages=[index] output={folder.parent}`"


def check_split_folder(folder: Path) -> None:
    """Refuse a split's folder that is not there, and say what to do."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected shards and {INDEX_NAME}; {_prep_advice(folder.parent)}")


def _read_index(folder: Path) -> dict:
    check_split_folder(folder)
    path = folder / INDEX_NAME
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise FileNotFoundError(f"{path}: shards without an index; {_index_advice(folder)}")
        raise FileNotFoundError(f"{path}: not there, and no shards either; {_prep_advice(folder.parent)}")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a shard index ({error!r}); {_index_advice(folder)}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version!r}, this code reads {FORMAT_VERSION}; {_index_advice(folder)}")
    return raw


def _from_json(kind: type[_Entry], raw: dict) -> _Entry:
    return kind(**{f.name: raw[f.name] for f in fields(kind)})


def _check_size(path: Path, num_bytes: int) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"shard {path}: not there, the index names it; copy it again, or {_index_advice(path.parent)}")
    got = path.stat().st_size
    if got != num_bytes:
        fault = "truncated" if got < num_bytes else "changed"
        raise ValueError(
            f"shard {path}: {got} bytes, the index says {num_bytes}: it is {fault}; copy it again, or, if it is meant to be so, "
            f"{_index_advice(path.parent)}"
        )


@dataclass
class _SamplesTable:
    """A `.samples.jsonl` as columns: `counts` [n, 3] (frames, characters, seconds), `members` [n, len(MEMBERS), 2]."""

    keys: list[str]
    counts: np.ndarray
    members: np.ndarray


def _read_samples_table(shard: Path, entry: ShardEntry) -> _SamplesTable:
    path = shard.with_suffix(".samples.jsonl")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, expected beside {shard.name}; {_index_advice(shard.parent)}")
    try:
        # one parse for all lines: twice as fast as one for each
        lines = json.loads(b"[" + b",".join(path.read_bytes().splitlines()) + b"]")
        if len(lines) != entry.num_samples:
            raise ValueError(f"{len(lines)} lines, the index says {entry.num_samples} samples")
        keys = [line["key"] for line in lines]
        counts = np.array([(line["num_frames"], line["num_characters"], line["duration_s"]) for line in lines], dtype=np.float64)
        places = [[line["members"].get(member, _NO_MEMBER) for member in MEMBERS] for line in lines]
        members = np.array(places, dtype=np.int64).reshape(-1, len(MEMBERS), 2)
        if members.size and members.sum(axis=2).max() > entry.num_bytes:
            raise ValueError(f"a member ends after the shard's {entry.num_bytes} bytes")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}; {_index_advice(shard.parent)}") from error
    return _SamplesTable(keys, counts.reshape(-1, 3), members)


@lru_cache(maxsize=65_536)
def _parse_npy_header(header: bytes) -> tuple[tuple[int, ...], bool, str]:
    """(shape, fortran order, dtype) of a .npy header. Cached: clips of one length share their header, and parsing is slow."""
    file = io.BytesIO(header)
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"codes.npy of version {version}, expected 1.0 or 2.0")
    shape, is_fortran, dtype = read(file)
    return shape, is_fortran, dtype.str


def _parse_codes(data: bytes, num_codebooks: int) -> np.ndarray:
    """A codes member as int16 [K, F]; never unpickles."""
    if data[:6] != b"\x93NUMPY" or len(data) < 12:
        raise ValueError("codes.npy does not start like a .npy file")
    size = 10 + int.from_bytes(data[8:10], "little") if data[6] == 1 else 12 + int.from_bytes(data[8:12], "little")
    shape, is_fortran, dtype = _parse_npy_header(data[:size])
    if dtype != "<i2" or len(shape) != 2 or is_fortran:
        raise ValueError(f"codes are {dtype} {shape}{' in Fortran order' if is_fortran else ''}, expected int16 [K, F]; re-run data_prep")
    if shape[0] != num_codebooks:
        raise ValueError(f"{shape[0]} codebooks, the index says {num_codebooks}; re-run data_prep")
    if len(data) - size != 2 * shape[0] * shape[1]:
        raise ValueError(f"codes {shape} need {2 * shape[0] * shape[1]} bytes, the member has {len(data) - size}")
    return np.frombuffer(data, dtype="<i2", offset=size).reshape(shape)


def _turn(raw: dict, codes: np.ndarray) -> Turn:
    """A turn of the JSON with its slice of the conversation's codes [K, F]."""
    first, last = raw["frames"]
    if last > codes.shape[1]:
        raise ValueError(f"a turn has frames {first}-{last}, the codes end at {codes.shape[1]}")
    learn = raw.get("learn") or {}
    return Turn(
        speaker=int(raw["speaker"]),
        text=raw["text"],
        codes=torch.from_numpy(codes[:, first:last].astype(np.int64)),
        learn_c0=bool(learn.get("c0", True)),
        learn_depth=bool(learn.get("depth", True)),
    )
