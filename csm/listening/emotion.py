"""How a clip feels, by an audio classifier of transformers that the user names."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from csm.listening.acoustics import resample


class EmotionClassifier:
    """A `AutoModelForAudioClassification` with its feature extractor."""

    def __init__(self, source: str) -> None:
        """Load a folder or hub id.

        Raises:
            ValueError: if it cannot be had, or is no audio classifier.
        """
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        self.source = source
        try:
            self._model: Any = AutoModelForAudioClassification.from_pretrained(source).eval()
            self._extractor: Any = AutoFeatureExtractor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(f"emotion: {source} cannot be had: {str(error).splitlines()[0][:160]}; give a folder or a hub id") from error

    @torch.inference_mode()
    def label(self, audio: np.ndarray) -> str:
        """The likeliest label of 24 kHz float32 [S]."""
        rate_hz = self._extractor.sampling_rate
        inputs = self._extractor(resample(audio, rate_hz), sampling_rate=rate_hz, return_tensors="pt")
        return str(self._model.config.id2label[int(self._model(**inputs).logits[0].argmax())])

    def describe(self) -> dict[str, str]:
        """Name and version for the summary."""
        return {
            "name": self.source,
            "package": "transformers",
            "sha256": str(getattr(self._model.config, "_commit_hash", None) or "unknown"),
        }
