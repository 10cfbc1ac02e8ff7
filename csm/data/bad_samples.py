"""Counts, names and keeps in a file the samples that a run could not use, and stops it above a share of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from csm.whole_files import write_text

NUM_BAD_NAMED = 20  # bad samples that a run names in its log
Position = tuple[int, int]  # epoch, and the batch of it that was next when a sample was found to be bad

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuarantineEntry:
    """A line of `quarantine.jsonl`: a sample, or a whole shard.

    Attributes:
        shard: path or URL of the tar.
        sample: its key; None for all samples of the shard.
        num_samples: how many this line counts.
        epoch, batch: where training stood; None for what was found when the data were opened.
    """

    shard: str
    sample: str | None
    num_samples: int
    reason: str
    epoch: int | None = None
    batch: int | None = None


class BadSamples:
    """Samples of one split that cannot be used.

    Args:
        num_samples: of the split.
        max_share: above it `add` stops the run.
        name_of: (shard, key) of a sample; None where samples have numbers only.

    Attributes:
        reasons: by sample.
    """

    def __init__(self, num_samples: int, max_share: float, name_of: Callable[[int], tuple[str, str]] | None = None) -> None:
        self.num_samples, self.max_share = num_samples, max_share
        self.reasons: dict[int, str] = {}
        self._name_of = name_of
        self._entries: list[QuarantineEntry] = []
        self._path: Path | None = None
        self._written: set[tuple[str, str | None]] = set()

    def add(self, sample_index: int, reason: str, at: Position | None = None) -> None:
        """Quarantine a sample.

        Raises:
            ValueError: more than `max_share` of all samples are bad; names the first.
        """
        if sample_index in self.reasons:
            return
        shard, key = self._name_of(sample_index) if self._name_of is not None else ("", str(sample_index))
        self._add(range(sample_index, sample_index + 1), QuarantineEntry(shard, key, 1, reason, *(at or (None, None))))

    def add_shard(self, samples: range, reason: str) -> None:
        """Quarantine all samples of a shard.

        Raises:
            ValueError: more than `max_share` of all samples are bad; names the first.
        """
        if all(sample in self.reasons for sample in samples):
            return
        shard = self._name_of(samples.start)[0] if self._name_of is not None else ""
        self._add(samples, QuarantineEntry(shard, None, len(samples), reason))

    def keep_in(self, path: Path) -> None:
        """Append what was and will be found to a file, one JSON line each, nothing twice.

        The file of a run that goes on is kept. A line that is cut, as a killed run may leave it, is dropped.
        """
        earlier = _read(path)
        self._path = path
        self._written = {(entry.shard, entry.sample) for entry in earlier}
        if path.is_file() and not path.read_bytes().endswith(b"\n"):
            write_text(path, "".join(_line(entry) for entry in earlier))
        for entry in self._entries:
            self._append(entry)

    def resume(self, position: Position, find: Callable[[str, str], int | None]) -> None:
        """Take over from the file what was found before a position, so that a run that goes on counts as one that never stopped.

        Args:
            find: the sample of a (shard, key), None when there is none.
        """
        for entry in _read(self._path) if self._path is not None else []:
            if entry.sample is None or entry.epoch is None or entry.batch is None or (entry.epoch, entry.batch) > position:
                continue
            sample_index = find(entry.shard, entry.sample)
            if sample_index is not None:
                self.reasons.setdefault(sample_index, entry.reason)

    def _add(self, samples: range, entry: QuarantineEntry) -> None:
        self.reasons |= {sample: entry.reason for sample in samples if sample not in self.reasons}
        self._entries.append(entry)
        if len(self._entries) <= NUM_BAD_NAMED:
            what = "a bad sample" if entry.sample is not None else f"a bad shard of {entry.num_samples} samples"
            and_on = "; more will only be counted" if len(self._entries) == NUM_BAD_NAMED else ""
            _log.warning("left out %s (%d samples so far): %s%s", what, len(self.reasons), entry.reason, and_on)
        if self._path is not None:
            self._append(entry)
        if len(self.reasons) > self.max_share * self.num_samples:
            raise ValueError(
                f"{len(self.reasons)} of {self.num_samples} samples are bad, more than data.max_bad_share={self.max_share}; "
                f"repair them or raise it; the first: {next(iter(self.reasons.values()))}"
            )

    def _append(self, entry: QuarantineEntry) -> None:
        assert self._path is not None
        if (entry.shard, entry.sample) in self._written:
            return
        self._written.add((entry.shard, entry.sample))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(entry))


def _line(entry: QuarantineEntry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False) + "\n"


def _read(path: Path) -> list[QuarantineEntry]:
    entries: list[QuarantineEntry] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entries.append(QuarantineEntry(**json.loads(line)))
            except (ValueError, TypeError):
                continue
    return entries
