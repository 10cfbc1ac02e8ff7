"""How a turn is said, by an audio classifier of transformers that the user names (`encode.emotion`); no weights come with us.

Any `AutoModelForAudioClassification` (wav2vec2, HuBERT, WavLM, Whisper, ...) with its feature extractor; its labels are written as they
are. A turn is heard by itself, so its label depends on nothing beside it.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
import torch

from csm.frames import SAMPLE_RATE_HZ
from data_prep.encode import Conversation
from data_prep.reachable import can_reach

_FILES = ("config.json", "preprocessor_config.json", "*.safetensors")


def emotion_digest(source: str) -> str:
    """sha256 of a classifier's files: equal digests give equal labels.

    Raises:
        FileNotFoundError, ValueError: as `_folder_of` does.
    """
    sha = hashlib.sha256()
    for path in sorted(path for pattern in _FILES for path in _folder_of(source).glob(pattern)):
        sha.update(path.name.encode())
        with path.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


class EmotionLabeller:
    """A classifier, loaded.

    Args:
        source: folder or hub id.
        digest: of the files that the preparation was planned with.
    Raises:
        FileNotFoundError: if there is no such model and none can be had.
        ValueError: if it is none, or another than planned.
    """

    def __init__(self, source: str, digest: str, device: str) -> None:
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        folder = _folder_of(source)
        if emotion_digest(source) != digest:
            raise ValueError(
                f"encode.emotion={source} is another model than the one this preparation began with; run stages=[manifest] again"
            )
        try:
            self._extractor = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForAudioClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"encode.emotion={source} is no audio classifier of transformers ({str(error).splitlines()[0]})") from error
        self._model = model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def label(self, audio: np.ndarray) -> dict[str, Any]:
        """{"label", "probability"} of 24 kHz float32 [S]."""
        rate_hz = int(self._extractor.sampling_rate)
        heard = soxr.resample(audio, SAMPLE_RATE_HZ, rate_hz)
        features = self._extractor(heard, sampling_rate=rate_hz, return_tensors="pt").to(self._device)
        probabilities = self._model(**features).logits[0].float().softmax(dim=0)
        best = int(probabilities.argmax())
        return {"label": self._model.config.id2label[best], "probability": round(float(probabilities[best]), 4)}


@lru_cache(maxsize=1)
def load_labeller(source: str, digest: str, device: str) -> EmotionLabeller:
    """The classifier, loaded once a process."""
    return EmotionLabeller(source, digest, device)


def label_turns(conversation: Conversation, labeller: EmotionLabeller) -> None:
    """Give every turn its label; one that the manifest gave stays."""
    for cut in conversation.turns:
        if cut.turn.emotion is None:
            cut.turn.emotion = labeller.label(conversation.clip(cut).numpy())


@lru_cache(maxsize=4)
def _folder_of(source: str) -> Path:
    from huggingface_hub import snapshot_download

    if Path(source).is_dir():
        folder = Path(source)
    else:
        try:
            folder = Path(snapshot_download(source, allow_patterns=list(_FILES), local_files_only=True))
        except (OSError, ValueError):  # not in the cache, or no hub id
            folder = _downloaded(source)
    missing = [name for name in _FILES if not any(folder.glob(name))]
    if missing:
        raise ValueError(f"encode.emotion={source}: no {missing[0]} there; expected an audio classifier as transformers saves it")
    return folder


def _downloaded(source: str) -> Path:
    from huggingface_hub import snapshot_download

    how = f"on a connected machine run `hf download {source} --local-dir emotion` and set encode.emotion=emotion"
    if not can_reach("huggingface.co"):
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "huggingface.co does not answer"
        raise FileNotFoundError(f"encode.emotion={source}: no such folder, not in the hub's cache, and {why}; {how}")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"encode.emotion={source}: {str(error).splitlines()[0]}; {how}") from error
