"""Verdicts kept as they are found, so that an evaluation that was killed goes on where it was."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import IO

from csm.evaluation.judging import Verdict


class Journal:
    """A file beside the results: its first line says what is being evaluated, every other holds a verdict.

    A journal of something else (other weights, lines, settings or evaluators) is started anew. A line that a kill cut short is
    cut off. Safe to append to from several threads.

    Attributes:
        found: verdicts of an earlier start by (row, key), whose clips are there.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "verdicts.partial.jsonl"
        self.found: dict[tuple[str, str], Verdict] = {}
        self._lock = threading.Lock()
        size = self._read(identity) if self.path.is_file() else 0
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._file.truncate(size)
        if size == 0:
            self.found = {}
            self._write({"identity": identity})

    def _read(self, identity: str) -> int:
        """Take in what is whole; returns its bytes, 0 for a journal of something else."""
        size = 0
        for index, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                record = None
            if record is None:
                break
            if index == 0 and record != {"identity": identity}:
                return 0
            if index:
                verdict = Verdict(**record)
                if not verdict.wav or (self.path.parent / verdict.wav).is_file():
                    self.found[verdict.row, verdict.key] = verdict
            size += len(line)
        return size

    def add(self, verdict: Verdict) -> None:
        """Keep a verdict; it is on the disk when this returns."""
        self._write(asdict(verdict))

    def _write(self, record: dict) -> None:
        with self._lock:
            self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self, *, is_done: bool) -> None:
        """Let go of the file; once the results are written there is nothing to go on from."""
        self._file.close()
        if is_done:
            self.path.unlink()
