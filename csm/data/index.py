"""What a split's `index.json` says, and whether its shards are what it says.

The format is docs/data_format.md. A fault of the index itself is refused at once; a fault of one shard is a sentence that
the caller either raises or keeps, so that training can go on without that shard.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from csm.data.storage import Folder, LocalFolder, join, open_folder, sha256_of

FORMAT_VERSION = 1
INDEX_NAME = "index.json"
NUM_HASHING_THREADS = 4  # one reads 1.2 GB/s where the disk does
_SLOW_BYTES = 20 * 2**30  # to hash this much takes long enough to say so

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

    @property
    def table_name(self) -> str:
        return self.name.removesuffix(".tar") + ".samples.jsonl"


@dataclass(frozen=True)
class ShardIndex:
    """What a split's `index.json` says.

    Attributes:
        folder: the split's folder.
        digest: sha256 (hex) of codec and shards: equal digests hold equal samples in equal order.
        faults: shards (by name) that are not there or of another size than the index says, and what is wrong with each.
    """

    folder: Folder
    codec: CodecEntry
    shards: list[ShardEntry]
    digest: str
    faults: Mapping[str, str]

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
    def load(cls, place: Path | str, *, keep_faults: bool = False) -> ShardIndex:
        """Read `index.json` of a split and check that every shard it names is there, whole.

        Shards in the folder that the index does not name are not read; a warning names them.

        Args:
            place: the split's folder, or its URL.
            keep_faults: note a shard that is missing or of another size in `faults` instead of refusing the split.
        Raises:
            FileNotFoundError: no folder, no index, or no shard; the message says which command makes it.
            ValueError: another format version, a broken index, or a shard of another size than the index says.
        """
        folder = open_folder(place)
        sizes = _list_files(folder)
        raw = _read_index(folder, sizes)
        try:
            codec = _from_json(CodecEntry, raw["codec"])
            shards = [_from_json(ShardEntry, entry) for entry in raw["shards"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{join(folder.place, INDEX_NAME)}: {error!r} is missing or malformed; {index_advice(folder)}") from error
        _check_entries(folder, codec, shards)
        faults: dict[str, str] = {}
        for shard in shards:
            try:
                _check_size(folder, shard, sizes.get(shard.name))
            except (FileNotFoundError, ValueError) as error:
                if not keep_faults:
                    raise
                faults[shard.name] = str(error)
        extra = sorted({name for name in sizes if name.endswith(".tar")} - {shard.name for shard in shards})
        if extra:
            named = ", ".join(extra[:3]) + (f" and {len(extra) - 3} more" if len(extra) > 3 else "")
            _log.warning("%s: not in the index, and not read: %s; to take them in, %s", folder, named, index_advice(folder))
        told = json.dumps([FORMAT_VERSION, raw["codec"], [[s.name, s.sha256, s.num_samples] for s in shards]], sort_keys=True)
        return cls(folder, codec, shards, hashlib.sha256(told.encode()).hexdigest(), faults)

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
                f"({', '.join(wrong)} differ{'s' if len(wrong) == 1 else ''}); use the codec in {join(self.folder.parent, 'codec')}, "
                f"or encode again: python -m data_prep"
            )

    def compare_digests(self) -> dict[str, str]:
        """Compare the sha256 of every shard of a local folder with the index, several at a time: reads all bytes.

        Which ones agreed is kept beside them (`verified-*.json`, with their times of last change), so that bytes are read
        once and not at every start.

        Returns:
            What is wrong with each shard (by name) that differs; those in `faults` are left out.
        """
        if not isinstance(self.folder, LocalFolder):
            return {}
        stamp_name = f"verified-{self.digest[:16]}.json"
        stamps = _read_stamps(self.folder, stamp_name)
        path_of = {shard.name: Path(self.folder.place, shard.name) for shard in self.shards if shard.name not in self.faults}
        changed_at = {name: path.stat().st_mtime_ns for name, path in path_of.items()}
        todo = [shard for shard in self.shards if shard.name in path_of and stamps.get(shard.name) != changed_at[shard.name]]
        num_bytes = sum(shard.num_bytes for shard in todo)
        if num_bytes > _SLOW_BYTES:
            _log.warning("%s: reading %.0f GB once to compare digests; data.verify=size does not", self.folder, num_bytes / 1e9)
        with ThreadPoolExecutor(NUM_HASHING_THREADS) as pool:
            digests = list(pool.map(lambda shard: _sha256_or_error(path_of[shard.name]), todo))
        faults: dict[str, str] = {}
        for shard, got in zip(todo, digests, strict=True):
            if got == shard.sha256:
                stamps[shard.name] = changed_at[shard.name]
            else:
                faults[shard.name] = (
                    f"shard {path_of[shard.name]}: sha256 {got[:12]}, the index says {shard.sha256[:12]}; copy it again, or, "
                    f"if it is meant to be so, {index_advice(self.folder)}"
                )
        if len(todo) > len(faults):
            _write_beside(self.folder, stamp_name, json.dumps(stamps).encode())
        return faults

    def verify(self) -> None:
        """Compare the sha256 of every shard with the index.

        Raises:
            ValueError: names the first shard that differs.
        """
        for fault in self.compare_digests().values():
            raise ValueError(fault)


def prep_advice(data: str | Path) -> str:
    return (
        f"point data.path at prepared shards, make the demo corpus with `python -m data_prep prep=demo output={data}` (model=demo), or "
        "try a model on made-up rows with data=random"
    )


def index_advice(folder: Folder) -> str:
    return f"write the index again with `python -m data_prep stages=[index] output={folder.parent}`"


def check_split_folder(place: Path | str) -> None:
    """Refuse a split's folder that is not there, and say what to do."""
    _list_files(open_folder(place))


