"""The demo corpus's voice presets: of each speaker one training turn, so that `--voice NAME` works from the offline model alone.

They are taken from the finished shards, whose bytes stay as they are; a corpus built before there were presets gets them, too.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

from csm.codec.folder import DESCRIPTION_NAME as CODEC_DESCRIPTION
from csm.codec.voices import VOICES_FOLDER, Voice, save_voice
from csm.data.shards import iter_samples
from csm.frames import Turn
from data_prep.synthesis import LICENSE, PACKAGE

MAX_FRAMES = 30  # 2.4 s: long enough to hear a voice, short enough to leave the window free
NUM_CONVERSATIONS = 200  # that are looked at
CONSENT = f"a made-up voice, spoken by {PACKAGE}; nobody was recorded for it, corpus.json names the licences of what it is made of"


def add_voices(folder: Path, description: dict[str, Any]) -> Path:
    """Write `<folder>/voices/` unless it is there; complete under its name or not there.

    Args:
        description: what corpus.json holds.
    """
    target = folder / VOICES_FOLDER
    if target.is_dir():
        return target
    part = folder / f"{VOICES_FOLDER}.tmp"
    shutil.rmtree(part, ignore_errors=True)
    digest = json.loads((folder / "codec" / CODEC_DESCRIPTION).read_text(encoding="utf-8"))["digest"]
    names = {speaker["speaker"]: speaker["name"] for speaker in description["speakers"]}
    longest: dict[int, Turn] = {}
    # Phase 0 is whole turns: the later ones leave out their first samples.
    whole = (sample for sample in iter_samples(folder / "train") if sample.key.endswith("-0"))
    for sample in islice(whole, NUM_CONVERSATIONS):
        for turn in sample.turns:
            num_frames = 0 if turn.codes is None else turn.codes.shape[1]
            if _num_frames(longest.get(turn.speaker)) < num_frames <= MAX_FRAMES:
                longest[turn.speaker] = turn
    for speaker, turn in sorted(longest.items()):
        assert turn.codes is not None
        voice = Voice(
            name=names[speaker],
            text=turn.text,
            speaker=speaker,
            speaker_name=f"{names[speaker]} of the demo corpus",
            licence=LICENSE,
            consent=CONSENT,
            codec_digest=digest,
            codes=turn.codes,
        )
        save_voice(voice, part)
    os.replace(part, target)
    return target


def _num_frames(turn: Turn | None) -> int:
    return 0 if turn is None or turn.codes is None else turn.codes.shape[1]
