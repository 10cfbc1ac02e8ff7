"""The manifest between stages: JSON Lines, one recording a line, keyed by the digest of its bytes, checked as it is read.

Which files become lines is `inputs`' business, which line belongs to which split and unit is `planning`'s.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from data_prep.failures import Rejected
from data_prep.tars import opened

DIGEST_CHARACTERS = 16
MAX_SPEAKER = 9_999
_BLOCK_BYTES = 2**20
_LABEL = re.compile(r"\w+(?:[ -]\w+)*")  # of a style: it is written in brackets, in front of a text


@dataclass
class ManifestTurn:
    """What one speaker said.

    Attributes:
        text: as spoken.
        speaker: a number; what it means is the manifest's business.
        speaker_name: the same over all recordings where given; keeps a speaker's recordings in one split.
        start_s, end_s: in the recording; None is its beginning, or its end.
        channel: of the recording, from 0, where every speaker has one; None is the mix of all.
        words: `word, start_s, end_s, probability` of each, times in the recording, as a recogniser wrote them.
        overlap: others talk at the same time, as far as it was heard before turns were chosen.
        backchannel: a short "mm-hmm" while or right after another speaks.
        follows_gap: what was said before it was left out, so it is no answer to the turn before it here.
        learn: false keeps it as context that no loss is taken of.
        quality: measures by name (docs/data.md).
        emotion: `label` and `probability`.
        style: how it is said, in a word or a few; goes before `emotion` where a tag is made of them.
    """

    text: str
    speaker: int = 0
    speaker_name: str | None = None
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None
    words: list[dict[str, Any]] = field(default_factory=list)
    overlap: bool = False
    backchannel: bool = False
    follows_gap: bool = False
    learn: bool = True
    quality: dict[str, float] = field(default_factory=dict)
    emotion: dict[str, Any] | None = None
    style: str | None = None


_OPTIONAL = {
    "words": [],
    "overlap": False,
    "backchannel": False,
    "follows_gap": False,
    "learn": True,
    "quality": {},
}  # left out of a manifest line where they say nothing


@dataclass
class Recording:
    """A line of the manifest.

    Attributes:
        digest: sha256 of the file's bytes, 16 hex.
        source: its path relative to the input.
        num_bytes: of the file.
        duration_s: as its header says.
    """

    digest: str
    source: str
    num_bytes: int
    duration_s: float
    turns: list[ManifestTurn] = field(default_factory=list)
    license: str | None = None
    language: str | None = None


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
    "bool": (bool,),
    "dict[str, float]": (dict,),
    "dict[str, Any] | None": (dict, type(None)),
}


def check_object(raw: object, schema: type, what: str, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check a JSON object against a dataclass: its keys, required ones, types, finite numbers.

    Args:
        what: names the object in messages.
        more: keys allowed beyond the dataclass's.
    Raises:
        Rejected: "schema", with the key.
    """
    if not isinstance(raw, dict):
        raise Rejected("schema", f"{what} is a {type(raw).__name__}, expected an object")
    known = {item.name: item for item in fields(schema)}
    for key in raw:
        if key not in known and key not in more:
            close = difflib.get_close_matches(str(key), [*known, *more], n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise Rejected("schema", f"{what} has an unknown key {key!r}{hint}; expected {', '.join([*known, *more])}")
    for name, item in known.items():
        if name not in raw:
            if item.default is MISSING and item.default_factory is MISSING:
                raise Rejected("schema", f"{what} has no {name!r}")
            continue
        value = raw[name]
        kind = str(item.type)
        expected = (list,) if kind.startswith("list[") else _TYPES[kind]
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise Rejected("schema", f"{what}: {name} is {value!r}, expected {item.type}")
        if isinstance(value, float) and not math.isfinite(value):
            raise Rejected("schema", f"{what}: {name} is {value!r}, expected a finite number")
        if isinstance(value, str) and not _is_unicode(value):
            raise Rejected("schema", f"{what}: {name} is {value!r}, which is not Unicode text")
    return raw


def check_turns(raw: object, what: str, *, may_be_empty: bool = False) -> list[ManifestTurn]:
    """Turns of a JSON array, in the order of their starts.

    Args:
        may_be_empty: of recordings that nobody has listened to yet.
    Raises:
        Rejected: "schema", names the turn.
    """
    if raw == [] and may_be_empty:
        return []
    if not isinstance(raw, list) or not raw:
        raise Rejected("schema", f"{what}: turns is {raw!r}, expected a list of at least one turn")
    turns = [_check_turn(entry, f"{what}, turn {index}", len(raw) == 1) for index, entry in enumerate(raw)]
    if len({turn.channel is None for turn in turns}) > 1:
        raise Rejected("schema", f"{what}: some turns name a channel, some do not; a channel is a speaker's, or the channels are mixed")
    return sorted(turns, key=lambda turn: turn.start_s or 0.0)  # stable: equal starts keep their order


def _check_turn(raw: object, what: str, is_only: bool) -> ManifestTurn:
    if isinstance(raw, dict) and isinstance(raw.get("emotion"), str):  # as people write it: sure of it
        raw = {**raw, "emotion": {"label": raw["emotion"], "probability": 1.0}}
    values = check_object(raw, ManifestTurn, what)
    if "speaker" not in values and values.get("channel") is not None:
        values = {**values, "speaker": values["channel"]}
    turn = ManifestTurn(**values)
    if not 0 <= turn.speaker <= MAX_SPEAKER:
        raise Rejected("schema", f"{what}: speaker is {turn.speaker}, expected 0 to {MAX_SPEAKER}")
    if turn.channel is not None and turn.channel < 0:
        raise Rejected("schema", f"{what}: channel is {turn.channel}, expected a number from 0")
    if not is_only and (turn.start_s is None or turn.end_s is None):
        raise Rejected("schema", f"{what} has no start_s and end_s; only a recording's single turn may leave them out")
    start_s = turn.start_s or 0.0
    if start_s < 0 or (turn.end_s is not None and turn.end_s <= start_s):
        raise Rejected("schema", f"{what}: from {turn.start_s} to {turn.end_s} s, expected 0 <= start_s < end_s")
    for key, label in (("style", turn.style), ("emotion", (turn.emotion or {}).get("label", "x"))):
        if label is not None and not (isinstance(label, str) and _LABEL.fullmatch(label)):
            raise Rejected("schema", f"{what}: {key} is {label!r}, expected words of letters and digits, such as happy")
    turn.text = normalised(turn.text, f"{what}: its text")
    if not turn.text:
        raise Rejected("no_text", f"{what}: its text is empty")
    return turn


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def normalised(text: str, what: str = "the text") -> str:
    """One line, single spaces, composed characters: what the eye sees stays as it is.

    Raises:
        Rejected: "bad_text", for control characters and lone surrogates.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    bad = next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None)
    if bad is not None:
        raise Rejected("bad_text", f"{what} has the character U+{ord(bad):04X}, which nobody says")
    return text


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, its first 16 hex digits.

    Raises:
        Rejected: "unreadable".
    """
    sha = hashlib.sha256()
    try:
        with opened(path) as stream:
            while block := stream.read(_BLOCK_BYTES):
                sha.update(block)
    except OSError as error:
        raise Rejected("unreadable", f"{error.strerror or error}") from error
    return sha.hexdigest()[:DIGEST_CHARACTERS]


def manifest_line(recording: Recording) -> str:
    """A line of the manifest; keys without a value are left out."""
    row = {key: value for key, value in vars(recording).items() if value is not None}  # asdict would copy every word
    row["turns"] = [
        {key: value for key, value in vars(turn).items() if value is not None and (key not in _OPTIONAL or value != _OPTIONAL[key])}
        for turn in recording.turns
    ]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n"


def read_manifest(lines: Iterable[str], where: str, first_line: int = 1) -> Iterator[Recording]:
    """The recordings of manifest lines; without turns, those that are still to be transcribed.

    Raises:
        ValueError: names the file, the line, the key and what was expected.
    """
    for number, line in enumerate(lines, first_line):
        try:
            values = dict(check_object(json.loads(line), Recording, "the line"))
            values["turns"] = check_turns(values.get("turns"), "the line", may_be_empty=True)
        except (json.JSONDecodeError, Rejected) as error:
            raise ValueError(f"{where}:{number}: {error}; run stages=[manifest] again") from error
        yield Recording(**values)
