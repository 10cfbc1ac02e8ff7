"""Which recording goes to which split and unit: functions of the recordings' digests, speakers and the seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from data_prep.manifest import Recording

TRAIN, VALIDATION = "train", "validation"


@dataclass
class Unit:
    """A piece of work that is done as a whole or again: some recordings of one split.

    Attributes:
        name: `<split>-<number>`.
        first_byte, last_byte: its lines [first, last) of the manifest.
        digest: sha256 of those lines.
    """

    name: str
    split: str
    first_byte: int
    last_byte: int
    digest: str
    num_recordings: int
    duration_s: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def split_recordings(recordings: Sequence[Recording], val_share: float, split_by: str, seed: int) -> tuple[list[Recording], str]:
    """The recordings of the validation split, in the order given, and how they were picked: "speaker" or "recording".

    A group (recordings tied together by named speakers, or one recording) is picked by the hash of its name, so that adding
    recordings moves no other; where none is picked, the group of the smallest hash is. "auto" keeps speakers apart where
    their recordings make up between half of the share asked for and twice that.

    Raises:
        ValueError: if split_by is "speaker" and all recordings hang together.
    """
    if val_share == 0 or len(recordings) < 2:
        return [], "recording"
    if split_by != "recording":
        groups = _groups_by_speaker(recordings)
        picked = _picked(groups, val_share, seed)
        total_s = sum(recording.duration_s for recording in recordings) or 1.0
        share = sum(recording.duration_s for recording in picked) / total_s
        if split_by == "speaker":
            if not picked:
                raise ValueError("split_by=speaker: all recordings share speakers, none can be kept apart; use split_by=recording")
            return _in_order(recordings, picked), "speaker"
        if val_share / 2 <= share <= val_share * 2:
            return _in_order(recordings, picked), "speaker"
    return _in_order(recordings, _picked({recording.digest: [recording] for recording in recordings}, val_share, seed)), "recording"


def _picked(groups: dict[str, list[Recording]], val_share: float, seed: int) -> list[Recording]:
    if len(groups) < 2:
        return []
    place = {name: uniform(seed, "split", name) for name in groups}
    names = [name for name in groups if place[name] < val_share] or [min(groups, key=place.__getitem__)]
    if len(names) == len(groups):
        names.remove(max(names, key=place.__getitem__))
    return [recording for name in names for recording in groups[name]]


def _in_order(recordings: Sequence[Recording], picked: Sequence[Recording]) -> list[Recording]:
    digests = {recording.digest for recording in picked}
    return [recording for recording in recordings if recording.digest in digests]


def _groups_by_speaker(recordings: Sequence[Recording]) -> dict[str, list[Recording]]:
    """Recordings tied by common speaker names, directly or through others; named after their first speaker, or a digest."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    nodes = []
    for recording in recordings:
        names = sorted({f"speaker {turn.speaker_name}" for turn in recording.turns if turn.speaker_name}) or [recording.digest]
        nodes.append(names[0])
        for name in names:
            first, second = sorted((root(names[0]), root(name)))
            parent[second] = first  # the smaller name stays on top, whatever the order
    groups: dict[str, list[Recording]] = {}
    for recording, node in zip(recordings, nodes, strict=True):
        groups.setdefault(root(node), []).append(recording)
    return groups


def uniform(seed: int, purpose: str, name: str) -> float:
    """A number in [0, 1) that depends on the arguments only."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}/{name}".encode()).digest()[:8], "big") / 2**64


def plan_units(lines: Sequence[tuple[str, Recording, str]], unit_min: float) -> list[Unit]:
    """Cut manifest lines, in the order they are written, into units of about `unit_min` minutes of audio, never across splits.

    Args:
        lines: (split, recording, line) of each.
    """
    units: list[Unit] = []
    counts: dict[str, int] = {}
    sha = hashlib.sha256()
    position = 0
    for split, recording, line in lines:
        encoded = line.encode()
        last = units[-1] if units else None
        if last is None or last.split != split or last.duration_s >= unit_min * 60:
            number = counts.get(split, 0)
            counts[split] = number + 1
            last = Unit(f"{split}-{number:06d}", split, position, position, "", 0, 0.0)
            units.append(last)
            sha = hashlib.sha256()
        sha.update(encoded)
        position += len(encoded)
        last.last_byte = position
        last.digest = sha.hexdigest()
        last.num_recordings += 1
        last.duration_s = round(last.duration_s + recording.duration_s, 3)
    return units
