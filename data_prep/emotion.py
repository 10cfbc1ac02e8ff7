"""How a turn is said, by `csm.listening.emotion`'s classifier (`encode.emotion`): its label in the turn's metadata."""

from __future__ import annotations

from functools import lru_cache

from csm.listening.emotion import EmotionClassifier
from data_prep.encode import Conversation


@lru_cache(maxsize=1)
def load_labeller(source: str, digest: str, device: str) -> EmotionClassifier:
    """The classifier, loaded once a process.

    Args:
        digest: of the files that the preparation was planned with.
    Raises:
        FileNotFoundError: if there is no such model and none can be had.
        ValueError: if it is none, or another than planned.
    """
    labeller = EmotionClassifier(source, device)
    if labeller.digest != digest:
        raise ValueError(f"encode.emotion={source} is another model than the one this preparation began with; run stages=[manifest] again")
    return labeller


def label_turns(conversation: Conversation, labeller: EmotionClassifier) -> None:
    """Give every turn its label; one that the manifest gave stays."""
    for cut in conversation.turns:
        if cut.turn.emotion is None:
            label, probability = labeller.classify(conversation.clip(cut).numpy())
            cut.turn.emotion = {"label": label, "probability": round(probability, 4)}
