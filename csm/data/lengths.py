"""How many positions each turn takes: measured once with the run's tokenizer, then kept in a small file beside the shards."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from functools import lru_cache

import numpy as np

from csm.data.bad_samples import BadSamples
from csm.data.index import ShardIndex
from csm.data.packing import BAD
from csm.data.shards import ShardReader
from csm.data.styles import StyleTags
from csm.text import TextTokenizer

LENGTHS_VERSION = 2
_DIGEST_BYTES = 32  # sha256 of a table's bytes, behind them
_BLOCK = 512  # samples read at once

_log = logging.getLogger(__name__)


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """sha256 (16 hex) of a tokenizer's settings: equal digests cut text into equally many ids."""
    return hashlib.sha256(json.dumps(tokenizer.settings(), sort_keys=True).encode()).hexdigest()[:16]


def measure_turns(reader: ShardReader, tokenizer: TextTokenizer, bad: BadSamples, tags: StyleTags | None = None) -> np.ndarray:
    """The length of every turn of every sample, from a file beside the shards where that was done before.

    The first time, each sample's JSON is read and its text is cut into ids (about 35k samples a CPU-second with the word
    tokenizer); after that it is one small file a folder, `lengths-<digest>.npy`, written atomically, or not at all when
    the folder cannot be written, or when a shard of it cannot be read just now.

    A shard with a fault is counted in `bad` as a whole. Where its lengths are known from before, it keeps its place in the
    table, so the order of all other samples stays as it was.

    Args:
        tags: what is written in front of texts; None: nothing.
    Returns:
        [num_turns, 3] int32: sample, text ids, audio rows (frames and the EOS row), in sample order. A bad sample has one entry
        whose lengths are `BAD`; it is counted in `bad`.
    """
    for shard, fault in reader.faults.items():
        bad.add_shard(reader.samples_of(shard), fault)
    tables, first, first_shard = [], 0, 0
    for index in reader.indexes:
        name = _lengths_name(index, tokenizer, tags)
        table = _load_lengths(index, name)
        if table is None:
            table = _measure(reader, range(first, first + index.num_samples), tokenizer, bad, tags)
            if not any(first_shard <= shard < first_shard + len(index.shards) for shard in reader.faults):
                _save_lengths(index, name, table)
        else:
            for sample_index in table[table[:, 1] == BAD, 0].tolist():
                path = f"{index.folder}/{name}"
                bad.add(first + sample_index, f"sample {reader.keys[first + sample_index]} was bad before; delete {path} to try it again")
        table = table.copy()
        table[:, 0] += first
        tables.append(table)
        first += index.num_samples
        first_shard += len(index.shards)
    return np.concatenate(tables)


def _lengths_name(index: ShardIndex, tokenizer: TextTokenizer, tags: StyleTags | None) -> str:
    told = f"{LENGTHS_VERSION} {index.digest} {tokenizer_digest(tokenizer)}" + ("" if tags is None else f" {tags.dropout}")
    return f"lengths-{hashlib.sha256(told.encode()).hexdigest()[:16]}.npy"


def _load_lengths(index: ShardIndex, name: str) -> np.ndarray | None:
    """The table of an earlier run; None where there is none, or its bytes are not those written."""
    try:
        content = index.folder.read(name)
    except OSError:
        return None
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        _log.warning("%s/%s: damaged; measuring again", index.folder, name)
        return None
    return np.load(io.BytesIO(content), allow_pickle=False)


def _save_lengths(index: ShardIndex, name: str, table: np.ndarray) -> None:
    file = io.BytesIO()
    np.save(file, table, allow_pickle=False)
    try:
        index.folder.write(name, file.getvalue() + hashlib.sha256(file.getvalue()).digest())
    except OSError as error:
        _log.info("lengths are not kept: %s", error)


def _measure(reader: ShardReader, samples: range, tokenizer: TextTokenizer, bad: BadSamples, tags: StyleTags | None) -> np.ndarray:
    @lru_cache(maxsize=1 << 16)
    def num_text_ids(speaker: int, text: str) -> int:
        return len(tokenizer.encode_turn(speaker, text))

    rows: list[tuple[int, int, int]] = []
    for start in range(samples.start, samples.stop, _BLOCK):
        block = range(start, min(start + _BLOCK, samples.stop))
        for sample_index, meta in zip(block, reader.read_metas(block), strict=True):
            place, lengths = sample_index - samples.start, []
            try:
                if isinstance(meta, ValueError):
                    raise meta
                for turn_index, turn in enumerate(meta["turns"]):
                    text = turn["text"] if tags is None else tags.text(turn, reader.keys[sample_index], turn_index)
                    lengths.append((place, num_text_ids(turn["speaker"], text), turn["frames"][1] - turn["frames"][0] + 1))
                rows += lengths
            except ValueError as error:
                bad.add(sample_index, str(error) if meta is error else f"sample {reader.keys[sample_index]}: {error}")
                rows.append((place, BAD, BAD))
    return np.array(rows, dtype=np.int32).reshape(-1, 3)
