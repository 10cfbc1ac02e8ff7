"""Voice presets: a short recorded prompt, kept as codes with who spoke it and on what terms.

A preset is a folder `<voices>/<name>/` with `voice.json` and `codes.safetensors`. Its turn goes in front of a reply as
context, so that the reply goes on in its voice. Only codes are kept, and only those of the codec they were made with.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.codec import Codec
from csm.frames import Turn, seconds_from_frames
from csm.generation.watermark import check_waveform

DESCRIPTION_NAME, CODES_NAME = "voice.json", "codes.safetensors"
MAX_DURATION_S = 30.0  # a longer prompt leaves little of the window for the conversation
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


@dataclass(kw_only=True)
class Voice:
    """A preset.

    Attributes:
        name: how `--voice` calls it: letters, digits, "-" and "_".
        text: what is said in the prompt.
        speaker: the number it is spoken under when none is asked for; matters to models that know speakers by number.
        speaker_name: whose voice it is.
        licence: of the recording.
        consent: how the speaker agreed to the use of their voice.
        codec_digest: of the codec the codes belong to.
        codes: int64 [K, F].
    """

    name: str
    text: str
    speaker: int
    speaker_name: str
    licence: str
    consent: str
    codec_digest: str
    codes: Tensor

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"voice name {self.name!r}: expected letters, digits, '-' and '_', at most 64")
        for field in ("text", "speaker_name", "licence", "consent"):
            if not str(getattr(self, field)).strip():
                raise ValueError(f"voice {self.name}: {field} is empty; a voice is kept with what it says, whose it is, and on what terms")
        if self.codes.ndim != 2 or self.codes.shape[1] == 0:
            raise ValueError(f"voice {self.name}: codes have shape {tuple(self.codes.shape)}, expected [K, F]")

    @property
    def duration_s(self) -> float:
        return seconds_from_frames(self.codes.shape[1])

    def turn(self, codec: Codec, speaker: int | None = None) -> Turn:
        """The prompt as a turn of context.

        Raises:
            ValueError: if the codes are of another codec.
        """
        if self.codec_digest != codec.digest:
            raise ValueError(
                f"voice {self.name} was made with codec {self.codec_digest[:12]}, this model's is {codec.name} {codec.digest[:12]}; "
                "add the voice again from its recording with `csm voices add`"
            )
        return Turn(self.speaker if speaker is None else speaker, self.text, codes=self.codes)


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


def save_voice(voice: Voice, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a preset into `folder/<name>/`; returns that folder.

    Raises:
        FileExistsError: if there is one of that name.
    """
    target = folder / voice.name
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another name or remove it first")
    target.mkdir(parents=True, exist_ok=True)
    part = target / f"{CODES_NAME}.tmp"
    save_file({"codes": voice.codes.to(torch.int16).contiguous()}, part)
    os.replace(part, target / CODES_NAME)
    description = {key: value for key, value in asdict(voice).items() if key != "codes"}
    part = target / f"{DESCRIPTION_NAME}.tmp"
    part.write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, target / DESCRIPTION_NAME)
    return target


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
