"""Several evaluated runs side by side: the same lines, clip against clip."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from csm.evaluation.judging import Verdict
from csm.evaluation.metrics import Estimate, ratio_estimate


@dataclass(frozen=True)
class EvaluatedRun:
    """What an evaluation left.

    Attributes:
        folder: of summary.json, samples.jsonl and clips/.
        verdicts: by (row, key).
    """

    name: str
    folder: Path
    summary: Mapping
    verdicts: Mapping[tuple[str, str], Verdict]


@dataclass(frozen=True)
class Difference:
    """A metric of two runs over the lines that both spoke.

    Attributes:
        here, there: its values.
        by: here less there, with the interval of paired clips.
    """

    row: str
    metric: str
    style: str
    here: float
    there: float
    by: Estimate
    smaller_is_better: bool


_METRICS: tuple[tuple[str, str, bool, Callable[[Verdict], tuple[float, float] | None]], ...] = (  # a numerator and a denominator a clip
    ("WER", "percent", True, lambda v: (v.word_errors.errors, v.word_errors.num_words)),
    ("Right voice", "percent", False, lambda v: (float(v.voice_guess == v.voice), 1.0)),
    ("Similarity", "nats", False, lambda v: (v.voice_similarity, 1.0)),
    ("Mel distance", "decibel", True, lambda v: None if v.mel_distance is None else (v.mel_distance, 1.0)),
    ("DNSMOS", "score", False, lambda v: (v.mos["dnsmos"], 1.0) if "dnsmos" in v.mos else None),
)


def read_runs(paths: Sequence[str]) -> list[EvaluatedRun]:
    """Read runs, or evaluation folders.

    Raises:
        FileNotFoundError: if one was not evaluated.
        ValueError: if two have one name.
    """
    runs = []
    for path in map(Path, paths):
        folder = next((f for f in (path, path / "evaluation") if (f / "summary.json").is_file()), None)
        if folder is None:
            raise FileNotFoundError(f"compare: {path} holds no evaluation (summary.json); run `python evaluate.py run={path}` first")
        name = folder.parent.name if folder.name == "evaluation" else folder.name
        runs.append(EvaluatedRun(name, folder, json.loads((folder / "summary.json").read_text(encoding="utf-8")), read_verdicts(folder)))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"compare: names {names}; each folder must have a name of its own to be told apart in the report")
    return runs


def read_verdicts(folder: Path) -> dict[tuple[str, str], Verdict]:
    """The lines of samples.jsonl; fields that this version does not know are passed over, those it lacks are empty."""
    known = {field.name for field in fields(Verdict)}
    verdicts = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        verdict = Verdict(**{key: value for key, value in json.loads(line).items() if key in known})
        verdicts[verdict.row, verdict.key] = verdict
    return verdicts


def differences(here: Mapping, verdicts: Sequence[Verdict], other: EvaluatedRun, *, seed: int) -> list[Difference]:
    """Every metric of every row that both runs have, over the lines that both spoke.

    Args:
        here: summary of the run that `verdicts` are of.
    Raises:
        ValueError: if the other run was evaluated on other data: its lines are other lines.
    """
    for what in ("split", "data_digest"):
        if here[what] != other.summary[what]:
            raise ValueError(f"compare: {other.folder} was evaluated on {what} {other.summary[what]!r}, this run on {here[what]!r}")
    found = []
    verdicts = [Verdict(**v.as_json()) for v in verdicts]  # type: ignore[arg-type]  # rounded as the other's are: equal clips are equal
    for row in here["rows"]:
        if row["source"] != "model":
            continue
        pairs = [(v, other.verdicts[v.row, v.key]) for v in verdicts if v.row == row["name"] and (v.row, v.key) in other.verdicts]
        pairs = [(a, b) for a, b in pairs if a.text == b.text]
        for metric, style, smaller_is_better, parts in _METRICS:
            both = [(parts(a), parts(b)) for a, b in pairs]
            counted = [(a, b) for a, b in both if a is not None and b is not None]
            if not counted:
                continue
            bottom = [a[1] for a, _ in counted]
            by = ratio_estimate([a[0] - b[0] for a, b in counted], bottom, seed=seed, name=f"{metric}/{row['name']}/{other.name}")
            values = [sum(pair[side][0] for pair in counted) / sum(bottom) for side in (0, 1)]
            found.append(Difference(row["title"], metric, style, values[0], values[1], by, smaller_is_better))
    return found
