"""Units of work: each is done whole, once, by whoever; a killed run goes on where it was.

`run_unit` depends on the unit's recordings and the job's settings alone. It writes into `<unit>.tmp`, renames that when it is
whole and synced, and writes `done/<unit>.json` last. A unit counts as done when that file names the same settings and inputs,
and the bytes it names are there. So the shards are the same whatever the number of workers, slices and kills.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from csm.codec import Codec, codec_from_folder
from csm.config import EncodeConfig, IngestConfig
from csm.text import tokenizer_from_folder
from data_prep import stages
from data_prep.emotion import label_turns, load_labeller
from data_prep.encode import Conversation, cut_turns, encode_all, in_phases, samples_of
from data_prep.failures import Failure, Rejected
from data_prep.ingest import ingest
from data_prep.manifest import Recording, file_digest, read_manifest
from data_prep.planning import TRAIN, Unit
from data_prep.shard import Sample, write_atomic, write_split
from data_prep.stages import Heard, Listening, failures_of, recordings_of, run_stages

ENCODE = "encode"
UNIT_VERSION = 2  # raise when the same settings would give other bytes


@dataclass
class Job:
    """What every unit needs, as plain values: workers get it by pickle.

    Attributes:
        root: of the recordings.
        output: the data folder; its codec/ and tokenizer.json are those to encode with.
        license, language: of recordings whose manifest names none.
        listening: finds out who says what, where the manifest does not say it.
    """

    root: Path
    output: Path
    codec_digest: str
    ingest: IngestConfig
    encode: EncodeConfig
    license: str | None = None
    language: str | None = None
    listening: Listening | None = None  # of recordings whose turns are not known yet
    emotion_digest: str | None = None  # of encode.emotion's files
    stages: tuple[str, ...] = (ENCODE,)  # of those a unit goes through, which are to be done now

    @property
    def work(self) -> Path:
        return self.output / "prep"

    @property
    def manifest(self) -> Path:
        return self.work / "manifest.jsonl"

    def config_digest(self) -> str:
        """sha256 of what a unit's bytes depend on besides its recordings. The device is left out: it is no choice of data."""
        encode = {key: value for key, value in asdict(self.encode).items() if key != "device"}
        encode["emotion"] = self.emotion_digest  # wherever it lies
        told = [UNIT_VERSION, self.codec_digest, asdict(self.ingest), encode, self.license, self.language]
        told.append(tokenizer_from_folder(self.output).settings())
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def run_unit(unit: Unit, job: Job) -> dict[str, Any]:
    """Do the stages of one unit that are asked for and not done, and return what its `done/<unit>.json` says.

    A unit is locked while it is at work: a worker that outlives its killed driver ends it, and whoever was given the unit
    meanwhile waits and finds it done.

    Raises:
        ValueError: if the manifest is not the one the unit was planned on, or a stage's input is not there.
    """
    with locked(job.work / "locks" / f"{unit.name}.lock", what=f"unit {unit.name}", is_waiting=True):
        record = read_done(unit, job, job.config_digest())
        return _run_unit(unit, job) if record is None else record


def _run_unit(unit: Unit, job: Job) -> dict[str, Any]:
    heard = heard_unit(unit, job, job.stages)
    if job.listening is not None and heard is None:
        raise ValueError(f"unit {unit.name} has not been listened to with these settings; run stages=[{','.join(stages.NAMES)}] first")
    if ENCODE not in job.stages:
        return {}
    rows = None if heard is None else heard.rows()
    folder = job.work / "units" / unit.name
    done = job.work / "done" / f"{unit.name}.json"
    part = folder.with_name(unit.name + ".tmp")
    for stale in (part, folder):
        if stale.exists():
            shutil.rmtree(stale)
    done.unlink(missing_ok=True)
    for parent in (folder.parent, done.parent):
        parent.mkdir(parents=True, exist_ok=True)
    codec = _codec(str(job.output / "codec"), job.codec_digest, job.encode.device, job.encode.codec_backend)
    tokenizer = tokenizer_from_folder(job.output)
    failures: list[Failure] = failures_of(rows) if rows is not None else []
    keys: list[str] = []
    counts = {"num_turns": 0, "num_frames": 0, "speech_s": 0.0}

    def samples() -> Iterator[Sample]:
        num_phases = job.encode.num_phases if unit.split == TRAIN else 1
        phases = (copy for whole in _conversations(unit, job, failures, rows) for copy in in_phases(whole, num_phases))
        for conversation in encode_all(phases, codec):
            for piece in samples_of(conversation, tokenizer, job.encode):
                if isinstance(piece, Failure):
                    failures.append(piece)
                    continue
                keys.append(piece.key)
                counts["num_turns"] += len(piece.meta["turns"])
                counts["num_frames"] += piece.codes.shape[1]
                counts["speech_s"] += sum(turn["end_s"] - turn["start_s"] for turn in piece.meta["turns"])
                yield piece

    index = write_split(samples(), part, codec.index_entry())
    sync_folder(part)
    os.replace(part, folder)
    sync_folder(folder.parent)
    record = {
        "unit": unit.name,
        "split": unit.split,
        "config_digest": job.config_digest(),
        "input_digest": _input_digest(unit, heard),
        "shards": index["shards"],
        "files": {path.name: [path.stat().st_size, _sha256(path)] for path in sorted(folder.iterdir())},
        "keys": keys,
        "counts": {**counts, "speech_s": round(counts["speech_s"], 3), "heard_s": round(sum(row["heard_s"] for row in rows or ()), 3)},
        "failures": [failure.row() for failure in sorted(failures)],
    }
    write_atomic(done, (json.dumps(record, ensure_ascii=False) + "\n").encode())
    return record


