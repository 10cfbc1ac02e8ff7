"""The tables beside shards: a line a sample, with the place of each of its members in the tar."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from csm.data.index import ShardEntry, ShardIndex, index_advice
from csm.data.members import MEMBERS
from csm.data.storage import Folder, join

_NO_MEMBER = (-1, -1)  # offset and size


@dataclass
class SamplesTable:
    """A `.samples.jsonl` as columns: `counts` [n, 3] (frames, characters, seconds), `members` [n, len(MEMBERS), 2]."""

    keys: list[str]
    counts: np.ndarray
    members: np.ndarray


def read_tables(index: ShardIndex) -> tuple[list[SamplesTable], dict[str, str]]:
    """The table of every shard of a split, and, by shard, what is wrong where there is none.

    A shard without a usable table keeps its place: as many samples as the index says, none of which can be read.
    """
    tables, faults = [], {}
    contents = index.folder.read_many([shard.table_name for shard in index.shards])
    for shard, content in zip(index.shards, contents, strict=True):
        try:
            with _no_garbage_collection():
                tables.append(_parse_table(join(index.folder.place, shard.table_name), content, shard, index.folder))
        except (FileNotFoundError, ValueError) as error:
            faults[shard.name] = str(error)
            keys = [f"{shard.name}#{i}" for i in range(shard.num_samples)]
            members = np.full((shard.num_samples, len(MEMBERS), 2), -1, np.int64)
            tables.append(SamplesTable(keys, np.zeros((shard.num_samples, 3)), members))
    return tables, faults


def _parse_table(path: str | Path, content: bytes | Exception, entry: ShardEntry, folder: Folder) -> SamplesTable:
    if isinstance(content, FileNotFoundError):
        raise FileNotFoundError(f"{path}: not there, expected beside {entry.name}; {index_advice(folder)}") from content
    if isinstance(content, Exception):
        raise ValueError(f"{path}: {content}") from content
    try:
        # one parse for all lines: twice as fast as one for each
        lines: list[dict[str, Any]] = json.loads(b"[" + b",".join(content.splitlines()) + b"]")
        if len(lines) != entry.num_samples:
            raise ValueError(f"{len(lines)} lines, the index says {entry.num_samples} samples")
        keys = [line["key"] for line in lines]
        counts = np.array([(line["num_frames"], line["num_characters"], line["duration_s"]) for line in lines], dtype=np.float64)
        places = [[line["members"].get(member, _NO_MEMBER) for member in MEMBERS] for line in lines]
        members = np.array(places, dtype=np.int64).reshape(-1, len(MEMBERS), 2)
        if members.size and (members.sum(axis=2).max() > entry.num_bytes or members.min() < -1):
            raise ValueError(f"a member lies outside the shard's {entry.num_bytes} bytes")
        if counts.size and (int(counts[:, 0].sum()) != entry.num_frames or counts.min() < 0):
            raise ValueError(f"{counts[:, 0].sum():.0f} frames, the index says {entry.num_frames}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}; {index_advice(folder)}") from error
    return SamplesTable(keys, counts.reshape(-1, 3), members)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collecting garbage while a million small objects are made takes as long as making them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
