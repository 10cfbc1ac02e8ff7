"""A blind listening test: two systems' clips of the same lines as pairs on a page, votes on a scale, and what they say.

The page holds the sound and nothing that tells whose it is: which side is whose is in a key file beside it, for whoever scores.
Votes are on the comparison scale of ITU-T P.800 annex E (CMOS): -3, the second is much worse, to 3, it is much better.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment

from csm.evaluation.metrics import Estimate, mean_estimate, seed_for
from csm.whole_files import write_text

KEY_SUFFIX = ".key.json"
SCALE = {
    3: "much better",
    2: "better",
    1: "slightly better",
    0: "about the same",
    -1: "slightly worse",
    -2: "worse",
    -3: "much worse",
}


@dataclass(frozen=True)
class Pair:
    """One line spoken by both; the paths are of their clips."""

    line: str
    text: str
    a: Path
    b: Path


def find_pairs(a: Path, b: Path, row: str = "model") -> list[Pair]:
    """The lines that both evaluations have a clip of, in the row named.

    Args:
        a, b: runs, or evaluation folders (samples.jsonl and clips/).
    Raises:
        FileNotFoundError: if one was not evaluated.
        ValueError: if they share no clip.
    """
    clips_a, clips_b = _clips(a, row), _clips(b, row)
    pairs = [Pair(line, text, wav, clips_b[line][1]) for line, (text, wav) in clips_a.items() if line in clips_b]
    if not pairs:
        raise ValueError(f"{a} and {b} have no line in common in row {row!r}: evaluate both on the same split, and name a row of both")
    return pairs


def _clips(place: Path, row: str) -> dict[str, tuple[str, Path]]:
    folder = next((folder for folder in (place, place / "evaluation") if (folder / "samples.jsonl").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{place}: no samples.jsonl there or in evaluation/; run `python evaluate.py run={place}` first")
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    found = {line["key"]: (line["text"], folder / line["wav"]) for line in lines if line["row"] == row and line["wav"]}
    if not found:
        rows = ", ".join(sorted({line["row"] for line in lines}))
        raise ValueError(f"{folder}: no clips of row {row!r}; there are: {rows}")
    return found


def write_page(pairs: Sequence[Pair], page: Path, *, names: tuple[str, str], num_pairs: int = 20, seed: int = 0) -> Path:
    """Write the page, self-contained, and its key; return the key's path. Order and sides are drawn from the seed.

    Raises:
        ValueError: if there is nothing to listen to.
    """
    if not pairs or num_pairs < 1:
        raise ValueError(f"{len(pairs)} pairs and num_pairs={num_pairs}: nothing to listen to")
    draws = random.Random(seed_for(seed, "blind"))
    drawn = draws.sample(list(pairs), min(num_pairs, len(pairs)))
    shown, key = [], []
    for number, pair in enumerate(drawn):
        is_swapped = draws.random() < 0.5
        first, second = (pair.b, pair.a) if is_swapped else (pair.a, pair.b)
        shown.append({"number": number, "text": pair.text, "first": _data_uri(first), "second": _data_uri(second)})
        key.append({"number": number, "line": pair.line, "first": "b" if is_swapped else "a"})
    test = f"{seed_for(seed, names[0], names[1], *(pair.line for pair in drawn)):016x}"  # ties votes to their key, tells nothing
    template = Environment(autoescape=True).from_string(Path(__file__).with_name("blind.html.j2").read_text(encoding="utf-8"))
    write_text(page, template.render(pairs=shown, scale=SCALE, test=test))
    key_path = page.with_name(page.name + KEY_SUFFIX)
    told = {"test": test, "a": names[0], "b": names[1], "seed": seed, "pairs": key}
    write_text(key_path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
    return key_path


def _data_uri(path: Path) -> str:
    return "data:audio/flac;base64," + base64.b64encode(path.read_bytes()).decode()


def score(key_path: Path, votes: Sequence[Path], *, seed: int = 0) -> dict[str, Any]:
    """How much better the second named system is: mean of all votes and its 95% interval, and how often each was preferred.

    A vote is counted once a listener and pair; the interval is a bootstrap over votes.

    Raises:
        ValueError: if a file is no vote of this test, or holds nothing.
    """
    key = _read(key_path, ("test", "a", "b", "pairs"))
    sides = {pair["number"]: pair["first"] for pair in key["pairs"]}
    values: list[float] = []
    listeners = set()
    for path in votes:
        told = _read(path, ("test", "listener", "votes"))
        if told["test"] != key["test"]:
            raise ValueError(f"{path}: votes of another page (test {told['test']}), the key is of {key['test']}")
        if told["listener"] in listeners:
            raise ValueError(f"{path}: listener {told['listener']!r} has voted already; a listener counts once")
        listeners.add(told["listener"])
        for number, value in told["votes"].items():
            if int(number) not in sides or value not in SCALE:
                raise ValueError(f"{path}: vote {value!r} for pair {number}, expected -3 to 3 for one of {len(sides)} pairs")
            values.append(float(value if sides[int(number)] == "a" else -value))  # of the second clip over the first
    if not values:
        raise ValueError("no vote in any file; send the page to somebody, and give the files that it saves")
    mean: Estimate = mean_estimate(values, seed=seed, name="cmos")
    return {
        "a": key["a"],
        "b": key["b"],
        "cmos_b_over_a": mean.as_json(),
        "b_preferred": sum(value > 0 for value in values) / len(values),
        "a_preferred": sum(value < 0 for value in values) / len(values),
        "num_listeners": len(listeners),
    }


def _read(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    missing = [key for key in keys if not isinstance(told, dict) or key not in told]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]!r}; expected a file with {', '.join(keys)}")
    return told
