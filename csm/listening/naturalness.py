"""How natural and clean a clip sounds, by networks that learnt from people's scores, 1 to 5.

DNSMOS is heard by the network of the `speechmos` wheel (Microsoft, MIT), run by onnxruntime; the package around it would
bring librosa and numba to do the same. DistillMOS is its package's own network and weights (Microsoft, MIT).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import soxr

from csm.frames import SAMPLE_RATE_HZ
from csm.listening.acoustics import is_silent, resample
from csm.packaged import PackagedWeights

DNSMOS = PackagedWeights(
    "DNSMOS",
    "speechmos==0.0.1.1",
    "speechmos/dnsmos_models/sig_bak_ovr.onnx",
    "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
    ", or set filter.min_dnsmos=0",
)
DISTILLMOS = PackagedWeights(
    "DistillMOS",
    "distillmos==0.9.1",
    "distillmos/weights/distill_mos_v7.pt",
    "b18b3ac60227267cfb91e5d00ce22cc7b73716fd92f269484da1446e27031a40",
)
DNSMOS_S = 9.05  # a little more than the 9.01 s that the network hears
LEVEL_DB = -26.0  # root mean square of every clip that is scored: 20 dB less cost 0.36 of a score, and loudness is no nature
_RATE_HZ, _DNSMOS_SAMPLES = 16_000, 144_160
# Raw outputs to scores of people; the published polynomials of DNSMOS P.835 (Reddy et al. 2022), highest power first.
_POLYNOMIALS = {
    "dnsmos_signal": (-0.08397278, 1.22083953, 0.0052439),
    "dnsmos_background": (-0.13166888, 1.60915514, -0.39604546),
    "dnsmos": (-0.06766283, 1.11546468, 0.04602535),
}


class MosModel(Protocol):
    """Scores clips. Safe to use from several threads."""

    name: str

    def score(self, audio: np.ndarray) -> float | None:
        """1 to 5, of 24 kHz float32 [S]; None for a silent clip."""
        ...

    def describe(self) -> dict[str, str]:
        """Name, version and weight digest for the summary."""
        ...


class Dnsmos:
    """DNSMOS P.835's overall quality; clips shorter than 9 s are repeated."""

    name = "dnsmos"

    def __init__(self) -> None:
        _dnsmos_session()

    def score(self, audio: np.ndarray) -> float | None:
        return None if is_silent(audio) else dnsmos(at_level(audio), 0.0)["dnsmos"]

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "package": f"speechmos {version('speechmos')} (weights)", "sha256": DNSMOS.sha256}


class DistillMos:
    """DistillMOS: a small network that learnt from one on wav2vec 2.0 XLS-R (Stahl and Gamper, 2025)."""

    name = "distillmos"

    def __init__(self) -> None:
        import torch

        weights = DISTILLMOS.checked()
        self._model = _distillmos().ConvTransformerSQAModel(load_weights=False).eval()
        self._model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True)["model"])

    def score(self, audio: np.ndarray) -> float | None:
        import torch

        if is_silent(audio):
            return None
        with torch.inference_mode():
            return round(float(self._model(torch.from_numpy(resample(at_level(audio), _RATE_HZ))[None])), 4)

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "package": f"distillmos {version('distillmos')}", "sha256": DISTILLMOS.sha256}


def _distillmos() -> Any:
    """The package. It names torchaudio, for its reader of files, which we do not use: where there is none for this torch, an empty one."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):  # OSError: built for another torch
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        try:
            return importlib.import_module("distillmos")
        finally:
            del sys.modules["torchaudio"]
    return importlib.import_module("distillmos")


_MODELS: dict[str, type[Dnsmos] | type[DistillMos]] = {"dnsmos": Dnsmos, "distillmos": DistillMos}
_HOW_TO_GET = {
    "dnsmos": DNSMOS.how_to_get,
    "distillmos": f"{DISTILLMOS.how_to_get} xls-r-sqa==0.1.0",
    "utmos": "its weights are a pickle fetched by torch.hub, which we do not open; score the clips with its own program",
}
NAMES = tuple(_HOW_TO_GET)


def load_mos_models(names: Sequence[str]) -> tuple[list[MosModel], dict[str, str]]:
    """Those that can be had here, and why the others cannot, by name.

    Raises:
        ValueError: if a name is unknown.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise ValueError(f"naturalness={unknown}: expected some of {', '.join(NAMES)}")
    found: list[MosModel] = []
    missing: dict[str, str] = {}
    for name in names:
        if name not in _MODELS:
            missing[name] = _HOW_TO_GET[name]
            continue
        try:
            found.append(_MODELS[name]())
        except (ImportError, OSError) as error:  # OSError: a library built for another torch
            missing[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}; {_HOW_TO_GET[name]}"
    return found, missing


def at_level(audio: np.ndarray) -> np.ndarray:
    """The clip at -26 dBFS root mean square; peaks above full scale are left to the network."""
    rms = float(np.sqrt(np.mean(np.square(audio, dtype=np.float64))))
    return audio * np.float32(10 ** (LEVEL_DB / 20) / max(rms, 1e-9))


def dnsmos(audio: np.ndarray, middle_s: float) -> dict[str, float]:
    """Signal, background and overall quality, 1 to 5, of 9 s of a recording around a time; a shorter recording is repeated.

    Args:
        audio: 24 kHz float32 [S], the recording: a short turn cut out of it and repeated would score a point lower.
    Raises:
        FileNotFoundError: if the network is not installed.
    """
    size = round(DNSMOS_S * SAMPLE_RATE_HZ)
    begin = max(0, min(round(middle_s * SAMPLE_RATE_HZ) - size // 2, len(audio) - size))
    heard = soxr.resample(audio[begin : begin + size], SAMPLE_RATE_HZ, _RATE_HZ).astype(np.float32)
    if len(heard) < _DNSMOS_SAMPLES:
        heard = np.tile(heard, -(-_DNSMOS_SAMPLES // max(1, len(heard))))
    (raw,) = _dnsmos_session().run(None, {"input_1": heard[None, :_DNSMOS_SAMPLES]})
    return {
        name: round(float(np.polyval(coefficients, value)), 3)
        for (name, coefficients), value in zip(_POLYNOMIALS.items(), raw[0], strict=True)
    }


@lru_cache(maxsize=1)
def _dnsmos_session() -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # a score must not depend on the machine's cores
    return onnxruntime.InferenceSession(str(DNSMOS.checked()), options, providers=["CPUExecutionProvider"])
