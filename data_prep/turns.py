"""`prep=turns`, `prep=conversations`, `prep=offline`: recordings become shards, in stages that can run apart.

`manifest` looks at every file and plans units; `transcribe`, `segment` and `filter` find out who says what, where that is not known;
`encode` makes codes and shards of the units (of one slice); `merge` makes splits of those that are done. Everything between
stages lies in `<output>/prep`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from csm.config import PrepConfig
from csm.listening.emotion import emotion_digest
from data_prep.engine import ENCODE, Job, locked
from data_prep.executors import do_units, know_models
from data_prep.failures import Failure, Rejected
from data_prep.fetch import fetch, is_elsewhere
from data_prep.fingerprint import Copies, fingerprint
from data_prep.inputs import Candidate, Input, probe
from data_prep.manifest import Recording, manifest_line
from data_prep.merge import merge, print_summary
from data_prep.planning import TRAIN, VALIDATION, Unit, plan_units, split_recordings
from data_prep.shard import write_atomic
from data_prep.stages import NAMES as LISTENING_STAGES
from data_prep.stages import Listening
from data_prep.tools import prepare_codec, prepare_tokenizer

UNIT_STAGES = {"turns": (ENCODE,), "conversations": (*LISTENING_STAGES, ENCODE), "offline": (*LISTENING_STAGES, ENCODE)}
STAGES = {name: ("manifest", *inner, "merge") for name, inner in UNIT_STAGES.items()}
PLAN_VERSION = 2
PLAN_NAME, UNITS_NAME, MANIFEST_FAILURES_NAME = "plan.json", "units.jsonl", "failures-manifest.jsonl"


def prepare_turns(config: PrepConfig, overrides: Sequence[str] = ()) -> int:
    """Run the stages asked for; all of them, or without the merge when this is one slice of several.

    Args:
        overrides: of the command line that `config` was made of: `executor=slurm` gives them to its slices.
    Returns:
        0, or 1 when a recording or turn was dropped for a fault of its own, or a unit is not done.
    Raises:
        ValueError, FileNotFoundError, FileExistsError: for input that cannot be used.
    """
    check_command(config)
    known = STAGES[config.name]
    stages = config.stages or (known if config.slice_count == 1 else known[:-1])
    torch.set_num_threads(1)  # codes must not depend on how many threads the machine has; num_workers are processes
    console = Console(soft_wrap=True)
    output = Path(config.output)
    status = 0
    if "manifest" in stages:
        with locked(output / "prep" / "manifest.lock", what=f"the manifest of {output}", is_waiting=True):
            not_had = fetch(str(config.input), _place(config), config.dataset) if is_elsewhere(str(config.input)) else []
            found = _found(config)
            _manifest_stage(config, found, output, _plan_settings(config, found), not_had, console)
    found = _found(config)
    job, units = _planned(config, found, output)
    job.stages = tuple(stage for stage in UNIT_STAGES[config.name] if stage in stages)
    if job.stages:
        status |= do_units(config, job, units, overrides, console)
    else:
        know_models(job)
    if "merge" in stages:
        summary = merge(replace(job, stages=(ENCODE,)), units)
        print_summary(summary, output, console)
        status |= int(summary["is_faulty"])
    elif config.slice_count > 1:
        console.print("when every slice is done: the same command with stages=[merge]", highlight=False, markup=False)
    return status


def check_command(config: PrepConfig) -> None:
    """Refuse what can be seen to be wrong of the command alone.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: for a stage that there is not, an input that is not there, an output in use.
    """
    known = STAGES[config.name]
    unknown = [stage for stage in config.stages if stage not in known]
    if unknown:
        raise ValueError(f"stages={config.stages}: prep={config.name} has no stage {unknown[0]!r}; there are: {', '.join(known)}")
    if config.input is None:
        raise ValueError(
            f"prep={config.name} needs input=<a folder of recordings, a manifest.jsonl, a metadata.csv, a URL or hf:<data set>>"
        )
    root = None if is_elsewhere(config.input) else _found(config).root
    _check_output(Path(config.output), root)


def _place(config: PrepConfig) -> Path:
    """The folder or file that recordings are read from: `input=`, or where it is fetched to."""
    assert config.input is not None
    return Path(config.output) / "prep" / "input" if is_elsewhere(config.input) else Path(config.input)


def _found(config: PrepConfig) -> Input:
    return Input.find(_place(config), with_texts=config.name == "turns")


def _check_output(output: Path, root: Path | None) -> None:
    """Refuse a folder that holds something else, and an input that lies in the output or around it."""
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / "prep").is_dir())):
        raise FileExistsError(f"output={output} holds something that is not a preparation (prep/ is missing); give another output=")
    if root is None:
        return
    inner, outer = root.resolve(), output.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"output={output} and input={root} lie in one another; give an output= outside of the recordings")


def _manifest_stage(
    config: PrepConfig, found: Input, output: Path, wanted: dict[str, Any], not_had: list[Failure], console: Console
) -> None:
    """Look at every file, choose splits, plan units; nothing to do when neither files nor settings changed."""
    work = output / "prep"
    plan = _read_plan(work / PLAN_NAME)
    if plan is not None and plan["settings"] == wanted:
        return
    recordings, failures = _look_at(found, config.duplicates == "sound", config.num_workers, console)
    failures += not_had
    if not recordings:
        reasons = sorted({failure.reason for failure in failures}) or ["no audio file"]
        first = f"; the first: {failures[0].source}: {failures[0].detail}" if failures else ""
        raise ValueError(f"input={config.input}: no usable recording ({', '.join(reasons)}){first}; the forms of input are in docs/data.md")
    validation, picked_by = split_recordings(recordings, config.val_share, config.split_by, config.seed)
    in_validation = {recording.digest for recording in validation}
    training = [recording for recording in recordings if recording.digest not in in_validation]
    ordered = [(TRAIN, recording) for recording in training] + [(VALIDATION, recording) for recording in validation]
    lines = [(split, recording, manifest_line(recording)) for split, recording in ordered]
    codec = prepare_codec(config, training, found.root, output, console)
    tokenizer = prepare_tokenizer(config, recordings, output)
    units = plan_units(lines, config.unit_min)
    (work / PLAN_NAME).unlink(missing_ok=True)
    write_atomic(work / "manifest.jsonl", "".join(line for _, _, line in lines).encode())
    write_atomic(work / UNITS_NAME, _json_lines(unit.row() for unit in units))
    write_atomic(work / MANIFEST_FAILURES_NAME, _json_lines(failure.row() for failure in sorted(failures)))
    duration_s = round(sum(recording.duration_s for recording in recordings), 3)
    done = {
        "settings": wanted,
        "codec": codec.index_entry(),
        "codec_vocab_size": codec.vocab_size,
        "emotion_digest": None if config.encode.emotion is None else emotion_digest(config.encode.emotion),
        "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
        "split_by": picked_by,
        "num_recordings": len(recordings),
        "duration_s": duration_s,
        "num_units": len(units),
    }
    write_atomic(work / PLAN_NAME, (json.dumps(done, indent=1, ensure_ascii=False) + "\n").encode())
    console.print(
        f"{len(recordings)} recordings, {duration_s / 3600:.2f} h, in {len(units)} units; {len(failures)} dropped; "
        f"validation by {picked_by}",
        highlight=False,
    )


def _plan_settings(config: PrepConfig, found: Input) -> dict[str, Any]:
    """What the manifest and the units depend on."""
    listing = hashlib.sha256()
    for line in found.listing():
        listing.update(line.encode() + b"\n")
    return {
        "plan_version": PLAN_VERSION,
        "prep": config.name,
        "listing": listing.hexdigest(),
        "seed": config.seed,
        "unit_min": config.unit_min,
        "val_share": config.val_share,
        "split_by": config.split_by,
        "duplicates": config.duplicates,
        **_tool_settings(config),
    }


def _tool_settings(config: PrepConfig) -> dict[str, Any]:
    """What the codec and the tokenizer in the output depend on."""
    numbering = {"renumber_speakers": config.encode.renumber_speakers, "first_speaker": config.encode.first_speaker}
    return {"codec": asdict(config.codec), "text": asdict(config.text), "emotion": config.encode.emotion, **numbering}


def _look_at(found: Input, by_sound: bool, num_workers: int, console: Console) -> tuple[list[Recording], list[Failure]]:
    """Digest and header of every candidate, duplicates dropped; in the order of the input."""
    recordings: dict[str, Recording] = {}
    failures: list[Failure] = []
    copies = Copies(lambda recording: fingerprint(found.root / recording.source))

    def look_at(entry: Candidate | Failure) -> tuple[Recording | Failure, np.ndarray | None]:
        outcome = probe(entry, found.root) if isinstance(entry, Candidate) else entry
        is_heard = by_sound and isinstance(outcome, Recording)
        return outcome, fingerprint(found.root / outcome.source) if is_heard else None

    columns = (TextColumn("look at files"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    entries = list(found.candidates())
    with ThreadPoolExecutor(num_workers) as pool, Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(entries))
        for outcome, words in pool.map(look_at, entries):  # in their order: the first copy stays, however many look
            progress.advance(task)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                continue
            why = None
            if outcome.digest in recordings:
                why = Rejected("duplicate", f"the same bytes as {recordings[outcome.digest].source}")
            elif words is not None and (first := copies.first_like(outcome, words)) is not None:
                why = Rejected("duplicate", f"the same sound as {first.source}")
            if why is None:
                recordings[outcome.digest] = outcome
            else:
                failures.append(Failure.of(outcome.source, "manifest", why, duration_s=outcome.duration_s))
    return list(recordings.values()), failures


def _planned(config: PrepConfig, found: Input, output: Path) -> tuple[Job, list[Unit]]:
    """The plan that the manifest stage left.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it was made for another codec or tokenizer.
    """
    plan = _read_plan(output / "prep" / PLAN_NAME)
    if plan is None:
        raise FileNotFoundError(f"{output / 'prep' / PLAN_NAME}: no plan there; run stages=[manifest] first")
    for key, value in _tool_settings(config).items():
        if plan["settings"].get(key) != value:
            raise ValueError(
                f"{output} was planned with {key}={plan['settings'].get(key)}, this asks for {value}; run stages=[manifest] again"
            )
    job = Job(found.root, output, plan["codec"]["digest"], config.ingest, config.encode, config.license, config.language)
    job.emotion_digest = plan["emotion_digest"]
    if config.name != "turns":
        job.listening = Listening(config.ingest, config.transcribe, config.diarize, config.segment, config.filter)
    lines = (output / "prep" / UNITS_NAME).read_text(encoding="utf-8").splitlines()
    return job, [Unit(**json.loads(line)) for line in lines]


def _read_plan(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        return plan if plan["settings"]["plan_version"] == PLAN_VERSION else None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a plan ({error!r}); delete it and run stages=[manifest] again") from error


def _json_lines(rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
