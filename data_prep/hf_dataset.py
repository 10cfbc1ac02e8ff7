"""`input=hf:<name or folder>`: a Hugging Face data set with an audio column becomes tars of recordings, each with its text.

The audio's bytes stay as they are in the data set; nothing is decoded here. A tar of some hundred recordings is a file that every
stage reads in place, as it reads WebDataset shards of others.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from csm.config import DatasetConfig
from data_prep.decode import SUFFIXES
from data_prep.failures import Failure, Rejected

PREFIX = "hf:"
MAX_TAR_BYTES = 256 * 2**20
TEXT_COLUMNS = ("text", "transcription", "transcript", "sentence", "normalized_text")
SPEAKER_COLUMNS = ("speaker_name", "speaker_id", "speaker", "client_id")
OTHER_COLUMNS = ("license", "language")
_ROWS_AT_ONCE = 64
_MAGIC = ((b"RIFF", ".wav"), (b"fLaC", ".flac"), (b"OggS", ".ogg"), (b"ID3", ".mp3"), (b"\xff\xfb", ".mp3"), (b"\xff\xf3", ".mp3"))


def is_dataset(place: str) -> bool:
    """Whether `input=` names a data set; `hf://` is a URL of fsspec's."""
    return place.startswith(PREFIX) and not place.startswith(f"{PREFIX}//")


def write_tars(place: str, folder: Path, config: DatasetConfig, known: dict[str, Any]) -> tuple[dict[str, Any], list[Failure]]:
    """Write `<split>-00000.tar`, ... of a data set into a folder, unless they are there of the same data and columns.

    Args:
        known: what this returned before, of the files that are in the folder.
    Returns:
        file -> what it was made of; and rows that hold no audio.
    Raises:
        ValueError: no such data set, split or column, or `datasets` is not installed.
    """
    data, columns = _open(place.removeprefix(PREFIX), config)
    told = [data._fingerprint, columns, config.split]  # of the data set and all that was done to it; datasets' own name for a state
    if known and all(value["made_of"] == told and (folder / name).is_file() for name, value in known.items()):
        return known, [Failure(**row) for value in known.values() for row in value["failures"]]
    files: dict[str, Any] = {}
    failures: list[Failure] = []
    writer: _TarWriter | None = None
    for index, row in enumerate(_rows(data)):
        name = f"{config.split}-{index:08d}"
        try:
            content, suffix = _audio(row[columns["audio"]])
        except Rejected as error:
            failures.append(Failure.of(name, "manifest", error))
            continue
        if writer is None or writer.num_bytes + len(content) > MAX_TAR_BYTES:
            if writer is not None:
                files[writer.close()] = None
            writer = _TarWriter(folder / f"{config.split}-{len(files):05d}.tar")
        writer.add(f"{name}{suffix}", content)
        about = {key: str(row[column]) for key, column in columns.items() if key != "audio" and row[column] is not None}
        writer.add(f"{name}.json", json.dumps(about, ensure_ascii=False).encode())
    if writer is None:
        raise ValueError(f"input={place}: split {config.split} holds no audio")
    files[writer.close()] = None
    rows = [failure.row() for failure in failures]
    return {name: {"made_of": told, "failures": rows if not number else []} for number, name in enumerate(files)}, failures


def _open(place: str, config: DatasetConfig) -> tuple[Any, dict[str, str]]:
    """(the split, which column is what), the audio as stored bytes."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("input=hf:...: Hugging Face data sets are read by `datasets`; run `pip install datasets`") from error
    folder = Path(place)
    try:
        if folder.is_dir() and any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(place)
        elif folder.is_file() or (folder.is_dir() and any(folder.glob("*.parquet"))):
            paths = [str(folder)] if folder.is_file() else sorted(str(path) for path in folder.glob("*.parquet"))
            data = datasets.load_dataset("parquet", data_files={config.split: paths}, split=config.split)
        else:
            data = datasets.load_dataset(place, config.name, split=config.split, revision=config.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"input=hf:{place}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise ValueError(f"input=hf:{place}: no split {config.split!r}; dataset.split is one of {', '.join(data)}")
        data = data[config.split]
    columns = _columns(place, data.features, config, datasets.Audio)
    data = data.select_columns(sorted(set(columns.values())))
    return data.cast_column(columns["audio"], datasets.Audio(decode=False)), columns


def _columns(place: str, features: dict[str, Any], config: DatasetConfig, audio_type: type) -> dict[str, str]:
    for key in ("audio", "text", "speaker"):
        wanted = getattr(config, key)
        if wanted is not None and wanted not in features:
            raise ValueError(f"dataset.{key}={wanted}: {place} has no such column; it has {', '.join(features)}")
    audio = config.audio or next((name for name, feature in features.items() if isinstance(feature, audio_type)), None)
    if audio is None:
        raise ValueError(f"input=hf:{place}: no audio column among {', '.join(features)}; name it by dataset.audio=")
    text = config.text or next((name for name in TEXT_COLUMNS if name in features), None)
    speaker = config.speaker or next((name for name in SPEAKER_COLUMNS if name in features), None)
    found = {"audio": audio, "text": text, "speaker_name": speaker, **{name: name for name in OTHER_COLUMNS if name in features}}
    return {key: column for key, column in found.items() if column is not None}


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    for batch in data.iter(_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _audio(stored: Any) -> tuple[bytes, str]:
    """(bytes, suffix) of a cell: the bytes in it, or those of the file it names."""
    stored = stored if isinstance(stored, dict) else {}
    path, content = stored.get("path"), stored.get("bytes")
    if content is None and path and Path(path).is_file():
        content = Path(path).read_bytes()
    if not content:
        raise Rejected("missing", "the row has no audio" if not path else f"the row names {path!r}, and no such file is here")
    suffix = PurePosixPath(path or "").suffix.lower()
    if suffix not in SUFFIXES:
        suffix = next((ending for magic, ending in _MAGIC if content.startswith(magic)), ".wav")  # decoders look at the bytes
    return content, suffix


class _TarWriter:
    """A tar whose bytes depend on its members alone."""

    def __init__(self, path: Path) -> None:
        self.path, self.num_bytes = path, 0
        self._part = path.with_name(path.name + ".tmp")
        self._tar = tarfile.open(self._part, "w", format=tarfile.PAX_FORMAT)

    def add(self, name: str, content: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        self._tar.addfile(info, io.BytesIO(content))
        self.num_bytes += len(content)

    def close(self) -> str:
        self._tar.close()
        os.replace(self._part, self.path)
        return self.path.name