def heard_unit(unit: Unit, job: Job, names: Sequence[str]) -> Heard | None:
    """What listening to a unit left, the named stages done where they were not; None where it is not needed or not done."""
    if job.listening is None:
        return None
    asked = [name for name in stages.NAMES if name in job.stages]
    last = stages.FILTER if ENCODE in job.stages or not asked else asked[-1]
    recordings = partial(unit_recordings, unit, job.manifest)
    return run_stages(job.listening, names, last, job.work, unit.name, unit.digest, recordings, job.root)


def _input_digest(unit: Unit, heard: Heard | None) -> str:
    return unit.digest if heard is None else heard.digest


def _conversations(unit: Unit, job: Job, failures: list[Failure], rows: Sequence[dict[str, Any]] | None) -> Iterator[Conversation]:
    for recording in unit_recordings(unit, job.manifest) if rows is None else recordings_of(rows):
        recording.license = recording.license or job.license
        recording.language = recording.language or job.language
        path = job.root / recording.source
        try:
            if file_digest(path) != recording.digest:
                raise Rejected("changed", "the file is not the one the manifest was made of; run stages=[manifest] again")
            ingested = ingest(path, job.ingest, by_channel=any(turn.channel is not None for turn in recording.turns))
            conversation = cut_turns(recording, ingested, job.encode)
            if job.encode.emotion is not None and job.emotion_digest is not None:
                label_turns(conversation, load_labeller(job.encode.emotion, job.emotion_digest, job.encode.device))
        except Rejected as error:
            failures.append(Failure.of(recording.source, "ingest", error, duration_s=recording.duration_s))
            continue
        yield conversation


def unit_recordings(unit: Unit, manifest: Path) -> Iterator[Recording]:
    """The manifest lines of a unit.

    Raises:
        ValueError: if they are not those it was planned on.
    """
    with manifest.open("rb") as stream:
        stream.seek(unit.first_byte)
        lines = stream.read(unit.last_byte - unit.first_byte)
    if hashlib.sha256(lines).hexdigest() != unit.digest:
        raise ValueError(f"{manifest}: not the manifest that unit {unit.name} was planned on; run stages=[manifest] again")
    return read_manifest(lines.decode().split("\n")[:-1], f"{manifest}, unit {unit.name}")  # a name may hold other line ends


def read_done(unit: Unit, job: Job, config_digest: str) -> dict[str, Any] | None:
    """What a finished unit says; None when it has to be done (again)."""
    done = job.work / "done" / f"{unit.name}.json"
    if ENCODE in job.stages and not done.is_file():
        return None
    heard = heard_unit(unit, job, ())
    if job.listening is not None and heard is None:
        return None
    if ENCODE not in job.stages:
        return {}
    try:
        record = json.loads(done.read_text(encoding="utf-8"))
        is_same = record["config_digest"] == config_digest and record["input_digest"] == _input_digest(unit, heard)
        folder = job.work / "units" / unit.name
        for name, (num_bytes, digest) in record["files"].items() if is_same else ():
            path = folder / name
            if path.stat().st_size != num_bytes or _sha256(path) != digest:
                return None
        return record if is_same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_all_done(units: Sequence[Unit], job: Job) -> list[dict[str, Any] | None]:
    """`read_done` of each: bytes are read and digested by several threads."""
    config_digest = job.config_digest()
    if job.listening is not None:
        job.listening.models_used()  # once, before threads ask
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda unit: read_done(unit, job, config_digest), units))


def units_of_slice(units: Sequence[Unit], slice_index: int, slice_count: int) -> list[Unit]:
    """Every `slice_count`-th unit: long and short ones spread over the slices."""
    return list(units[slice_index::slice_count])


@contextmanager
def locked(path: Path, *, what: str, is_waiting: bool = False) -> Iterator[None]:
    """Hold a lock file, so that two processes never do the same work; a killed process lets go of it.

    Raises:
        FileExistsError: if another process holds it and `is_waiting` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if is_waiting else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise FileExistsError(f"{what} is being done by another process; wait for it") from error
        yield


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache(maxsize=1)
def _codec(folder: str, digest: str, device: str, backend: str) -> Codec:
    """The codec that units are encoded with, loaded once a process; the digest is checked."""
    codec = codec_from_folder(Path(folder), device, backend)
    if codec.digest != digest:
        raise ValueError(f"{folder} holds another codec than the one this preparation began with; run stages=[manifest] again")
    return codec


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
