"""Input forms: which recordings there are, and for `prep=turns` who says what in them.

Four forms: a folder of recordings with a text of the same name beside each; a folder with `metadata.csv` (LJSpeech); a
`manifest.jsonl`; tars (WebDataset shards), alone or in a folder of recordings. Each gives candidates, which `probe` turns into
manifest lines by reading the files themselves. Nothing outside of the input folder is named by a path, though a link in it may
lead outside.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import tars
from data_prep.decode import SUFFIXES, read_header
from data_prep.failures import Failure, Rejected
from data_prep.manifest import ManifestTurn, Recording, check_object, check_turns, file_digest, normalised

MANIFEST_NAME, METADATA_NAME = "manifest.jsonl", "metadata.csv"
MAX_TEXT_BYTES = 2**20


@dataclass
class Candidate:
    """A recording somebody named: its turns are known, its file has not been looked at. `where` is the line that names it."""

    source: str
    turns: list[ManifestTurn]
    license: str | None = None
    language: str | None = None
    where: str = ""


@dataclass
class _InputLine:
    """A line of a user's manifest.jsonl; `turns`, or the fields of its only turn, are allowed beside these."""

    audio: str
    license: str | None = None
    language: str | None = None


_TURN_KEYS = ("text", "speaker", "speaker_name", "channel", "start_s", "end_s", "emotion", "style")
_LABELS = ("emotion", "style")


@dataclass(frozen=True)
class Input:
    """Where recordings are read from. `table` is the manifest.jsonl or metadata.csv, or None for texts beside the audio."""

    root: Path
    table: Path | None
    with_texts: bool = True

    @classmethod
    def find(cls, path: Path, *, with_texts: bool = True) -> Input:
        """Tell which form `input=` has.

        Args:
            with_texts: whether every recording must say what is said in it; without, texts that are there are not looked at.

        Raises:
            FileNotFoundError: if there is nothing at the path.
            ValueError: if it is a file that is no manifest.
        """
        if path.is_file():
            if path.suffix not in (".jsonl", ".csv", tars.SUFFIX):
                raise ValueError(f"input={path}: a file must be a manifest (.jsonl), a table (.csv) or a tar; give the folder it lies in")
            return cls(path.parent, path, with_texts)
        if not path.is_dir():
            raise FileNotFoundError(f"input={path}: nothing there; expected a folder of recordings, {MANIFEST_NAME} or {METADATA_NAME}")
        for name in (MANIFEST_NAME, METADATA_NAME):
            if (path / name).is_file():
                return cls(path, path / name, with_texts)
        return cls(path, None, with_texts)

    def candidates(self) -> Iterator[Candidate | Failure]:
        """Recordings in a fixed order; what cannot be one, as a failure."""
        if self.table is None:
            return _from_folder(self.root, self.with_texts)
        if self.table.suffix == tars.SUFFIX:
            return _from_tar(self.table, self.root, self.with_texts)
        if self.table.suffix == ".jsonl":
            return _from_manifest(self.table, self.with_texts)
        return _from_metadata(self.table, self.with_texts)

    def listing(self) -> Iterator[str]:
        """A line a file that the candidates depend on: path, size, time of change. Equal listings, equal recordings."""
        if self.table is not None:
            status = self.table.stat()
            yield f"{self.table.name}\t{status.st_size}\t{status.st_mtime_ns}"
        for path in _walk(self.root):
            if path.suffix.lower() in SUFFIXES or path.suffix == tars.SUFFIX or (self.with_texts and path.suffix == ".txt"):
                yield json.dumps([os.fsencode(path.relative_to(self.root)).hex(), *_size_and_time(path)])


def probe(found: Candidate, root: Path) -> Recording | Failure:
    """Read a candidate's bytes and header: a manifest line, or why not."""
    path = root / found.source
    duration_s = 0.0
    try:
        header = read_header(path)
        duration_s = header.duration_s
        for turn in found.turns:
            if turn.channel is not None and turn.channel >= header.num_channels:
                raise Rejected("schema", f"a turn is on channel {turn.channel}, the file has {header.num_channels} channels")
        return Recording(
            file_digest(path), found.source, tars.size_of(path), round(duration_s, 3), found.turns, found.license, found.language
        )
    except Rejected as error:
        why = Rejected(error.reason, f"{found.where}: {error.detail}") if found.where else error
        return Failure.of(found.source, "manifest", why, duration_s=duration_s)


