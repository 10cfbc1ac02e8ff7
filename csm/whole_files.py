"""Writes a text file whole or not at all: readers, and a run that goes on after a kill, never see half of one."""

from __future__ import annotations

import os
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text beside its place, then rename it. Not flushed to disk: that is for whoever has to outlive a power loss."""
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
