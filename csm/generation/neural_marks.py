"""AudioSeal (Meta, MIT) and SilentCipher (Sony, MIT; Sesame's choice), through their own packages and weights.

Neither wheel holds weights: they come from the hub, or from a folder that an environment variable names. Both mark whole
clips, so a stream sounds only at its end; `keyed` and `perth` sound from the first frame on. AudioSeal's code
was run here with weights of random numbers only, SilentCipher's up to its import (docs/watermark.md).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import sys
from abc import abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any

import soxr
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ
from csm.generation.keyed_mark import key_from_environment
from csm.generation.watermark import Watermarker, WatermarkResult, WatermarkStream, resampled

AUDIOSEAL_FOLDER_VARIABLE, SILENTCIPHER_FOLDER_VARIABLE = "CSM_AUDIOSEAL_WEIGHTS", "CSM_SILENTCIPHER_WEIGHTS"
AUDIOSEAL_RATE_HZ = 16_000
SESAME_MESSAGE = [212, 211, 146, 56, 201]  # SesameAILabs/csm, watermarking.py: what Sesame's own check looks for
MESSAGE_SDR_DB = 36.0  # Sesame's
_NUM_BITS, _MIN_RIGHT_BITS = 16, 15  # 17 of 65,536 messages drawn at random have so many right


class WholeClipWatermarker(Watermarker):
    """A mark that needs the clip from end to end."""

    def stream(self) -> WatermarkStream:
        return _WholeClipStream(self)

    @abstractmethod
    def mark(self, waveform: Tensor) -> Tensor:
        """Mark all of a clip, float32 [S] at 24 kHz -> [S]."""


class _WholeClipStream(WatermarkStream):
    def __init__(self, watermarker: WholeClipWatermarker) -> None:
        self._watermarker = watermarker
        self._parts: list[Tensor] = []
        self._is_over = False

    def push(self, waveform: Tensor) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Watermarker.stream()")
        self._parts.append(waveform.detach().float().cpu())
        return torch.zeros(0)

    @torch.no_grad()
    def finish(self) -> Tensor:
        self._is_over = True
        clip = torch.cat([torch.zeros(0), *self._parts])
        return self._watermarker.mark(clip) if bool(clip.any()) else clip  # silence has nothing to mark


class AudioSealWatermarker(WholeClipWatermarker):
    """AudioSeal's 16-bit model; the bits are drawn from the key."""

    name = "audioseal"

    def __init__(self) -> None:
        _import("audioseal", "pip install audioseal==0.2.0")
        self._message = torch.tensor([_key_bits(_NUM_BITS)])
        self._generator = self._load("generator", "audioseal_wm_16bits", "generator_base.pth")
        self._detector = self._load("detector", "audioseal_detector_16bits", "detector_base.pth")

    def mark(self, waveform: Tensor) -> Tensor:
        slow = _resample(waveform, SAMPLE_RATE_HZ, AUDIOSEAL_RATE_HZ)
        residual = self._generator.get_watermark(slow[None, None], message=self._message)[0, 0]
        return waveform + _fit(_resample(residual, AUDIOSEAL_RATE_HZ, SAMPLE_RATE_HZ), waveform.shape[0])

    @torch.no_grad()
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        clip = resampled(waveform, sample_rate, AUDIOSEAL_RATE_HZ)
        share, message = self._detector.detect_watermark(clip[None, None])  # of samples called marked; [1, 16]
        num_right = int((message == self._message).sum())
        confidence = float(share)
        return WatermarkResult(confidence > 0.5 and num_right >= _MIN_RIGHT_BITS, confidence)

    @staticmethod
    def _load(part: str, card: str, file_name: str) -> Any:
        """Build one network by the package's own card and fill it from a file of tensors only."""
        builder, loader = import_module("audioseal.builder"), import_module("audioseal.loader")
        path = _weights_file(AUDIOSEAL_FOLDER_VARIABLE, "facebook/audioseal", file_name)
        card_path = Path(str(loader.__file__)).parent / "cards" / f"{card}.yaml"
        settings = yaml.safe_load(card_path.read_text(encoding="utf-8"))
        config_type = builder.AudioSealWMConfig if part == "generator" else builder.AudioSealDetectorConfig
        config = loader.AudioSeal.parse_config(settings, config_type=config_type)
        network = builder.create_generator(config) if part == "generator" else builder.create_detector(config)
        state = _read_tensors(path)
        loader.load_state_dict(network, loader.convert_state_dict_for_scriptable_model(state))
        return network.eval()


