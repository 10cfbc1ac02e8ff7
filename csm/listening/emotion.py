"""How a clip feels, by an audio classifier of transformers that the user names; no weights come with us.

Any `AutoModelForAudioClassification` (wav2vec2, HuBERT, WavLM, Whisper, ...) with its feature extractor; its labels are taken as they
are. A clip is heard by itself, so its label depends on nothing beside it.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm.listening.acoustics import resample
from csm.reachable import can_reach

_FILES = ("config.json", "preprocessor_config.json", "*.safetensors")


def emotion_digest(source: str) -> str:
    """sha256 of a classifier's files: equal digests give equal labels.

    Raises:
        FileNotFoundError, ValueError: as `EmotionClassifier` does.
    """
    sha = hashlib.sha256()
    for path in sorted(path for pattern in _FILES for path in _folder_of(source).glob(pattern)):
        sha.update(path.name.encode())
        with path.open("rb") as stream:
            sha.update(hashlib.file_digest(stream, "sha256").digest())
    return sha.hexdigest()


class EmotionClassifier:
    """A classifier, loaded.

    Attributes:
        digest: of its files.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        """Load a folder or hub id.

        Raises:
            FileNotFoundError: if there is no such model and none can be had.
            ValueError: if it is no audio classifier.
        """
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        folder = _folder_of(source)
        self.source, self.digest = source, emotion_digest(source)
        try:
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
            model: Any = AutoModelForAudioClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"emotion={source} is no audio classifier of transformers ({str(error).splitlines()[0]})") from error
        self._model = model.eval().to(device)
        self._device = device

    @torch.inference_mode()
    def classify(self, audio: np.ndarray) -> tuple[str, float]:
        """(label, probability) of 24 kHz float32 [S]."""
        rate_hz = int(self._extractor.sampling_rate)
        features = self._extractor(resample(audio, rate_hz), sampling_rate=rate_hz, return_tensors="pt").to(self._device)
        probabilities = self._model(**features).logits[0].float().softmax(dim=0)
        best = int(probabilities.argmax())
        return str(self._model.config.id2label[best]), float(probabilities[best])

    def describe(self) -> dict[str, str]:
        """Name, package and digest for the summary."""
        return {"name": self.source, "package": "transformers", "sha256": self.digest}


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
        raise ValueError(f"emotion={source}: no {missing[0]} there; expected an audio classifier as transformers saves it")
    return folder


def _downloaded(source: str) -> Path:
    from huggingface_hub import snapshot_download

    how = f"on a connected machine run `hf download {source} --local-dir emotion` and give emotion=emotion"
    if not can_reach("huggingface.co"):
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "huggingface.co does not answer"
        raise FileNotFoundError(f"emotion={source}: no such folder, not in the hub's cache, and {why}; {how}")
    try:
        return Path(snapshot_download(source, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"emotion={source}: {str(error).splitlines()[0]}; {how}") from error
