"""Voice presets: recordings become them, and they are found and read by name.

A preset's turn goes in front of a reply as context, so that the reply goes on in its voice. How one lies on disk is
`csm.codec.voices`. Only codes are kept, and only those of the codec they were made with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from csm.codec import Codec
from csm.codec.voices import CODES_NAME, DESCRIPTION_NAME, Voice
from csm.generation.watermark import check_waveform

MAX_DURATION_S = 30.0  # a longer prompt leaves little of the window for the conversation


def voice_from_recording(
    name: str,
    waveform: Tensor,
    codec: Codec,
    *,
    text: str,
    speaker_name: str,
    licence: str,
    consent: str,
    speaker: int = 0,
) -> Voice:
    """Encode a recording, float32 [S] at 24 kHz, as a preset.

    Raises:
        ValueError: if the recording cannot be used, or a field is empty.
    """
    waveform = check_waveform(waveform)
    duration_s = waveform.shape[0] / codec.sample_rate_hz
    if duration_s > MAX_DURATION_S:
        raise ValueError(f"the recording lasts {duration_s:.1f} s, expected at most {MAX_DURATION_S:g}; cut it and its text")
    return Voice(
        name=name,
        text=text,
        speaker=speaker,
        speaker_name=speaker_name,
        licence=licence,
        consent=consent,
        codec_digest=codec.digest,
        codes=codec.encode([waveform])[0].cpu(),
    )


def load_voice(name: str, folders: Sequence[Path]) -> Voice:
    """Read the preset of that name from the first folder that has it.

    Raises:
        FileNotFoundError: if none has it; the message lists those there are.
        ValueError: if its files cannot be read.
    """
    found = find_voices(folders)
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise FileNotFoundError(f"no voice {name!r} in {', '.join(str(folder) for folder in folders)}; there are: {known}")
    folder = found[name]
    try:
        description = json.loads((folder / DESCRIPTION_NAME).read_text(encoding="utf-8"))
        codes = load_file(folder / CODES_NAME)["codes"].long()
        return Voice(**{**description, "name": name}, codes=codes)
    except (json.JSONDecodeError, SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a readable voice ({error}); add it again with `csm voices add`") from error


def find_voices(folders: Sequence[Path]) -> dict[str, Path]:
    """The presets in some folders: name -> folder. Of equal names the first folder's counts."""
    found: dict[str, Path] = {}
    for folder in folders:
        for description in sorted(folder.glob(f"*/{DESCRIPTION_NAME}")):
            found.setdefault(description.parent.name, description.parent)
    return found