class SilentCipherWatermarker(WholeClipWatermarker):
    """SilentCipher's 44.1 kHz model with five bytes: Sesame's own with the public key, else drawn from the secret one."""

    name = "silentcipher"

    def __init__(self) -> None:
        package = _import("silentcipher", "pip install --no-deps silentcipher==1.0.5, then pip install librosa scipy pydub")
        key, kind = key_from_environment()
        self._message = SESAME_MESSAGE if kind == "public" else list(hmac.digest(key, b"csm-lab silentcipher", hashlib.sha256)[:5])
        folder = os.environ.get(SILENTCIPHER_FOLDER_VARIABLE)
        places = {}
        if folder is not None:
            if not (Path(folder) / "hparams.yaml").is_file():
                raise FileNotFoundError(
                    f"{SILENTCIPHER_FOLDER_VARIABLE}={folder}: no hparams.yaml in it; expected 44_1_khz/73999_iteration"
                )
            places = {"ckpt_path": folder, "config_path": str(Path(folder) / "hparams.yaml")}
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the package prints, and stdout may carry sound
                self._model = package.get_model(model_type="44.1k", device="cpu", **places)
        except OSError as error:
            raise FileNotFoundError(_not_had("sony/silentcipher", "", SILENTCIPHER_FOLDER_VARIABLE)) from error

    def mark(self, waveform: Tensor) -> Tensor:
        with contextlib.redirect_stdout(sys.stderr):
            marked, _ = self._model.encode_wav(waveform.numpy(), SAMPLE_RATE_HZ, self._message, message_sdr=MESSAGE_SDR_DB, calc_sdr=False)
        return _fit(torch.from_numpy(marked).float(), waveform.shape[0])

    @torch.no_grad()
    def detect(self, waveform: Tensor, sample_rate: int = SAMPLE_RATE_HZ) -> WatermarkResult:
        clip = resampled(waveform, sample_rate)
        if not bool(clip.any()):
            return WatermarkResult(False, 0.0)
        with contextlib.redirect_stdout(sys.stderr):
            found = self._model.decode_wav(clip.numpy(), SAMPLE_RATE_HZ, phase_shift_decoding=True)
        if not found["status"]:
            return WatermarkResult(False, 0.0)
        return WatermarkResult(found["messages"][0] == self._message, float(found["confidences"][0]))


def _key_bits(count: int) -> list[int]:
    digest = hmac.digest(key_from_environment()[0], b"csm-lab audioseal", hashlib.sha256)
    return [digest[index // 8] >> (index % 8) & 1 for index in range(count)]


def _import(package: str, how: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f"watermark {package} needs its package ({error}): {how}") from error


def _weights_file(variable: str, repository: str, file_name: str) -> Path:
    """A file of weights: from the folder that a variable names, or from the hub."""
    folder = os.environ.get(variable)
    if folder is not None:
        if not (Path(folder) / file_name).is_file():
            raise FileNotFoundError(f"{variable}={folder}: no {file_name} in it")
        return Path(folder) / file_name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, file_name))
    except OSError as error:  # no network, no such file, no access: the hub's errors are all of this kind
        raise FileNotFoundError(_not_had(repository, file_name, variable)) from error


def _not_had(repository: str, file_name: str, variable: str) -> str:
    what = f"{repository}/{file_name}".rstrip("/")
    return f"{what} cannot be had from the hub; copy it here and name its folder in {variable}, or use --watermark keyed"


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch pickle; anything but tensors in it is refused."""
    import pickle

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a file of tensors alone ({str(error).splitlines()[0]}); it is not opened") from error
    for key in ("best_state", "model"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return dict(content)


def _resample(waveform: Tensor, from_rate: int, to_rate: int) -> Tensor:
    return torch.from_numpy(soxr.resample(waveform.numpy(), from_rate, to_rate))


def _fit(waveform: Tensor, num_samples: int) -> Tensor:
    """Cut or padded with silence: resampling there and back may end a sample off."""
    return F.pad(waveform, (0, max(0, num_samples - waveform.shape[0])))[:num_samples]