def _from_folder(root: Path, with_texts: bool) -> Iterator[Candidate | Failure]:
    seen: dict[Path, str] = {}
    for path in _walk(root):
        if os.path.isdir(path):  # pathlib raises where a link has an endless name
            yield Failure.of(_source(path, root), "manifest", Rejected("unreadable", "a folder without permission to read it"))
            continue
        if path.suffix == tars.SUFFIX and _is_utf8(path):
            yield from _from_tar(path, root, with_texts)
            continue
        if path.suffix.lower() not in SUFFIXES:
            continue
        source = _source(path, root)
        try:
            if not _is_utf8(path):
                raise Rejected("bad_name", "its name is not UTF-8; rename it")
            if not with_texts:
                yield Candidate(source, [])
                continue
            stem = path.with_suffix("")
            if stem in seen:
                raise Rejected("same_name", f"{seen[stem]} has the same name, and so the same text")
            seen[stem] = source
            name = path.parent.name if path.parent != root else None
            yield Candidate(source, [ManifestTurn(_text_beside(path), speaker_name=name)])
        except Rejected as error:
            yield Failure.of(source, "manifest", error)


def _from_tar(tar: Path, root: Path, with_texts: bool) -> Iterator[Candidate | Failure]:
    """Audio members of a WebDataset shard; what is said is in the .txt or .json member of the same key."""
    place = _source(tar, root)
    try:
        members = tars.members_of(tar)
    except Rejected as error:
        yield Failure.of(place, "manifest", error)
        return
    for member in members:
        if member.refused is not None:
            yield Failure.of(f"{place}/{member.name}".rstrip("/"), "manifest", member.refused)
    for _, group in tars.by_key([member for member in members if member.refused is None]):
        audio = [member for member in group if Path(member.name).suffix.lower() in SUFFIXES]
        for extra in audio[1:]:
            yield Failure.of(f"{place}/{extra.name}", "manifest", Rejected("same_name", f"{audio[0].name} has the same key"))
        if not audio:
            continue
        source = f"{place}/{audio[0].name}"
        try:
            yield _tar_candidate(tar, source, group, with_texts)
        except Rejected as error:
            yield Failure.of(source, "manifest", error)


def _tar_candidate(tar: Path, source: str, group: list[tars.Member], with_texts: bool) -> Candidate:
    texts = {
        Path(member.name).suffix: tars.text_of(tar, member, MAX_TEXT_BYTES) for member in group if member.name.endswith((".txt", ".json"))
    }
    told: dict[str, Any] = {}
    if ".json" in texts:
        try:
            told = json.loads(texts[".json"])
        except (json.JSONDecodeError, RecursionError) as error:
            raise Rejected("schema", f"its .json member is not JSON ({error})") from error
        if not isinstance(told, dict):
            raise Rejected("schema", f"its .json member is a {type(told).__name__}, expected an object")
    license, language = (value if isinstance(value := told.get(key), str) else None for key in ("license", "language"))
    if not with_texts:
        return Candidate(source, [], license, language)
    single = {
        key: told[key] for key in _TURN_KEYS if told.get(key) is not None and (key not in _LABELS or isinstance(told[key], str))
    }  # other keys are the shard maker's own
    if ".txt" in texts:
        single["text"] = normalised(texts[".txt"], "its .txt member")
    if "turns" not in told and not single.get("text"):
        raise Rejected("no_text", "no .txt member, and no text in a .json member, of its key")
    return Candidate(source, check_turns(told.get("turns", [single]), "its .json member"), license, language)


