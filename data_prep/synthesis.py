"""The four voices of the offline corpus: one small synthesiser, its pitch and spectrum moved before the waveform is made.

hibari predicts, for every 12.5 ms, a spectrum in parts (harmonics, noise, a free-phase branch) and a pitch. Multiplying the
pitch and stretching the frequency axis gives another throat and another larynx for nothing; the words stay as clear.
Same text, voice and random generator, same samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from hibari import Hibari

PACKAGE = "hibari-tts"
LICENSE = "Apache-2.0"
# From the package's metadata and NOTICE: the synthesiser and its voice "heart", distilled from Kokoro-82M's af_heart.
LICENCES = {
    "synthesiser": f"{PACKAGE}: {LICENSE}, (c) 2026 Maureese Williams",
    "voice": f"heart, inside {PACKAGE}: {LICENSE}; distilled from Kokoro-82M (af_heart), by hexgrad: {LICENSE}",
    "pronunciation": f"misaki's lexicons, by hexgrad: {LICENSE}; spaCy's tokenizer exceptions, by ExplosionAI: MIT",
}
SPEED_RANGE = (0.92, 1.10)
PITCH_RANGE = (0.96, 1.04)
F0_FACTOR_RANGE = (0.28, 2.2)  # of drawn voices: from below the bass to above the contralto
WARP_RANGE = (0.88, 1.15)
LEVEL_RMS = 0.06  # every clip is as loud as the others: loudness would give a voice away, and spend codes
PEAK = 0.9
_TRIM_WINDOW_SAMPLES = 240  # 10 ms
_TRIM_DB = -40.0  # below the loudest 10 ms; quieter ends are silence
_LEAD_SAMPLES = 1920  # kept before speech: the phases of a clip drop up to 70 ms of it
_TAIL_SAMPLES = 960


@dataclass(frozen=True)
class Voice:
    """A speaker.

    Attributes:
        f0_factor: of the synthesiser's pitch.
        warp: of the frequency axis; above 1 is a smaller head.
    """

    name: str
    f0_factor: float
    warp: float


class Synthesizer:
    """Speaks lower-case English in any `Voice`; about 12 ms of one core for a second of speech."""

    def __init__(self) -> None:
        try:
            from hibari import Hibari
        except ImportError as error:
            raise ImportError(f"the demo corpus is spoken by {PACKAGE}: run `pip install {PACKAGE}`") from error
        self._hibari: Hibari = Hibari(threads=1)
        self._ids = lru_cache(maxsize=65_536)(self._ids_of)

    def speak(self, text: str, voice: Voice, generator: np.random.Generator) -> np.ndarray:
        """Speak one turn, its speed, pitch and noise drawn from `generator`; silence trimmed, int16 [S] at 24 kHz."""
        from hibari import dsp

        speed = generator.uniform(*SPEED_RANGE)
        pitch = generator.uniform(*PITCH_RANGE) * voice.f0_factor
        feed = {"ids": np.asarray([self._ids(text)], np.int64), "speed": np.asarray([speed], np.float32)}
        harmonic, phase, noise, free, free_phase, f0 = (output[0] for output in self._hibari.sess.run(None, feed))  # [bins, F], [F]
        if voice.warp != 1.0:
            harmonic, noise, free = (_stretch(part, voice.warp) for part in (harmonic, noise, free))
            phase, free_phase = (_stretch(part, voice.warp, nearest=True) for part in (phase, free_phase))
        waveform = dsp.synth(harmonic, phase, noise, free, free_phase, (f0 * pitch).astype(np.float32), generator)
        return _levelled(_trimmed(waveform))

    def _ids_of(self, text: str) -> tuple[int, ...]:
        phonemes = "".join(self._hibari.phonemize(text + "."))
        if not phonemes:
            raise ValueError(f"text {text!r} has no word to speak")
        return tuple(self._hibari.ids(phonemes))


def draw_voice(generator: np.random.Generator) -> Voice:
    """Some voice: pitch uniform on a logarithmic scale, spectrum uniform."""
    return Voice("drawn", float(np.exp(generator.uniform(*np.log(F0_FACTOR_RANGE)))), float(generator.uniform(*WARP_RANGE)))


def random_for(seed: int, purpose: str, *index: object) -> np.random.Generator:
    """A generator that depends on its arguments only, whatever was drawn before, in whichever process."""
    digest = hashlib.sha256("/".join(map(str, (seed, purpose, *index))).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def synthesizer_version() -> str:
    """The installed version of the synthesiser.

    Raises:
        ImportError: if it is not installed; the message says what to run.
    """
    try:
        return version(PACKAGE)
    except PackageNotFoundError as error:
        raise ImportError(f"the demo corpus is spoken by {PACKAGE}: run `pip install {PACKAGE}`") from error


def _stretch(spectrum: np.ndarray, warp: float, *, nearest: bool = False) -> np.ndarray:
    """Move what is at frequency f to warp * f. [bins, F]; phases cannot be interpolated, so they take the nearest bin."""
    num_bins = spectrum.shape[0]
    source = np.minimum(np.arange(num_bins) / warp, num_bins - 1)
    if nearest:
        return spectrum[np.rint(source).astype(int)]
    below = np.floor(source).astype(int)
    above = np.minimum(below + 1, num_bins - 1)
    share = (source - below).astype(np.float32)[:, None]
    return spectrum[below] * (1 - share) + spectrum[above] * share


def _trimmed(waveform: np.ndarray) -> np.ndarray:
    """Speech with 80 ms before and 40 ms after it; silence is added where the synthesiser left less."""
    num_windows = len(waveform) // _TRIM_WINDOW_SAMPLES
    windows = waveform[: num_windows * _TRIM_WINDOW_SAMPLES].reshape(num_windows, _TRIM_WINDOW_SAMPLES)
    power = np.square(windows).mean(axis=1)
    loud = np.nonzero(power > power.max() * 10 ** (_TRIM_DB / 10))[0]
    first, last = loud[0] * _TRIM_WINDOW_SAMPLES, (loud[-1] + 1) * _TRIM_WINDOW_SAMPLES
    padded = np.pad(waveform, (_LEAD_SAMPLES, _TAIL_SAMPLES))
    return padded[first : last + _LEAD_SAMPLES + _TAIL_SAMPLES]


def _levelled(waveform: np.ndarray) -> np.ndarray:
    """The clip at the corpus's loudness, as int16: what a FLAC holds, so that codes can be made again from it."""
    gain = LEVEL_RMS / max(float(np.sqrt(np.square(waveform).mean())), 1e-6)
    gain = min(gain, PEAK / max(float(np.abs(waveform).max()), 1e-6))
    return np.rint(waveform * (gain * 32767.0)).astype(np.int16)
