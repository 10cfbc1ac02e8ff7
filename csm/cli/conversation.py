"""What `csm generate` reads: conversation.json, and requests as JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from csm.frames import Turn


def read_conversation(path: Path) -> list[Turn]:
    """The turns of a conversation.json; audio is read, resampled to 24 kHz and mixed down to mono.

    Raises:
        FileNotFoundError, ValueError: with the file, the turn and what was expected.
    """
    return turns_from_json(read_json(path), path.parent, str(path))


def turns_from_json(entries: Any, folder: Path, where: str) -> list[Turn]:
    from csm.frames import Turn
    from csm.generation.audio_files import read_audio

    expected = '{"speaker": 0, "text": "...", "audio": "path.wav"}'
    if not isinstance(entries, list):
        raise ValueError(f"{where}: a {type(entries).__name__}, expected a list of {expected}")
    turns = []
    for index, entry in enumerate(entries):
        place = f"{where}: turn {index}"
        if not isinstance(entry, dict) or set(entry) != {"speaker", "text", "audio"}:
            got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise ValueError(f"{place} is {got}, expected {expected}")
        if type(entry["speaker"]) is not int or not isinstance(entry["text"], str) or not isinstance(entry["audio"], str):
            raise ValueError(f"{place}: speaker must be a whole number, text and audio strings; expected {expected}")
        try:
            audio, _ = read_audio(folder / entry["audio"])
        except (ValueError, OSError) as error:
            raise ValueError(f"{place}: {error}") from error
        turns.append(Turn(entry["speaker"], entry["text"], audio=audio))
    return turns


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        FileNotFoundError, ValueError: with the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f'{path}: line {number} is a {type(entry).__name__}, expected an object such as {{"text": "..."}}')
        lines.append(entry)
    if not lines:
        raise ValueError(f"{path}: no requests in it")
    return lines
