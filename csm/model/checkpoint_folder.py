"""A checkpoint folder that is whole, or known not to be: written beside its place, its manifest last, then renamed.

`step_000200.tmp` becomes `step_000200` when every file is on disk, so a folder under its final name is whole; reading it
compares every file with `manifest.json` all the same. `last.txt` and `best.txt` beside the folders name one of them.
What the files hold is others' business: any writer (one process, or many with a shard each) publishes through here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csm.whole_files import write_text

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # the first had neither step and world size nor a digest of its own
_PREFIX, _UNFINISHED, _SET_ASIDE = "step_", ".tmp", "set_aside_"
_CHUNK_BYTES = 1 << 22  # between two chunks a thread asks for the interpreter, which training holds: few and large ones
Say = Callable[[str], None]
_digests: dict[tuple[str, int, int, int], str] = {}


def checkpoint_name(step: int) -> str:
    return f"{_PREFIX}{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name.

    Raises:
        ValueError: if the name does not end in one.
    """
    digits = folder.name.rpartition("_")[2]
    if not digits.isdigit():
        raise ValueError(f"{folder}: the name of a checkpoint folder ends in its step, as {checkpoint_name(200)} does")
    return int(digits)


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(found, key=checkpoint_step)


def open_part(folder: Path) -> Path:
    """An empty `<folder>.tmp` to write a checkpoint's files into; `publish` makes it `folder`."""
    part = folder.with_name(folder.name + _UNFINISHED)
    if part.exists():
        shutil.rmtree(part)  # left by a run that was killed
    part.mkdir(parents=True)
    return part


def publish(part: Path, folder: Path, *, step: int, world_size: int, digests: Mapping[str, str] | None = None) -> None:
    """Give a written part its final name, once everything in it is on disk.

    Args:
        part: from `open_part`, every file written; nobody writes to it any more.
        folder: where it belongs; a folder that is there (a damaged one, which a resumed run went behind) is replaced.
        world_size: processes whose state the folder holds.
        digests: sha256 of files hashed elsewhere, by name relative to `part`; the others are hashed here.
    Raises:
        OSError: if the disk is full or the like; `folder` is then as it was before.
    """
    known = dict(digests or {})
    files = sorted(file for file in part.rglob("*") if file.is_file())
    names = [file.relative_to(part).as_posix() for file in files]
    missing = sorted(set(known) - set(names))
    if missing:
        raise ValueError(f"{part}: a digest was given for {missing[0]}, which is not there")
    entries = {
        name: {"num_bytes": file.stat().st_size, "sha256": known.get(name) or file_digest(file)}
        for name, file in zip(names, files, strict=True)
    }
    manifest = {"format_version": FORMAT_VERSION, "step": step, "world_size": world_size, "files": entries}
    write_text(part / MANIFEST, json.dumps({**manifest, "sha256": _own_digest(manifest)}, indent=1) + "\n")
    for path in [*files, part / MANIFEST, *(path for path in part.rglob("*") if path.is_dir()), part]:
        flush(path)
    replaced = folder.with_name(f"{folder.name}.old{_UNFINISHED}")
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(part, folder)
    flush(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest: `step`, `world_size` and `files` (name -> `num_bytes`, `sha256`).

    Raises:
        ValueError: if it is missing, unreadable, edited or of another step; the message does not name the folder.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format_version"], manifest["files"]
        if version in _READABLE_VERSIONS:
            listed = {str(name): (int(entry["num_bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except KeyError as error:
        raise ValueError(f"{MANIFEST} cannot be read (it has no {error})") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from error
    if version not in _READABLE_VERSIONS:
        raise ValueError(f"{MANIFEST} has format version {version}, this program reads {FORMAT_VERSION}")
    if version == 1:
        manifest = {**manifest, "step": checkpoint_step(folder), "world_size": 1}
    elif manifest.get("sha256") != _own_digest({key: value for key, value in manifest.items() if key != "sha256"}):
        raise ValueError(f"{MANIFEST} was changed after it was written: its own sha256 differs")
    elif folder.name.startswith(_PREFIX) and checkpoint_name(manifest["step"]) != folder.name:
        raise ValueError(f"{MANIFEST} is of step {manifest['step']}, the folder's name is {folder.name}")
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in listed):
        raise ValueError(f"{MANIFEST} names a file outside the folder")
    return manifest


def find_fault(folder: Path, *, is_quick: bool = False, names: Callable[[str], bool] | None = None) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as its manifest says.

    Args:
        is_quick: compare sizes only, and leave the files unread.
        names: says of each file's name whether it matters; None: all do.
    """
    try:
        files = read_manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, entry in files.items():
        path = folder / name
        if names is not None and not names(name):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['num_bytes']}"
        if not is_quick and _digest_once(path) != entry["sha256"]:
            return f"{name} differs from the manifest's sha256"
    return None


def refuse_unusable(folder: Path) -> None:
    """Check every file of a checkpoint that training is to go on from.

    Raises:
        ValueError: names the file and what is wrong with it.
    """
    fault = find_fault(folder)
    if fault is not None:
        raise ValueError(f"{folder}: not usable, {fault}; resume=auto takes the newest checkpoint that is whole")


def newest_valid_checkpoint(folder: Path, say: Say = print, *, names: Callable[[str], bool] | None = None) -> Path | None:
    """The newest checkpoint whose files (those that `names` tells, or all) are as written; says which newer ones are not, and why."""
    for path in reversed(list_checkpoints(folder)):
        fault = find_fault(path, names=names)
        if fault is None:
            return path
        say(f"{path}: not usable, {fault}; trying the one before")
    return None


def write_pointer(folder: Path, name: str, checkpoint: Path) -> None:
    """Let `<folder>/<name>.txt` (last, best) name a checkpoint."""
    write_text(folder / f"{name}.txt", checkpoint.name + "\n")


def remove_checkpoint(folder: Path) -> None:
    """Delete a folder; renamed first, so that half a deletion is never taken for a checkpoint."""
    doomed = folder.with_name(f"{folder.name}.old{_UNFINISHED}")
    if folder.exists():
        os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path, say: Say = print) -> None:
    """Delete what killed writers left in a run's `checkpoints` folder, and say so."""
    for path in sorted(folder.glob(f"*{_UNFINISHED}")):
        say(f"{path}: removed, left half written by a run that was killed")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside_newer(folder: Path, step: int, say: Say = print) -> None:
    """Rename whole checkpoints after `step`, which a run goes back behind, or resume=auto would take the newest of them."""
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > step and find_fault(path, is_quick=True) is None:
            aside = path.with_name(f"{_SET_ASIDE}{path.name}")
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(path, aside)
            say(f"{path} is newer than step {step}: set aside as {aside.name}, delete it or go on from it with resume={aside}")


def file_digest(path: Path) -> str:
    """sha256 of a file, as hexadecimal digits."""
    digest, chunk = hashlib.sha256(), bytearray(_CHUNK_BYTES)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(memoryview(chunk)[:size])
    return digest.hexdigest()


def _digest_once(path: Path) -> str:
    """`file_digest`, read once in a process as long as the file stays: a checkpoint is found, checked, then loaded."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    if key not in _digests:
        _digests[key] = file_digest(path)
    return _digests[key]


def flush(path: Path) -> None:
    """Make the kernel write a file's, or a folder's, content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