def _text_beside(path: Path) -> str:
    beside = path.with_suffix(".txt")
    try:
        if not beside.is_file():
            raise Rejected("no_text", f"no {beside.name} beside it")
        if beside.stat().st_size > MAX_TEXT_BYTES:
            raise Rejected("bad_text", f"{beside.name} has more than {MAX_TEXT_BYTES} bytes; is it a transcript?")
        text = normalised(beside.read_text(encoding="utf-8-sig"), beside.name)
    except UnicodeDecodeError as error:
        raise Rejected("bad_text", f"{beside.name} is not UTF-8 ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise Rejected("unreadable", f"{beside.name}: {error.strerror or error}") from error
    if not text:
        raise Rejected("no_text", f"{beside.name} is empty")
    return text


def _from_metadata(table: Path, with_texts: bool) -> Iterator[Candidate | Failure]:
    """LJSpeech's table: `id|text` or `id|text|text as read`, the recordings in `wavs/` or beside the table."""
    root = table.parent
    for number, line in _lines(table):
        fields = line.split("|")
        where = f"{table.name}:{number}"
        try:
            if not with_texts:
                yield Candidate(_recording_of(root, fields[0].strip(), where), [], where=where)
                continue
            if len(fields) < 2:
                raise Rejected("schema", f"{where} is {line[:60]!r}, expected id|text")
            text = normalised(fields[2] if len(fields) > 2 and fields[2].strip() else fields[1], where)
            if not text:
                raise Rejected("no_text", f"{where} has no text")
            yield Candidate(_recording_of(root, fields[0].strip(), where), [ManifestTurn(text)], where=where)
        except Rejected as error:
            yield Failure.of(where, "manifest", error)


def _recording_of(root: Path, name: str, where: str) -> str:
    if not name or not _is_inside(name):
        raise Rejected("outside", f"{where}: id {name!r}, expected the name of a recording in wavs/")
    for folder in ("wavs", ""):
        for suffix in ("", ".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"):
            source = f"{folder}/{name}{suffix}".lstrip("/")
            if Path(source).suffix.lower() in SUFFIXES and (root / source).is_file():
                return source
    raise Rejected("missing", f"{where}: no recording {name!r} in wavs/ or beside {METADATA_NAME}")


def _from_manifest(table: Path, with_texts: bool) -> Iterator[Candidate | Failure]:
    for number, line in _lines(table):
        where = f"{table.name}:{number}"
        source = where
        try:
            try:
                raw = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise Rejected("schema", f"{where} is not JSON ({error})") from error
            values = check_object(raw, _InputLine, where, more=("turns", *_TURN_KEYS))
            if not _is_inside(values["audio"]):
                raise Rejected("outside", f"{where}: audio {values['audio']!r} leads out of the manifest's folder; link it into the folder")
            source = os.path.normpath(values["audio"])
            if not with_texts:
                yield Candidate(source, [], values.get("license"), values.get("language"), where)
                continue
            single = {key: values[key] for key in _TURN_KEYS if key in values}
            if ("turns" in values) == bool(single):
                raise Rejected("schema", f"{where} needs either turns, or the text of its only turn")
            turns = check_turns(values["turns"] if "turns" in values else [single], where)
            yield Candidate(source, turns, values.get("license"), values.get("language"), where)
        except Rejected as error:
            yield Failure.of(source, "manifest", error)


def _lines(table: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines that hold something.

    Raises:
        ValueError: if the table is not UTF-8.
    """
    with table.open(encoding="utf-8-sig", newline="\n") as stream:
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{table}: not UTF-8 ({error.reason}); save it as UTF-8") from error


def _walk(root: Path) -> Iterator[Path]:
    """Every file below, in the order of names; a folder reached twice (a loop of links) is entered once."""
    entered: set[tuple[int, int]] = set()

    def visit(folder: Path) -> Iterator[Path]:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in entered:
                return
            entered.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError:  # no permission: its files cannot be named, the folder is
            yield folder
            return
        for entry in entries:
            try:
                is_folder = entry.is_dir()
            except OSError:
                is_folder = False
            if is_folder:
                yield from visit(Path(entry.path))
            else:
                yield Path(entry.path)

    return visit(root)


def _source(path: Path, root: Path) -> str:
    return os.fsencode(path.relative_to(root)).decode("utf-8", errors="backslashreplace")


def _is_utf8(path: Path) -> bool:
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, status.st_mtime_ns
