"""Recordings inside tars (WebDataset shards): read in place, never extracted. `calls.tar/0001.wav` is a path like any other.

Only plain members with a name inside of the tar are ever opened; what else a tar can hold is refused by `members_of`.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from data_prep.failures import Rejected

SUFFIX = ".tar"
_PICKLES = frozenset(".pkl .pickle .pyd .pt .pth .ckpt .joblib".split())


@dataclass
class Member:
    """A member of a tar: `refused` says why it is not to be read, or None; offset and size are of its bytes."""

    name: str
    offset: int
    size: int
    refused: Rejected | None = None


def members_of(path: Path) -> list[Member]:
    """What a tar holds, folders aside, in its order.

    Raises:
        Rejected: "not_audio" if it is no tar, "truncated" if it ends early, "unreadable".
    """
    return list(_index(path, *_size_and_time(path)))


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise Rejected("unreadable", f"{error.strerror or error}") from error
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _by_name(path: Path, num_bytes: int, changed_ns: int) -> dict[str, Member]:
    """The first member of each name: a tar of many is not gone through for each of them."""
    return {PurePosixPath(member.name).as_posix(): member for member in reversed(_index(path, num_bytes, changed_ns))}


@lru_cache(maxsize=64)
def _index(path: Path, num_bytes: int, _changed_ns: int) -> tuple[Member, ...]:
    if not os.path.isfile(path):
        raise Rejected("not_a_file", "expected a tar, this is a folder, a pipe or a device")
    found: list[Member] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if entry.isdir():
                    continue
                why = _why_refused(entry, seen)
                seen.add(entry.name)
                if why is None and entry.offset_data + entry.size > num_bytes:
                    why = Rejected("truncated", "the tar ends inside of it")
                name = os.fsencode(entry.name).decode("utf-8", errors="backslashreplace")
                found.append(Member(name, entry.offset_data, entry.size, why))
    except tarfile.ReadError as error:
        if not found:
            raise Rejected("empty" if num_bytes == 0 else "not_audio", f"not a plain tar ({error})") from error
        found.append(Member("", 0, 0, Rejected("truncated", f"the tar is damaged behind {found[-1].name} ({error})")))
    except OSError as error:
        raise Rejected("unreadable", f"{error.strerror or error}") from error
    return tuple(found)


def _why_refused(entry: tarfile.TarInfo, seen: set[str]) -> Rejected | None:
    name = PurePosixPath(entry.name)
    if not entry.isreg() or entry.issparse():
        return Rejected("not_a_file", "a link, a device or a sparse file in a tar; only plain members are read")
    if name.is_absolute() or ".." in name.parts or "\0" in entry.name:
        return Rejected("outside", "a member whose name leads out of the tar")
    if name.suffix.lower() in _PICKLES:
        return Rejected("pickle", "pickles run code when they are read, so none is")
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return Rejected("bad_name", "its name is not UTF-8")
    return Rejected("same_name", "the tar has a member of this name before") if entry.name in seen else None


def tar_above(path: Path) -> Path | None:
    """The tar that a path leads into, or None."""
    if f"{SUFFIX}/" not in os.fspath(path):  # nearly every path, several times a recording
        return None
    return next((parent for parent in path.parents if parent.suffix == SUFFIX and os.path.isfile(parent)), None)


def size_of(path: Path) -> int:
    """Bytes of a file or a member.

    Raises:
        OSError, Rejected: as `opened` does.
    """
    tar = tar_above(path)
    return path.stat().st_size if tar is None else _member(tar, path).size


def opened(path: Path) -> BinaryIO:
    """A file, or a member of a tar, for reading from anywhere in it.

    Raises:
        OSError: if it cannot be opened.
        Rejected: if the tar has no such member, or it is refused.
    """
    tar = tar_above(path)
    if tar is None:
        return path.open("rb")
    member = _member(tar, path)
    return cast(BinaryIO, io.BufferedReader(_Window(tar, member.offset, member.size)))


def _member(tar: Path, path: Path) -> Member:
    wanted = path.relative_to(tar).as_posix()
    found = _by_name(tar, *_size_and_time(tar)).get(wanted)
    if found is None:
        raise Rejected("missing", f"{tar.name} has no member {wanted!r}")
    if found.refused is not None:
        raise found.refused
    return found


def text_of(tar: Path, member: Member, max_bytes: int) -> str:
    """A text member.

    Raises:
        Rejected: "bad_text" if it is long or not UTF-8.
    """
    if member.size > max_bytes:
        raise Rejected("bad_text", f"{member.name} has more than {max_bytes} bytes; is it a transcript?")
    with _Window(tar, member.offset, member.size) as stream:
        content = stream.read()
    try:
        return (content or b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"{member.name} is not UTF-8 ({error.reason} at byte {error.start})") from error


def by_key(members: list[Member]) -> Iterator[tuple[str, list[Member]]]:
    """Members of one name up to its first dot, as WebDataset groups them."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        name = PurePosixPath(member.name)
        groups.setdefault(str(name.parent / name.name.split(".", 1)[0]), []).append(member)
    yield from groups.items()


class _Window(io.RawIOBase):
    """A stretch of a file as a file of its own."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._place = path.open("rb"), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer
        self._file.seek(self._offset + self._place)
        content = self._file.read(max(0, min(len(buffer), self._size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
