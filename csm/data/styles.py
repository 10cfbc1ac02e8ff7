"""Style tags: what shards say about how a turn is spoken, written in front of its text as `(happy) seven four two`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def style_tag(turn: dict) -> str | None:
    """The tag of a turn of a shard's JSON: its `style`, else the label of its `emotion`; None where it has neither."""
    style = turn.get("style") or (turn.get("emotion") or {}).get("label")
    return f"({'-'.join(str(style).lower().split())})" if style else None


@dataclass(frozen=True)
class StyleTags:
    """Puts tags in front of texts.

    A tag that is left out is left out in every epoch, for a turn's length is measured once: which ones, the sample's key decides,
    so copies of a recording (`num_phases`) differ.

    Attributes:
        dropout: share of tagged turns that go without.
    """

    dropout: float

    def text(self, turn: dict, key: str, index: int) -> str:
        """The text to learn of a turn of a shard's JSON, the `index`-th of the sample `key`."""
        tag = style_tag(turn)
        if tag is None or _uniform(f"{key}/{index}") < self.dropout:
            return str(turn["text"])
        return f"{tag} {turn['text']}"


def _uniform(name: str) -> float:
    """A number in [0, 1) that the name decides."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
