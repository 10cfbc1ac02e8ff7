"""Reads prepared conversations from shards: any sample of any shard by one read of its bytes.

`<data>/<split>/` holds `index.json`, tar files in WebDataset layout and, beside each tar, a `.samples.jsonl` with the byte range
of every member (docs/data_format.md). Tars are never opened as tars, so a sample costs one read wherever it lies. Order,
packing and batches are left to the neighbours of this module.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csm.data.index import CodecEntry, ShardIndex
from csm.data.members import HEADER_BYTES, MEMBERS, check_header, parse_codes, parse_meta, parse_turn
from csm.data.storage import ShardFiles, join
from csm.data.tables import SamplesTable, read_tables
from csm.frames import SAMPLE_RATE_HZ, Turn

_MAX_GAP_BYTES = 16_384  # between two members of a sample that are read as one


@dataclass
class Sample:
    """One conversation.

    Attributes:
        key: `<recording digest>-<start ms>`.
        turns: in order, with codes int64 [K, F] and learn flags.
        meta: the sample's JSON as it is stored.
    """

    key: str
    turns: list[Turn]
    meta: dict
    _read_flac: Callable[[], bytes] | None = field(repr=False, default=None)

    def audio(self) -> Tensor | None:
        """The conversation's audio, float32 [S] at 24 kHz, decoded now; None when the shard carries none."""
        if self._read_flac is None:
            return None
        import soundfile

        samples, rate_hz = soundfile.read(io.BytesIO(self._read_flac()), dtype="float32")
        if rate_hz != SAMPLE_RATE_HZ or samples.ndim != 1:
            raise ValueError(f"sample {self.key}: audio of {rate_hz} Hz, shape {samples.shape}; expected {SAMPLE_RATE_HZ} Hz mono")
        return torch.from_numpy(samples)


