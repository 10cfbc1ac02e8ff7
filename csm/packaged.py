"""Files that installed packages carry, found without importing the packages."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def packaged_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed distribution whose path ends as the pattern says; None if there is none, or no such package."""
    try:
        entries = files(package) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())) for entry in entries if entry.match(pattern)), None)


def check_digest(path: Path, expected: str, package: str) -> str:
    """The sha256 of a file that only its published bytes are opened of, for it may be a pickle.

    Args:
        package: what to install to have it.
    Raises:
        ValueError: if it is another file.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise ValueError(f"{path}: sha256 {digest[:16]}, expected {expected[:16]}; install {package}")
    return digest
