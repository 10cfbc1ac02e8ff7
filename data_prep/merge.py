"""Splits from finished units: their shards under running numbers, the index, what was dropped, and a summary.

Shards are linked, not copied, where the file system can. A split is made beside the old one and takes its place when it is
whole. Only units that are done enter, so merging early gives a smaller, valid data folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from csm.config import ModelConfig
from data_prep.engine import Job, locked, read_all_done, sync_folder
from data_prep.planning import TRAIN, VALIDATION, Unit
from data_prep.shard import FORMAT_VERSION, INDEX_NAME, write_atomic

FAILURES_NAME, SUMMARY_NAME = "failures.jsonl", "summary.json"
HARMLESS = ("duplicate",)  # dropped on purpose: no fault, no exit status
CHOSEN = ("transcribe", "filter")  # stages whose drops are choices of the settings


def merge(job: Job, units: Sequence[Unit]) -> dict[str, Any]:
    """Write `<output>/<split>/`, failures.jsonl and summary.json from the units that are done; return the summary.

    The same units give the same bytes, whenever and wherever they were done.

    Raises:
        ValueError: if no unit is done.
    """
    with locked(job.work / "merge.lock", what=f"merging {job.output}"):
        done = [record for record in read_all_done(units, job) if record is not None]
        if not done:
            raise ValueError(
                f"{job.output}: none of {len(units)} units is done; each that failed is named above, else run stages=[encode] first"
            )
        _remove_units_not_planned(job, {unit.name for unit in units})
        plan = json.loads((job.work / "plan.json").read_text(encoding="utf-8"))
        for split in (TRAIN, VALIDATION):
            _merge_split(job, split, [record for record in done if record["split"] == split], plan["codec"])
        lines = (job.work / "failures-manifest.jsonl").read_text(encoding="utf-8").splitlines()
        failures = [json.loads(line) for line in lines] + [row for record in done for row in record["failures"]]
        failures.sort(key=lambda row: (row["source"], row["turn"], row["stage"], row["reason"]))
        write_atomic(job.output / FAILURES_NAME, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failures).encode())
        summary = _summary(plan, done, failures, num_missing=len(units) - len(done))
        write_atomic(job.output / SUMMARY_NAME, (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode())
        return summary


def _remove_units_not_planned(job: Job, planned: set[str]) -> None:
    """Units of an earlier plan, with more of them, are in no one's way but the disk's."""
    for path in (job.work / "done").glob("*.json"):
        if path.stem not in planned:
            path.unlink()
            shutil.rmtree(job.work / "units" / path.stem, ignore_errors=True)


def _merge_split(job: Job, split: str, records: Sequence[dict[str, Any]], codec: dict[str, Any]) -> None:
    """Build the split beside its place and move it there; a split that is there already, the same, is left alone."""
    folder, part, old = (job.output / f"{split}{ending}" for ending in ("", ".tmp", ".old"))
    places = [(job.work / "units" / record["unit"], entry) for record in records for entry in record["shards"]]
    shards = [{**entry, "name": f"shard-{number:06d}.tar"} for number, (_, entry) in enumerate(places)]
    index = (json.dumps({"format_version": FORMAT_VERSION, "codec": codec, "shards": shards}, indent=1, ensure_ascii=False) + "\n").encode()
    for stale in (part, old):
        if stale.exists():
            shutil.rmtree(stale)
    if _is_there(folder, index, shards):
        return
    if shards:
        part.mkdir()
        for (unit_folder, entry), shard in zip(places, shards, strict=True):
            _link(unit_folder / entry["name"], part / shard["name"])
            _link((unit_folder / entry["name"]).with_suffix(".samples.jsonl"), (part / shard["name"]).with_suffix(".samples.jsonl"))
        write_atomic(part / INDEX_NAME, index)
        sync_folder(part)
    if folder.exists():
        os.replace(folder, old)
    if shards:
        os.replace(part, folder)
    sync_folder(job.output)
    if old.exists():
        shutil.rmtree(old)


def _is_there(folder: Path, index: bytes, shards: Sequence[dict[str, Any]]) -> bool:
    path = folder / INDEX_NAME
    return (
        path.is_file()
        and path.read_bytes() == index
        and all((folder / shard["name"]).is_file() and (folder / shard["name"]).stat().st_size == shard["num_bytes"] for shard in shards)
    )


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        with target.open("rb+") as stream:
            os.fsync(stream.fileno())


def _summary(plan: dict[str, Any], done: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]], num_missing: int) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    for record in done:
        counts = splits.setdefault(record["split"], {"units": 0, "samples": 0, "turns": 0, "frames": 0, "speech_s": 0.0, "heard_s": 0.0})
        counts["units"] += 1
        counts["samples"] += len(record["keys"])
        counts["turns"] += record["counts"]["num_turns"]
        counts["frames"] += record["counts"]["num_frames"]
        for key in ("speech_s", "heard_s"):
            counts[key] = round(counts[key] + record["counts"].get(key, 0.0), 3)
    reasons = Counter(f"{row['stage']}: {row['reason']}" for row in failures)
    seconds: dict[str, float] = {}
    for row in failures:
        key = f"{row['stage']}: {row['reason']}"
        seconds[key] = round(seconds.get(key, 0.0) + row["duration_s"], 3)
    return {
        "codec": plan["codec"],
        "codec_vocab_size": plan["codec_vocab_size"],
        "tokenizer": plan["tokenizer"],
        "split_by": plan["split_by"],
        "recordings": plan["num_recordings"],
        "recordings_s": plan["duration_s"],
        "splits": splits,
        "dropped": {key: {"count": count, "duration_s": seconds[key]} for key, count in sorted(reasons.items())},
        "units_not_done": num_missing,
        "is_faulty": num_missing > 0 or any(row["reason"] not in HARMLESS and row["stage"] not in CHOSEN for row in failures),
    }


def print_summary(summary: dict[str, Any], output: Path, console: Console) -> None:
    """What was made, what was dropped and why, and how to train on it."""
    table = Table(title=escape(f"{output}"), title_justify="left")
    for column in ("split", "samples", "turns", "frames", "hours"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in summary["splits"].items():
        numbers = [f"{counts[key]:,}" for key in ("samples", "turns", "frames")]
        table.add_row(split, *numbers, f"{counts['speech_s'] / 3600:.3f}")
    console.print(table)
    if summary["dropped"]:
        dropped = Table(title=escape(f"dropped (each named in {output / FAILURES_NAME})"), title_justify="left")
        for column in ("why", "count", "minutes"):
            dropped.add_column(column, justify="left" if column == "why" else "right")
        for why, counts in summary["dropped"].items():
            dropped.add_row(why, f"{counts['count']:,}", f"{counts['duration_s'] / 60:.2f}")
        console.print(dropped)
    heard_h, kept_h = (sum(counts[key] for counts in summary["splits"].values()) / 3600 for key in ("heard_s", "speech_s"))
    if heard_h:  # turns have some room around their words
        told = (
            f"{summary['recordings_s'] / 3600:.3f} h of recordings, {heard_h:.3f} h of them speech; turns of {kept_h:.3f} h in the shards"
        )
        console.print(told, highlight=False)
    if summary["units_not_done"]:
        console.print(f"{summary['units_not_done']} units are not done and not in it; run the same command again", style="red")
    console.print(f"train: {train_command(summary, output)}", highlight=False, markup=False)


def train_command(summary: dict[str, Any], output: Path) -> str:
    """The command that trains on the folder, with the model sized for its codec and tokenizer."""
    tokenizer, codec, model = summary["tokenizer"], summary["codec"], ModelConfig()
    words = [f"python train.py data=shards data.path={shlex.quote(str(output))}"]
    if codec["name"] == "mimi":
        words.append("model=csm_1b")
    elif codec["num_codebooks"] != model.num_codebooks:
        words.append(f"codec.num_codebooks={codec['num_codebooks']} model.num_codebooks={codec['num_codebooks']}")
    if codec["name"] != "mimi" and summary["codec_vocab_size"] != model.audio_vocab_size:
        words.append(f"model.audio_vocab_size={summary['codec_vocab_size']}")
    words.append(f"text={tokenizer['kind']} model.text_vocab_size={tokenizer['vocab_size']}")
    return " ".join(words)
