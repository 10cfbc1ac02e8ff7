"""What is spoken: the utterances of a held-out split, alone and as the answer in a conversation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from csm.data.shards import Sample, iter_samples
from csm.frames import SAMPLE_RATE_HZ, Turn, num_samples_from_frames

SINGLE, CONTEXT, DIALOGUE = "single", "context", "dialogue"


@dataclass(frozen=True)
class Utterance:
    """A line to speak, and how it really sounds.

    Attributes:
        key: of its sample.
        suite: "single"; "context" when `context` turns of real speech come first; "dialogue" when the model spoke those too.
        voice: the speaker's name, or its number where the corpus gives none.
        codes: [K, F] int64, the reference's.
        audio: [S] float32 at 24 kHz, or None when the shards carry no audio.
    """

    key: str
    suite: str
    speaker: int
    voice: str
    text: str
    codes: Tensor
    audio: np.ndarray | None
    context: list[Turn] = field(default_factory=list)

    @property
    def reference_s(self) -> float:
        """Duration of the reference: of its audio, else of its frames."""
        num_samples = num_samples_from_frames(self.codes.shape[1]) if self.audio is None else len(self.audio)
        return num_samples / SAMPLE_RATE_HZ


def utterance_from_sample(sample: Sample) -> Utterance:
    """The last turn of a conversation, with the turns before it as context."""
    *before, last = sample.turns
    raw = sample.meta["turns"][-1]
    audio = sample.audio()
    if audio is not None:
        audio = audio[round(raw["start_s"] * SAMPLE_RATE_HZ) : round(raw["end_s"] * SAMPLE_RATE_HZ)].numpy()
    assert last.codes is not None
    return Utterance(
        key=sample.key,
        suite=CONTEXT if before else SINGLE,
        speaker=last.speaker,
        voice=raw.get("speaker_name") or str(last.speaker),
        text=last.text,
        codes=last.codes,
        audio=audio,
        context=before,
    )


def read_suites(split: Path, *, context: bool) -> dict[str, list[Utterance]]:
    """Read the suites of a split.

    Args:
        split: folder of shards.
        context: whether to read conversations of two and more turns.
    Raises:
        ValueError: if a suite that was asked for has nothing in it: a row of the table must not go missing.
    """
    suites: dict[str, list[Utterance]] = {SINGLE: [], CONTEXT: []} if context else {SINGLE: []}
    for sample in iter_samples(split):
        name = CONTEXT if len(sample.turns) > 1 else SINGLE
        if name in suites:
            suites[name].append(utterance_from_sample(sample))
    for name, utterances in suites.items():
        if not utterances:
            wanted, advice = {
                SINGLE: ("of one turn", "name another split="),
                CONTEXT: ("of two turns or more", "set context=false to leave this suite out"),
            }[name]
            raise ValueError(f"{split}: suite {name!r} needs conversations {wanted}, found none; {advice}")
    return suites


def evenly_spaced(items: list, count: int) -> list:
    """`count` of the items, from first to last; all of them when `count` is 0 or more than there are."""
    if not 0 < count < len(items):
        return items
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]
