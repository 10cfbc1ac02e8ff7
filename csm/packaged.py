"""Files that installed packages carry, found without importing the packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path


def packaged_file(package: str, pattern: str) -> Path | None:
    """The first file of an installed distribution whose path ends as the pattern says; None if there is none, or no such package."""
    try:
        entries = files(package) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())) for entry in entries if entry.match(pattern)), None)
