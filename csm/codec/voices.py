"""A voice preset on disk: a short prompt as codes of one codec, with who spoke it and on what terms.

`<voices>/<name>/` holds `voice.json` and `codes.safetensors`. Recordings become presets, and presets are found and read, in
`csm.generation.voices`; data preparation writes those of its corpora through this module, too.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from csm.codec.interface import Codec
from csm.frames import Turn, seconds_from_frames

VOICES_FOLDER = "voices"  # beside a corpus's splits and a checkpoint's weights
DESCRIPTION_NAME, CODES_NAME = "voice.json", "codes.safetensors"
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
