"""Input that lies elsewhere is brought into `<output>/prep/input`, whole files under their own names: every stage reads them there.

URLs are opened by fsspec (`s3://`, `gs://`, `https://`, `memory://`, ...): a folder, a tar or a table; and the recordings that a
manifest names by URLs. Hugging Face data sets are `hf_dataset`'s business. What is there already, and has not changed, is not
fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from csm.config import DatasetConfig
from csm.data.storage import file_system, is_url, retried
from data_prep.decode import SUFFIXES
from data_prep.failures import Failure, Rejected
from data_prep.hf_dataset import is_dataset, write_tars
from data_prep.inputs import MANIFEST_NAME, METADATA_NAME
from data_prep.shard import write_atomic
from data_prep.tars import SUFFIX

_WANTED = SUFFIXES | {SUFFIX, ".txt"}
_STAMPS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created")  # what file systems tell changes by
_URLS = "urls"  # folder of what a manifest names by URLs


def is_elsewhere(place: str) -> bool:
    """Whether `input=` is a URL, a Hugging Face data set, or a local manifest that names URLs."""
    return is_dataset(place) or is_url(place) or _manifest_with_urls(place) is not None


def fetch(place: str, folder: Path, config: DatasetConfig) -> list[Failure]:
    """Bring `input=` into a folder that `Input.find` understands.

    Returns:
        What could not be had, a row a file.
    Raises:
        ValueError: if nothing is there, or what serves it is not installed.
    """
    record = folder.with_suffix(".json")
    told = _read(record)
    name = hashlib.sha256(place.encode()).hexdigest()  # a URL may hold a password
    if told.get("input") != name:
        shutil.rmtree(folder, ignore_errors=True)
        told = {}
    folder.mkdir(parents=True, exist_ok=True)
    if is_dataset(place):
        files, failures = write_tars(place, folder, config, told.get("files", {}))
    elif is_url(place):
        files, failures = _fetch_url(place, folder, told.get("files", {}))
    else:
        manifest = _manifest_with_urls(place)
        assert manifest is not None
        files, failures = _fetch_manifest(manifest, folder, told.get("files", {}))
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in files:
            path.unlink()
    if {"input": name, "files": files} != told:
        write_atomic(record, json.dumps({"input": name, "files": files}).encode())
    return failures


def _fetch_url(url: str, folder: Path, known: dict[str, Any]) -> tuple[dict[str, Any], list[Failure]]:
    store, root = file_system(url)
    found: dict[str, dict[str, Any]] = {}
    try:
        is_file = retried(partial(store.isfile, root))
        if is_file:
            found[PurePosixPath(root).name] = retried(partial(store.info, root))
        else:
            for path, info in retried(partial(store.find, root, detail=True)).items():
                name = str(path).removeprefix(root).lstrip("/")
                if PurePosixPath(name).suffix.lower() in _WANTED or name in (MANIFEST_NAME, METADATA_NAME):
                    found[name] = info
        tables = {name: retried(partial(store.cat_file, info["name"])) for name, info in found.items() if name.endswith(".jsonl")}
    except Exception as error:  # each file system has exceptions of its own
        raise ValueError(f"input={_without_secrets(url)}: cannot be read ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"input={_without_secrets(url)}: nothing there; expected a folder of recordings, a tar or a {MANIFEST_NAME}")
    files: dict[str, Any] = {}
    failures: list[Failure] = []
    for name, info in sorted(found.items()):
        if name not in tables:
            _fetch_one(store, info, name, folder, known, files, failures)
    for content in tables.values():
        _fetch_named(content.decode("utf-8-sig"), folder, known, files, failures, base=url.rsplit("/", 1)[0] if is_file else None)
    return files, failures


def _fetch_manifest(manifest: Path, folder: Path, known: dict[str, Any]) -> tuple[dict[str, Any], list[Failure]]:
    """A local manifest that names URLs: local recordings are linked, the others fetched."""
    files: dict[str, Any] = {}
    failures: list[Failure] = []
    text = manifest.read_text(encoding="utf-8-sig")
    for name in filter(None, map(_audio_of, text.split("\n"))):
        if is_url(name) or not _is_inside(name) or not (manifest.parent / name).exists():
            continue  # whoever reads the manifest says what is wrong
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to((manifest.parent / name).resolve())
        files[link.relative_to(folder).as_posix()] = None
    _fetch_named(text, folder, known, files, failures)
    return files, failures


def _fetch_named(
    text: str, folder: Path, known: dict[str, Any], files: dict[str, Any], failures: list[Failure], base: str | None = None
) -> None:
    """Fetch what the lines of a manifest name by URLs, and write the manifest with the names of the copies.

    Args:
        base: URL that other names are relative to; None leaves them alone.
    """
    lines = []
    for line in text.split("\n"):
        name = _audio_of(line)
        url = name if name is not None and is_url(name) else None
        if url is not None:
            path = PurePosixPath(url.split("?")[0].split("#")[0])
            name = f"{_URLS}/{hashlib.sha256(url.encode()).hexdigest()[:12]}/{path.name}"
        elif base is not None and name is not None and _is_inside(name):
            url = f"{base}/{name}"
        if url is not None and name is not None:
            try:
                store, source = file_system(url)
                info = retried(partial(store.info, source))
            except Exception as error:  # each file system has exceptions of its own
                why = Rejected("missing", f"{type(error).__name__}: {_without_secrets(url)} cannot be had")
                failures.append(Failure.of(_without_secrets(url), "manifest", why))
                continue
            if not _fetch_one(store, info, name, folder, known, files, failures):
                continue
            line = json.dumps({**json.loads(line), "audio": name}, ensure_ascii=False)
        lines.append(line)
    manifest, content = folder / MANIFEST_NAME, "\n".join(lines).encode()
    if not manifest.is_file() or manifest.read_bytes() != content:  # its time of change is looked at
        write_atomic(manifest, content)
    files[MANIFEST_NAME] = None


def _fetch_one(
    store: Any, info: dict[str, Any], name: str, folder: Path, known: dict[str, Any], files: dict[str, Any], failures: list[Failure]
) -> bool:
    """One file, unless it is there and its stamp says that it is the same; whether it is there now."""
    if not _is_inside(name):
        failures.append(Failure.of(name, "manifest", Rejected("outside", "a name that leads out of the folder")))
        return False
    target, stamp = folder / name, [info.get("size"), next((str(info[key]) for key in _STAMPS if info.get(key)), None)]
    if not (target.is_file() and stamp[1] is not None and known.get(name) == stamp):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".tmp")
        try:
            retried(partial(store.get_file, info["name"], str(part)))
            os.replace(part, target)
        except Exception as error:  # each file system has exceptions of its own
            part.unlink(missing_ok=True)
            failures.append(Failure.of(name, "manifest", Rejected("missing", f"{type(error).__name__}: it cannot be had")))
            return False
    files[name] = stamp
    return True


def _manifest_with_urls(place: str) -> Path | None:
    if is_dataset(place) or is_url(place):
        return None
    path = Path(place)
    path = path / MANIFEST_NAME if path.is_dir() else path
    if path.suffix != ".jsonl" or not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        return path if any("://" in line and is_url(_audio_of(line) or "") for line in lines) else None


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _audio_of(line: str) -> str | None:
    """What a manifest's line names; None where it cannot be told: whoever reads the manifest says why."""
    try:
        row = json.loads(line)
        name = row.get("audio") if isinstance(row, dict) else None
    except (ValueError, RecursionError):
        return None
    return name if isinstance(name, str) and name and "\0" not in name else None


def _without_secrets(url: str) -> str:
    scheme, _, rest = url.split("?")[0].partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}
