"""`python -m data_prep.inspect FOLDER`: what a data folder holds, as tables in the terminal and one page to look at and listen to.

It reads shards of any maker by their index. Hours and samples are of all of them; everything else of at most `--max-samples`,
evenly spaced over a split, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from csm.data.shards import ShardReader

MAX_SAMPLES = 20_000
NUM_CLIPS = 20
PAGE_NAME = "inspect.html"
_BATCH = 500


@dataclass
class Split:
    """What one split holds.

    Attributes:
        num_samples, hours, num_shards: of all of it.
        metas: (index, JSON) of the samples that were read.
        num_bad: samples among them that cannot be read.
    """

    name: str
    num_samples: int
    num_shards: int
    hours: float
    metas: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    num_bad: int = 0


@dataclass
class Survey:
    """What was found in a data folder.

    Attributes:
        measures: values by name: turn lengths, gaps, words a second and everything in the turns' `quality`.
        counts: of turns, marks, speakers, languages and licences.
        rejected: (stage, reason) to (rows, seconds) of failures.jsonl.
    """

    folder: Path
    codec: str
    splits: list[Split]
    measures: dict[str, list[float]]
    counts: dict[str, Any]
    rejected: dict[tuple[str, str], tuple[int, float]]

    @property
    def hours(self) -> float:
        return sum(split.hours for split in self.splits)

    @property
    def rejected_hours(self) -> float:
        return sum(seconds for _, seconds in self.rejected.values()) / 3600


def split_folders(folder: Path) -> list[Path]:
    """The splits of a data folder, or the one that it is.

    Raises:
        FileNotFoundError: if there is no index.
    """
    found = [folder] if (folder / "index.json").is_file() else sorted(path.parent for path in folder.glob("*/index.json"))
    if not found:
        raise FileNotFoundError(f"{folder}: no index.json in it or in the folders below; give a data folder, or index it with prep=index")
    return found


def survey(folder: Path, max_samples: int = MAX_SAMPLES) -> Survey:
    """Read the folder's indexes, the JSON of at most `max_samples` samples a split, and failures.jsonl.

    Raises:
        FileNotFoundError, ValueError: if there is no index, or it cannot be read.
    """
    splits, codec = [], ""
    for path in split_folders(folder):
        reader = ShardReader(path, keep_faults=True)
        codec = f"{reader.codec.name}, {reader.codec.num_codebooks} codebooks"
        split = Split(path.name, len(reader), len(reader.paths), float(reader.duration_s.sum()) / 3600)
        wanted = reader.spread(max_samples)
        for start in range(0, len(wanted), _BATCH):
            indexes = wanted[start : start + _BATCH]
            for index, meta in zip(indexes, reader.read_metas(indexes), strict=True):
                if isinstance(meta, ValueError):
                    split.num_bad += 1
                else:
                    split.metas.append((index, meta))
        reader.close()
        splits.append(split)
    measures, counts = _measure([meta for split in splits for _, meta in split.metas])
    return Survey(folder, codec, splits, measures, counts, _rejected(folder / "failures.jsonl"))


def _measure(metas: Sequence[dict[str, Any]]) -> tuple[dict[str, list[float]], dict[str, Any]]:
    measures: dict[str, list[float]] = defaultdict(list)
    seen: dict[str, Counter[Any]] = {name: Counter() for name in ("languages", "licenses", "speakers a conversation", "marks")}
    names: set[Any] = set()
    sources: set[str] = set()
    num_turns = 0
    for meta in metas:
        turns = meta["turns"]
        num_turns += len(turns)
        source = str(meta.get("source"))
        sources.add(source)
        seen["languages"][meta.get("language") or "not said"] += 1
        seen["licenses"][meta.get("license") or "not said"] += 1
        seen["speakers a conversation"][len({turn["speaker"] for turn in turns})] += 1
        for turn in turns:
            names.add(turn.get("speaker_name") or (source, turn["speaker"]))
            length_s = turn["end_s"] - turn["start_s"]
            measures["turn length, s"].append(length_s)
            quality = turn.get("quality") or {}
            if "words_per_s" not in quality and length_s > 0:
                measures["words_per_s"].append(len(turn["text"].split()) / length_s)
            for name, value in quality.items():
                if isinstance(value, (int, float)) and np.isfinite(value):
                    measures[name].append(float(value))
            for mark in ("overlap", "backchannel"):
                seen["marks"][mark] += bool(turn.get(mark))
            learn = turn.get("learn")
            seen["marks"]["context only"] += isinstance(learn, dict) and not any(learn.values())
            if turn.get("emotion"):
                seen["marks"][f"emotion: {turn['emotion'].get('label')}"] += 1
        for before, after in zip(turns, turns[1:], strict=False):
            measures["gap between turns, s"].append(after["start_s"] - before["end_s"])
    counts = {"conversations": len(metas), "turns": num_turns, "speakers": len(names), "recordings": len(sources)}
    return dict(measures), {**counts, **{name: dict(counter.most_common()) for name, counter in seen.items()}}


def _rejected(path: Path) -> dict[tuple[str, str], tuple[int, float]]:
    if not path.is_file():
        return {}
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            key = (str(row["stage"]), str(row["reason"]))
            rows, seconds = found.get(key, (0, 0.0))
            found[key] = (rows + 1, seconds + float(row.get("duration_s", 0.0)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a row of failures.jsonl ({error!r}); run stages=[merge] again") from error
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def print_tables(found: Survey, console: Console) -> None:
    """What there is, how it is spread, what was left out."""
    table = _table("split", "hours", "samples", "shards", "unreadable")
    for split in found.splits:
        table.add_row(split.name, f"{split.hours:.2f}", str(split.num_samples), str(split.num_shards), str(split.num_bad))
    console.print(table)
    counts = found.counts
    console.print(
        f"{counts['turns']} turns of {counts['speakers']} speakers in {counts['conversations']} conversations from "
        f"{counts['recordings']} recordings were looked at; codec: {found.codec}",
        highlight=False,
        markup=False,
    )
    table = _table("measure", "values", "5%", "median", "95%", "mean")
    for name, values in sorted(found.measures.items()):
        low, middle, high = np.percentile(values, (5, 50, 95))
        table.add_row(name, str(len(values)), *(number(value) for value in (low, middle, high, statistics.fmean(values))))
    console.print(table)
    if found.rejected:
        table = _table("stage, reason", "rows", "hours", "share")
        for (stage, reason), (rows, seconds) in found.rejected.items():
            table.add_row(f"{stage}, {reason}", str(rows), f"{seconds / 3600:.3f}", f"{share(found, seconds):.2%}")
        console.print(table)


def number(value: float) -> str:
    """Three digits, without powers of ten where a person reads them."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def share(found: Survey, seconds: float) -> float:
    """Of what was kept and what was rejected together."""
    return seconds / 3600 / max(found.hours + found.rejected_hours, 1e-9)


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect", description="Tables and a page of what a data folder holds.")
    parser.add_argument("folder", type=Path, help="a data folder, or one of its splits")
    parser.add_argument("--out", type=Path, help=f"the page; default: {PAGE_NAME} in the folder")
    parser.add_argument("--clips", type=int, default=NUM_CLIPS, help="random conversations to listen to; default: %(default)s")
    parser.add_argument("--max-samples", type=int, default=MAX_SAMPLES, help="of a split that are read; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which conversations; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="decodes the codes; default: %(default)s")
    options = parser.parse_args(arguments)
    if options.clips < 0 or options.max_samples < 1:
        parser.error("--clips must be 0 or more, --max-samples 1 or more")
    console = Console(soft_wrap=True)
    try:
        found = survey(options.folder, options.max_samples)
        print_tables(found, console)
        from data_prep.inspect_page import write_page

        page = options.out or options.folder / PAGE_NAME
        write_page(found, page, options.clips, random.Random(options.seed), options.device)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"page: {page}", highlight=False, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
