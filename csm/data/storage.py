"""Where the files of a split lie: a local folder, or one behind a URL (`s3://`, `hf://`, any that fsspec opens).

Small files (the index, the tables beside shards) are read whole through a `Folder`; shards are read by byte ranges through
`ShardFiles`, or copied whole to a local folder first. What the bytes mean is left to the neighbours of this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

MAX_OPEN_SHARDS = 256  # file descriptors of one reader in one process; the least recently read is closed first
RETRY_AFTER_S = (0.2, 1.0, 5.0)  # a remote read that failed is tried again after these pauses
_Result = TypeVar("_Result")


def is_url(place: str | Path) -> bool:
    """Whether a place is behind a URL."""
    return "://" in str(place)


def join(place: str | Path, name: str) -> str | Path:
    """A folder or file inside a place."""
    return f"{str(place).rstrip('/')}/{name}" if is_url(place) else Path(place) / name


def open_folder(place: str | Path) -> Folder:
    """The folder at a path or URL; whether it is there shows when it is read."""
    return RemoteFolder(str(place)) if is_url(place) else LocalFolder(Path(place))


class Folder(ABC):
    """The files of one split. Pickled to workers; `str()` of it is its path or URL.

    Attributes:
        place: path or URL.
        parent: of the data folder that holds the split, for messages.
    """

    place: str | Path
    parent: str | Path

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """Bytes of each file in the folder.

        Raises:
            FileNotFoundError: there is no such folder.
        """

    @abstractmethod
    def read_many(self, names: Sequence[str]) -> list[bytes | Exception]:
        """Whole files; in the place of one that could not be read, why."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file, all of it or nothing.

        Raises:
            OSError: it cannot be written.
        """

    def read(self, name: str) -> bytes:
        """A whole file.

        Raises:
            OSError: it is not there or cannot be read.
        """
        content = self.read_many([name])[0]
        if isinstance(content, Exception):
            raise content
        return content

    def __str__(self) -> str:
        return str(self.place)


class LocalFolder(Folder):
    def __init__(self, path: Path) -> None:
        self.place, self.parent = path, path.parent

    def sizes(self) -> dict[str, int]:
        if not os.path.isdir(self.place):
            raise FileNotFoundError(f"{self.place}: no such folder")
        with os.scandir(self.place) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def read_many(self, names: Sequence[str]) -> list[bytes | Exception]:
        contents: list[bytes | Exception] = []
        for name in names:
            try:
                contents.append(Path(self.place, name).read_bytes())
            except OSError as error:
                contents.append(error)
        return contents

    def write(self, name: str, content: bytes) -> None:
        part = Path(self.place, f"{name}.{os.getpid()}.tmp")  # ranks may write at once: each its own, the last rename wins
        try:
            part.write_bytes(content)
            os.replace(part, Path(self.place, name))
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


class RemoteFolder(Folder):
    """A folder behind a URL, read with fsspec; several files at once where the file system can."""

    def __init__(self, url: str) -> None:
        self.place, self.parent = url.rstrip("/"), url.rstrip("/").rsplit("/", 1)[0]

    def sizes(self) -> dict[str, int]:
        files, root = file_system(str(self.place))
        listing = retried(lambda: files.ls(root, detail=True))
        sizes = {file["name"].rstrip("/").rsplit("/", 1)[-1]: file for file in listing if file["type"] == "file"}
        # a web server's listing has no sizes: each is asked for
        return {name: files.size(file["name"]) if file.get("size") is None else int(file["size"]) for name, file in sizes.items()}

    def read_many(self, names: Sequence[str]) -> list[bytes | Exception]:
        files, root = file_system(str(self.place))
        paths = [f"{root}/{name}" for name in names]
        contents = retried(lambda: files.cat(paths, on_error="return")) if paths else {}
        if len(paths) == 1 and not isinstance(contents, dict):
            return [contents]
        missing = FileNotFoundError(f"{self.place}: not answered")
        return [contents.get(path, contents.get(path.lstrip("/"), missing)) for path in paths]

    def write(self, name: str, content: bytes) -> None:
        files, root = file_system(str(self.place))
        try:
            files.pipe_file(f"{root}/{name}", content)
        except NotImplementedError as error:
            raise OSError(f"{self.place} cannot be written") from error


def match_folders(pattern: str) -> list[str]:
    """The places that a glob matches, sorted; of a URL, with its protocol."""
    if is_url(pattern):
        files, root = file_system(pattern)
        return sorted(files.unstrip_protocol(path) for path in files.glob(root))
    import glob

    return sorted(glob.glob(pattern))


class ShardFiles:
    """Byte ranges of shards, wherever each lies.

    Safe to fork and to pickle: every process opens its own file descriptors and connections when it first reads.

    Args:
        places: path or URL of each shard.
        digests: sha256 (hex) of each, checked when one is copied.
        cache_dir: where shards behind URLs are copied to, whole, when they are first read; None reads them by ranges.
    """

    def __init__(self, places: Sequence[str | Path], digests: Sequence[str], cache_dir: str | Path | None = None) -> None:
        self.places, self._digests = list(places), list(digests)
        self._cache = Path(cache_dir) if cache_dir is not None else None
        self._faults: dict[int, str] = {}  # shards whose copy was not what the index says
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._owner = os.getpid()

    def read(self, ranges: Sequence[tuple[int, int, int]]) -> list[bytes | Exception]:
        """Bytes of (shard, first, last) ranges, each of full length; where that fails, why."""
        remote = [index for index, (shard, _, _) in enumerate(ranges) if self._cache is None and is_url(self.places[shard])]
        contents: list[bytes | Exception] = [b""] * len(ranges)
        for index in set(range(len(ranges))) - set(remote):
            try:
                contents[index] = self._pread(*ranges[index])
            except (OSError, ValueError) as error:
                contents[index] = error
        if remote:
            for index, content in zip(remote, self._fetch([ranges[index] for index in remote]), strict=True):
                contents[index] = content
        for index, (_, first, last) in enumerate(ranges):
            content = contents[index]
            if not isinstance(content, Exception) and len(content) != last - first:
                contents[index] = ValueError(f"{len(content)} of {last - first} bytes at {first}; the shard was cut while we read it")
        return contents

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

    def _pread(self, shard: int, first: int, last: int) -> bytes:
        return os.pread(self._descriptor(shard), last - first, first)

    def _fetch(self, ranges: Sequence[tuple[int, int, int]]) -> list[bytes | Exception]:
        """Ranges of shards behind URLs, all of one file system in one call."""
        by_protocol: dict[str, list[int]] = {}
        for index, (shard, _, _) in enumerate(ranges):
            by_protocol.setdefault(str(self.places[shard]).split("://")[0], []).append(index)
        contents: list[bytes | Exception] = [b""] * len(ranges)
        for indexes in by_protocol.values():
            asked = [ranges[index] for index in indexes]
            opened = [file_system(str(self.places[shard])) for shard, _, _ in asked]
            files, paths = opened[0][0], [path for _, path in opened]
            firsts, lasts = [first for _, first, _ in asked], [last for _, _, last in asked]
            try:
                got = retried(partial(files.cat_ranges, paths, firsts, lasts, on_error="raise"))
            except Exception:  # one of them fails: which?
                got = files.cat_ranges(paths, firsts, lasts, on_error="return")
            for index, content in zip(indexes, got, strict=True):
                contents[index] = content
        return contents

    def _descriptor(self, shard: int) -> int:
        """This process's file descriptor of a shard. A child of a fork must not share its parent's table: it would close it."""
        if self._owner != os.getpid():
            self._descriptors, self._owner = OrderedDict(), os.getpid()
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            if len(self._descriptors) >= MAX_OPEN_SHARDS:
                os.close(self._descriptors.popitem(last=False)[1])
            path = self._copy(shard) if is_url(self.places[shard]) else self.places[shard]
            descriptor = self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        else:
            self._descriptors.move_to_end(shard)
        return descriptor

    def _copy(self, shard: int) -> Path:
        """A local copy of a shard, named by its digest, so that runs and corpora share it and a name vouches for its bytes.

        Raises:
            ValueError: what came is not what the index says; it is not asked for again.
        """
        assert self._cache is not None
        if shard in self._faults:
            raise ValueError(self._faults[shard])
        path = self._cache / f"{self._digests[shard]}.tar"
        if path.is_file():
            return path
        self._cache.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        files, source = file_system(str(self.places[shard]))
        try:
            retried(lambda: files.get_file(source, str(part)))
            got = sha256_of(part)
            if got != self._digests[shard]:
                self._faults[shard] = f"sha256 {got[:12]}, the index says {self._digests[shard][:12]}; upload it again"
                raise ValueError(self._faults[shard])
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return path


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, this process's own (its connections do not survive a fork), and the path in it.

    Raises:
        ValueError: the protocol is not known, or what serves it is not installed.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: {error}; `pip install s3fs` for s3://, huggingface-hub brings hf://") from error
    return files, path.rstrip("/")


def retried(read: Callable[[], _Result]) -> _Result:
    """What `read` gives; a failing connection is tried again, a missing file is not."""
    for pause_s in RETRY_AFTER_S:
        try:
            return read()
        except FileNotFoundError:
            raise
        except Exception:  # each file system has exceptions of its own
            time.sleep(pause_s)
    return read()
