"""Whose voice a clip is in: GE2E embeddings (Resemblyzer's weights) and the nearest voice.

Only the weights of the `Resemblyzer` wheel are used. The package itself would bring librosa, numba and a compiler for
webrtcvad to do what thirty lines do here; `tests/test_listening_speaker.py` holds its published behaviour.
Source: Wan et al. 2018, "Generalized end-to-end loss for speaker verification"; Resemblyzer 0.1.4 (Apache-2.0) for the
sizes, the 1.6 s windows at 1.3 a second and the -30 dBFS level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from csm.listening.acoustics import is_silent, mel_spectrogram, resample, trim_silence
from csm.packaged import PackagedWeights

RATE_HZ = 16_000
NUM_MELS = 40
WINDOW_FRAMES = 160  # 1.6 s
WINDOWS_PER_S = 1.3
MIN_COVERAGE = 0.75  # of the last window; below it the window is dropped
LEVEL_DB = -30.0  # of every clip; Resemblyzer only raises quieter ones, but loudness is no voice
SHORTEST_S = 2.4  # two windows; shorter clips are said again until they are as long, silence would blur the voice
WEIGHTS = PackagedWeights(
    "speaker encoder",
    "Resemblyzer==0.1.4",
    "resemblyzer/pretrained.pt",
    "39373b86598fa3da9fcddee6142382efe09777e8d37dc9c0561f41f0070f134e",
)


class SpeakerEncoder(nn.Module):
    """Three LSTM layers over 40 mels, a ReLU, unit length: 256 numbers a clip."""

    name = "ge2e"

    def __init__(self, weights: Path | None = None) -> None:
        """Load the weights on the CPU.

        Raises:
            ValueError: if the file is not the published one: it is a torch pickle, so only known bytes are opened.
        """
        super().__init__()
        path, self.digest = WEIGHTS.checked(weights), WEIGHTS.sha256
        self.lstm = nn.LSTM(NUM_MELS, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        state = torch.load(path, map_location="cpu", weights_only=True)["model_state"]
        self.load_state_dict({key: value for key, value in state.items() if key.startswith(("lstm.", "linear."))})
        self.eval().requires_grad_(False)

    def describe(self) -> dict[str, str]:
        """Name, version and weight digest for the summary."""
        return {"name": self.name, "package": f"Resemblyzer {version('Resemblyzer')} (weights)", "sha256": self.digest}

    def embed(self, audio: np.ndarray) -> np.ndarray | None:
        """Embed a clip, 24 kHz float32 [S], as a unit vector float32 [256]; None if there is nothing to hear."""
        return None if is_silent(audio) else self.embed_all([resample(audio, RATE_HZ)])[0]

    def embed_all(self, clips: Sequence[np.ndarray]) -> list[np.ndarray | None]:
        """Embed clips of 16 kHz, float32 [S] each, together: the windows of all are one batch. A silent one gives None."""
        windows, counts = [], []
        for clip in clips:
            found = [] if is_silent(clip) else _windows(clip)
            windows += found
            counts.append(len(found))
        if not windows:
            return [None] * len(clips)
        with torch.inference_mode():
            _, (hidden, _) = self.lstm(torch.from_numpy(np.stack(windows)))
            embeddings = nn.functional.normalize(torch.relu(self.linear(hidden[-1])), dim=1)
        means = [part.mean(dim=0).numpy() if len(part) else None for part in embeddings.split(counts)]
        return [None if mean is None else unit(mean) for mean in means]


def _windows(clip: np.ndarray) -> list[np.ndarray]:
    """What the network sees of a 16 kHz clip: [160, 40] mels of each 1.6 s, at one level, ends trimmed, short clips repeated."""
    clip = trim_silence(clip, RATE_HZ)
    level = 10 * np.log10(np.mean(np.square(clip, dtype=np.float64)))
    clip = clip * np.float32(10 ** ((LEVEL_DB - level) / 20))
    clip = np.tile(clip, max(1, math.ceil(SHORTEST_S * RATE_HZ / len(clip))))
    starts = window_starts(len(clip))
    hop = RATE_HZ // 100
    clip = np.pad(clip, (0, max(0, (starts[-1] + WINDOW_FRAMES) * hop - len(clip))))
    mels = mel_spectrogram(clip, num_mels=NUM_MELS, fft_size=RATE_HZ // 40, hop=hop, rate_hz=RATE_HZ)  # [frames, 40]
    return [mels[start : start + WINDOW_FRAMES] for start in starts]


def window_starts(num_samples: int) -> list[int]:
    """First mel frame of each 1.6 s window over a clip; the last is dropped when less than 3/4 of it is sound."""
    hop = RATE_HZ // 100
    num_frames = -(-(num_samples + 1) // hop)
    step = round(RATE_HZ / WINDOWS_PER_S / hop)
    starts = list(range(0, max(1, num_frames - WINDOW_FRAMES + step + 1), step))
    covered = (num_samples - starts[-1] * hop) / (WINDOW_FRAMES * hop)
    return starts[:-1] if covered < MIN_COVERAGE and len(starts) > 1 else starts


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


class VoiceBook:
    """Reference embeddings by voice. A clip is never judged by references of its own text."""

    def __init__(self, references: Sequence[tuple[str, str, np.ndarray]]) -> None:
        """Take (voice, text, embedding) of each reference clip.

        Raises:
            ValueError: if fewer than two voices are there to tell apart.
        """
        self.references = list(references)
        self.voices = sorted({voice for voice, _, _ in self.references})
        if len(self.voices) < 2:
            raise ValueError(f"voice accuracy tells voices apart, got {self.voices}; give at least two")

    def similarities(self, embedding: np.ndarray, text: str) -> Mapping[str, float]:
        """Cosine to each voice's centroid, taken over its references of other texts."""
        result: dict[str, float] = {}
        for voice in self.voices:
            others = [vector for name, said, vector in self.references if name == voice and said != text]
            if not others:
                raise ValueError(f"voice {voice}: no reference says anything but {text!r}; give each voice at least two texts")
            result[voice] = float(embedding @ unit(np.mean(others, axis=0)))
        return result