class ShardReader:
    """Random access to the samples of one split, or of several that were made with the same codec.

    Safe to fork and to pickle: every process opens its own files when it first reads.

    Args:
        places: folders or URLs of splits.
        keep_faults: note shards that cannot be used in `faults`, and refuse their samples one by one, instead of raising.
        compare_digests: compare the sha256 of local shards with their index, once; remote ones are when they are copied.
        cache_dir: where shards behind URLs are copied to, whole; None reads them by ranges.

    Attributes:
        indexes: one `ShardIndex` a folder.
        paths: path or URL of each shard.
        keys: [n] str, in index order.
        shard: [n] int32, the shard each sample lies in, counted over all folders.
        num_frames, num_characters: [n] int32.
        duration_s: [n] float64.
        faults: what is wrong with a shard none of whose samples can be read.
    """

    def __init__(
        self,
        places: Path | str | Sequence[Path | str],
        *,
        keep_faults: bool = False,
        compare_digests: bool = False,
        cache_dir: Path | str | None = None,
    ) -> None:
        places = [places] if isinstance(places, (str, Path)) else list(places)
        self.indexes = [ShardIndex.load(place, keep_faults=keep_faults) for place in places]
        for index in self.indexes[1:]:
            first = self.indexes[0].codec
            index.check_codec(num_codebooks=first.num_codebooks, digest=first.digest, name=first.name)
        entries = [entry for index in self.indexes for entry in index.shards]
        self.paths = [join(index.folder.place, shard.name) for index in self.indexes for shard in index.shards]
        self.faults: dict[int, str] = {}
        tables: list[SamplesTable] = []
        for index in self.indexes:
            own, faults = read_tables(index)
            if compare_digests:
                faults |= index.compare_digests()
            faults |= index.faults
            self.faults |= {len(tables) + place: faults[entry.name] for place, entry in enumerate(index.shards) if entry.name in faults}
            tables += own
        if self.faults and not keep_faults:
            fault = next(iter(self.faults.values()))
            raise FileNotFoundError(fault) if "not there" in fault else ValueError(fault)
        self.keys: list[str] = [key for table in tables for key in table.keys]
        sizes = [len(table.keys) for table in tables]
        self.shard = np.repeat(np.arange(len(tables), dtype=np.int32), sizes)
        self._firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # of each shard's samples
        counts = np.concatenate([table.counts for table in tables]) if tables else np.zeros((0, 3))
        self.num_frames, self.num_characters = counts[:, 0].astype(np.int32), counts[:, 1].astype(np.int32)
        self.duration_s = counts[:, 2]
        # [n, len(MEMBERS), 2]: byte offset and size of each member; -1 where a sample has none
        self._members = np.concatenate([t.members for t in tables]) if tables else np.zeros((0, len(MEMBERS), 2), np.int64)
        self._files = ShardFiles(self.paths, [entry.sha256 for entry in entries], cache_dir)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def codec(self) -> CodecEntry:
        return self.indexes[0].codec

    def samples_of(self, shard: int) -> range:
        """The samples of a shard."""
        return range(int(self._firsts[shard]), int(self._firsts[shard + 1]))

    def name_of(self, sample_index: int) -> tuple[str, str]:
        """(path or URL of the shard, key) of a sample."""
        return str(self.paths[self.shard[sample_index]]), self.keys[sample_index]

    def find(self, shard: str, key: str) -> int | None:
        """The sample of a (shard, key), None when there is none."""
        places = [index for index, path in enumerate(self.paths) if str(path) == shard]
        return next((sample for place in places for sample in self.samples_of(place) if self.keys[sample] == key), None)

    def read(self, sample_index: int) -> Sample:
        """Read one conversation.

        Raises:
            ValueError: the sample's bytes are not what the format and the index say; names shard and key.
        """
        sample = self.read_many([sample_index])[0]
        if isinstance(sample, ValueError):
            raise sample
        return sample

    def read_many(self, sample_indexes: Sequence[int]) -> list[Sample | ValueError]:
        """Read conversations, those behind URLs all at once; in the place of a bad one, what is wrong with it."""
        read: list[Sample | ValueError] = []
        for sample_index, members in zip(sample_indexes, self._read_members(sample_indexes, ("codes.npy", "json")), strict=True):
            try:
                if isinstance(members, Exception):
                    raise members
                meta = parse_meta(members["json"], int(self.num_frames[sample_index]))
                codes = parse_codes(members["codes.npy"], self.codec.num_codebooks)
                if codes.shape[1] != self.num_frames[sample_index]:
                    raise ValueError(f"{codes.shape[1]} frames of codes, the index says {self.num_frames[sample_index]}")
                turns = [parse_turn(turn, codes) for turn in meta["turns"]]
                read.append(Sample(self.keys[sample_index], turns, meta, self._reads_flac(sample_index)))
            except (ValueError, OSError) as error:
                read.append(self._bad(sample_index, error))
        return read

    def read_metas(self, sample_indexes: Sequence[int]) -> list[dict | ValueError]:
        """The JSON of samples, checked; their codes are not read. In the place of a bad one, what is wrong with it."""
        metas: list[dict | ValueError] = []
        for sample_index, members in zip(sample_indexes, self._read_members(sample_indexes, ("json",)), strict=True):
            try:
                if isinstance(members, Exception):
                    raise members
                metas.append(parse_meta(members["json"], int(self.num_frames[sample_index])))
            except (ValueError, OSError) as error:
                metas.append(self._bad(sample_index, error))
        return metas

    def spread(self, count: int) -> list[int]:
        """At most `count` sample indexes, from the first to the last, evenly spaced."""
        return np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int)).tolist()

    def close(self) -> None:
        """Close what this process opened."""
        self._files.close()

    def _bad(self, sample_index: int, error: Exception) -> ValueError:
        shard, key = self.name_of(sample_index)
        return ValueError(f"shard {shard}: sample {key}: {error}")

    def _reads_flac(self, sample_index: int) -> Callable[[], bytes] | None:
        if self._members[sample_index, MEMBERS.index("flac"), 0] < 0:
            return None

        def read_flac() -> bytes:
            members = self._read_members([sample_index], ("flac",))[0]
            if isinstance(members, Exception):
                raise self._bad(sample_index, members)
            return members["flac"]

        return read_flac

    def _read_members(self, sample_indexes: Sequence[int], names: tuple[str, ...]) -> list[dict[str, bytes] | Exception]:
        """Members of samples, their tar headers checked; neighbours in the tar are read as one."""
        wanted = [MEMBERS.index(name) for name in names]
        ranges: list[tuple[int, int, int]] = []
        plans: list[list[tuple[str, int, int, int]] | Exception] = []  # (name, range, offset of the header in it, size)
        for sample_index in sample_indexes:
            shard = int(self.shard[sample_index])
            if shard in self.faults:
                plans.append(ValueError(self.faults[shard]))
                continue
            places = sorted((*self._members[sample_index, member].tolist(), name) for member, name in zip(wanted, names, strict=True))
            absent = [name for offset, _, name in places if offset < HEADER_BYTES]
            if absent:
                plans.append(ValueError(f"no {absent[0]} in the tar"))
                continue
            plan = []
            last = None  # end of the range being gathered
            for offset, size, name in places:
                first = offset - HEADER_BYTES
                if last is not None and first >= last and first - last <= _MAX_GAP_BYTES:
                    ranges[-1] = (shard, ranges[-1][1], offset + size)
                else:
                    ranges.append((shard, first, offset + size))
                plan.append((name, len(ranges) - 1, first - ranges[-1][1], size))
                last = offset + size
            plans.append(plan)
        contents = self._files.read(ranges)
        return [
            plan if isinstance(plan, Exception) else self._cut(sample, plan, contents)
            for sample, plan in zip(sample_indexes, plans, strict=True)
        ]

    def _cut(
        self, sample_index: int, plan: list[tuple[str, int, int, int]], contents: Sequence[bytes | Exception]
    ) -> dict[str, bytes] | Exception:
        """The members of one sample out of the ranges read."""
        members: dict[str, bytes] = {}
        for name, range_index, start, size in plan:
            content = contents[range_index]
            if isinstance(content, Exception):
                return content
            header = content[start : start + HEADER_BYTES]
            try:
                check_header(header, f"{self.keys[sample_index]}.{name}", size)
            except ValueError as error:
                return error
            members[name] = content[start + HEADER_BYTES : start + HEADER_BYTES + size]
        return members


def iter_samples(place: Path | str) -> Iterator[Sample]:
    """Every sample of a split in index order.

    Raises:
        ValueError: at the first bad sample: an evaluation must not quietly shrink.
    """
    reader = ShardReader(place)
    for sample_index in range(len(reader)):
        yield reader.read(sample_index)