def _list_files(folder: Folder) -> dict[str, int]:
    try:
        return folder.sizes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: no such folder, expected shards and {INDEX_NAME}; {prep_advice(folder.parent)}") from error


def _read_index(folder: Folder, sizes: Mapping[str, int]) -> dict:
    path = join(folder.place, INDEX_NAME)
    if INDEX_NAME not in sizes:
        if any(name.endswith(".tar") for name in sizes):
            raise FileNotFoundError(f"{path}: shards without an index; {index_advice(folder)}")
        raise FileNotFoundError(f"{path}: not there, and no shards either; {prep_advice(folder.parent)}")
    try:
        raw = json.loads(folder.read(INDEX_NAME))
        version = raw["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a shard index ({error!r}); {index_advice(folder)}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version {version!r}, this code reads {FORMAT_VERSION}; {index_advice(folder)}")
    return raw


def _from_json(kind: type[_Entry], raw: dict) -> _Entry:
    return kind(**{f.name: raw[f.name] for f in fields(kind)})


def _check_entries(folder: Folder, codec: CodecEntry, shards: Sequence[ShardEntry]) -> None:
    """Refuse values no writer makes: what a flipped bit leaves of a number or a name."""
    wrong = [] if type(codec.num_codebooks) is int and isinstance(codec.digest, str) else ["codec"]
    for shard in shards:
        counts = (shard.num_bytes, shard.num_samples, shard.num_frames, shard.num_characters)
        is_sound = isinstance(shard.name, str) and "/" not in shard.name and isinstance(shard.sha256, str)
        if not (is_sound and isinstance(shard.duration_s, (int, float)) and all(type(count) is int and count >= 0 for count in counts)):
            wrong.append(repr(shard.name))
    if len({shard.name for shard in shards}) < len(shards):
        wrong.append("a shard named twice")
    if wrong:
        path = join(folder.place, INDEX_NAME)
        raise ValueError(f"{path}: malformed: {', '.join(wrong[:3])}; {index_advice(folder)}")


def _check_size(folder: Folder, shard: ShardEntry, got: int | None) -> None:
    path = join(folder.place, shard.name)
    if got is None:
        raise FileNotFoundError(f"shard {path}: not there, the index names it; copy it again, or {index_advice(folder)}")
    if got != shard.num_bytes:
        fault = "truncated" if got < shard.num_bytes else "changed"
        raise ValueError(
            f"shard {path}: {got} bytes, the index says {shard.num_bytes}: it is {fault}; copy it again, or, if it is meant to be so, "
            f"{index_advice(folder)}"
        )


def _read_stamps(folder: LocalFolder, name: str) -> dict[str, int]:
    try:
        stamps = json.loads(folder.read(name))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _sha256_or_error(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        return f"not readable ({error})"


def _write_beside(folder: Folder, name: str, content: bytes) -> None:
    """Write a file that only saves time; a folder that cannot be written goes without."""
    try:
        folder.write(name, content)
    except OSError as error:
        _log.info("%s is not kept: %s", name, error)
