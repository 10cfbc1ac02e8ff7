"""Which sounds a clip is made of, by a CTC network over phonemes, and which of several pronunciations lies in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from csm.listening.acoustics import is_silent, resample
from csm.reachable import can_reach

DEFAULT_SOURCE = "facebook/wav2vec2-lv-60-espeak-cv-ft"
RATE_HZ = 16_000
_NO_SOUND = ("<pad>", "<s>", "</s>", "<unk>", "|", " ")


class PhonemeRecogniser:
    """A wav2vec 2.0 fine-tuned on phonemes, greedy."""

    def __init__(self, source: str = DEFAULT_SOURCE) -> None:
        """Load a folder or hub id in transformers' layout, with its vocab.json.

        Raises:
            ValueError: if it cannot be had; the message says how to get it.
        """
        from transformers import AutoModelForCTC

        self.source = source
        is_local = Path(source).is_dir() or not can_reach("huggingface.co")  # what is in the hub's cache is taken from there
        try:
            self._model = AutoModelForCTC.from_pretrained(source, local_files_only=is_local).eval()
            vocabulary = json.loads(_vocabulary(source, is_local).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"phonemes: {source} cannot be had here ({str(error).splitlines()[0][:120]}); where the hub can be reached run "
                f"`hf download {source}`, or set suites.phonemes=<folder>"
            ) from error
        self._symbols = {index: symbol for symbol, index in vocabulary.items()}
        self._blank = self._model.config.pad_token_id

    @torch.inference_mode()
    def transcribe(self, audio: np.ndarray) -> list[str]:
        """Phonemes of 24 kHz float32 [S], in the network's symbols; stress and length marks are its own."""
        if is_silent(audio):
            return []
        clip = resample(audio, RATE_HZ)
        clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)  # as its feature extractor does
        best = self._model(torch.from_numpy(clip.astype(np.float32))[None]).logits[0].argmax(dim=-1)
        symbols = [self._symbols.get(index, "<unk>") for index in torch.unique_consecutive(best).tolist() if index != self._blank]
        return [symbol for symbol in symbols if symbol not in _NO_SOUND]

    def describe(self) -> dict[str, str]:
        """Name and version for the summary."""
        return {
            "name": self.source,
            "package": "transformers",
            "sha256": str(getattr(self._model.config, "_commit_hash", None) or "unknown"),
        }


def _vocabulary(source: str, is_local: bool) -> Path:
    local = Path(source) / "vocab.json"
    if local.parent.is_dir():
        return local
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(source, "vocab.json", local_files_only=is_local))


def nearest_pronunciation(phonemes: Sequence[str], candidates: Sequence[Sequence[str]]) -> int | None:
    """Index of the candidate that some stretch of `phonemes` is nearest to, in edits a phoneme; None where two are as near."""
    costs = [_distance_within(candidate, phonemes) / len(candidate) for candidate in candidates]
    best = min(costs)
    return costs.index(best) if costs.count(best) == 1 else None


def _distance_within(pattern: Sequence[str], text: Sequence[str]) -> int:
    """Fewest edits that turn `pattern` into some stretch of `text` (Sellers 1980)."""
    row = list(range(len(pattern) + 1))
    best = row[-1]
    for symbol in text:
        before, row = row, [0]
        for index, wanted in enumerate(pattern):
            row.append(min(before[index] + (wanted != symbol), before[index + 1] + 1, row[index] + 1))
        best = min(best, row[-1])
    return best
