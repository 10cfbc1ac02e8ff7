"""The offline codec: stacked log-mels, principal components, residual k-means; fitted on a corpus in seconds.

It has the shapes of a neural codec (12.5 frames a second, K codebooks, streaming decode) and needs no downloaded weights,
so everything downstream runs its real path on any machine. Code 0 is kept for the EOS row in every codebook: encoding
gives codes 1..codebook_size, and an all-zero frame decodes as silence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from csm.codec import mel
from csm.codec.folder import check_digest, codec_digest, read_description, read_weights, write_codec_folder
from csm.codec.interface import Codec, DecodeStream, check_codes, check_waveform
from csm.codec.residual_kmeans import fit_codebooks, principal_components, quantise
from csm.codec.vocoder import PhaseStream, magnitudes_from_log_mels
from csm.frames import num_frames_from_samples

NUM_COMPONENTS = 192
NUM_FIT_FRAMES = 60_000  # bounds time and memory of a fit; 24,000 already cost 5% more error
_SETTINGS = {  # with the tensors, what codes depend on
    "sample_rate_hz": Codec.sample_rate_hz,
    "frame_rate_hz": Codec.frame_rate_hz,
    "num_fft": mel.NUM_FFT,
    "hop_samples": mel.HOP_SAMPLES,
    "num_mels": mel.NUM_MELS,
    "mel_floor": mel.MEL_FLOOR,
}


class SpectralCodec(Codec):
    """Residual vector quantisation of stacked log-mels.

    Args:
        mean: [8 * 80] float32, the average frame.
        basis: [P, 8 * 80] float32, orthonormal rows.
        codebooks: [K, C + 1, P] float32; entry 0 of codebook 0 is silence, of the others nothing.
    """

    name = "spectral"

    def __init__(self, mean: Tensor, basis: Tensor, codebooks: Tensor) -> None:
        width = mel.HOPS_PER_FRAME * mel.NUM_MELS
        if mean.shape != (width,) or basis.ndim != 2 or basis.shape[1] != width or codebooks.ndim != 3:
            raise ValueError(
                f"mean {tuple(mean.shape)}, basis {tuple(basis.shape)}, codebooks {tuple(codebooks.shape)}: expected "
                f"[{width}], [P, {width}], [K, C + 1, P]; fit the codec again"
            )
        self._mean, self._basis, self._codebooks = mean, basis, codebooks
        self.num_codebooks = codebooks.shape[0]
        self.vocab_size = codebooks.shape[1]
        self.digest = codec_digest(self._tensors(), _SETTINGS)

    @classmethod
    def fit(cls, waveforms: Sequence[Tensor], *, num_codebooks: int = 8, codebook_size: int = 256, seed: int = 0) -> SpectralCodec:
        """Fit on clips, each float32 [S]; about 10 s on one thread at NUM_FIT_FRAMES, the same for the same input.

        Clips are cut at changing phases, as the training data is, and small corpora are used at all eight.
        """
        if not waveforms:
            raise ValueError("fitting the spectral codec needs at least one clip, got none")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(waveforms), generator=generator).tolist()
        windows: list[Tensor] = []
        num_frames = 0
        for turn in range(mel.HOPS_PER_FRAME):
            for place, index in enumerate(order):
                clip = _checked(waveforms[index]).cpu()
                start = (turn + place) % mel.HOPS_PER_FRAME * mel.HOP_SAMPLES
                if start < clip.shape[0] and num_frames < NUM_FIT_FRAMES:
                    windows.append(mel.hop_windows(clip[start:]))
                    num_frames += num_frames_from_samples(clip.shape[0] - start)
        frames = torch.cat([_stack(mel.log_mels(windows[i : i + 64])) for i in range(0, len(windows), 64)])
        mean, basis = principal_components(frames, NUM_COMPONENTS)
        rows = (frames - mean) @ basis.T
        entries = fit_codebooks(rows, num_codebooks, codebook_size, seed)
        codebooks = torch.zeros(num_codebooks, codebook_size + 1, NUM_COMPONENTS)
        codebooks[:, 1:] = entries
        codebooks[0, 0] = (torch.full_like(mean, math.log(mel.MEL_FLOOR)) - mean) @ basis.T
        return cls(mean, basis, codebooks)

    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        clips = [_checked(waveform).to(self._mean.device) for waveform in waveforms]
        if not clips:
            return []
        frames = _stack(mel.log_mels([mel.hop_windows(clip) for clip in clips]))
        return self._split(frames, [num_frames_from_samples(clip.shape[0]) for clip in clips])

    def encode_phases(self, waveforms: Sequence[Tensor], num_phases: int = mel.HOPS_PER_FRAME) -> list[list[Tensor]]:
        """Encode each clip at `num_phases` frame phases: the codes at phase p equal those of `waveform[240 * p:]`.

        Mels are computed once a clip; only the two hops that look across the new start are computed again.

        Raises:
            ValueError: if a clip is too short to drop its first (num_phases - 1) * 10 ms.
        """
        if not 1 <= num_phases <= mel.HOPS_PER_FRAME:
            raise ValueError(f"num_phases={num_phases}: expected 1 to {mel.HOPS_PER_FRAME} (10 ms each)")
        num_crossing = math.ceil(mel.MARGIN_SAMPLES / mel.HOP_SAMPLES)
        results = []
        for waveform in waveforms:
            clip = _checked(waveform).to(self._mean.device)
            num_samples = clip.shape[0]
            if num_samples <= (num_phases - 1) * mel.HOP_SAMPLES:
                raise ValueError(f"a clip of {num_samples} samples has no {num_phases} phases of {mel.HOP_SAMPLES} samples; use fewer")
            windows = [mel.hop_windows(clip, num_more_hops=num_phases - 1)]
            num_hops = windows[0].shape[0]
            for phase in range(1, num_phases):
                start = phase * mel.HOP_SAMPLES
                windows.append(mel.hop_windows(clip[start : start + mel.NUM_FFT + num_crossing * mel.HOP_SAMPLES])[:num_crossing])
            mels = mel.log_mels(windows)
            frames, lengths = [], []
            for phase in range(num_phases):
                length = num_frames_from_samples(num_samples - phase * mel.HOP_SAMPLES)
                shifted = mels[phase : phase + length * mel.HOPS_PER_FRAME].clone()
                if phase:
                    first = num_hops + (phase - 1) * num_crossing
                    shifted[:num_crossing] = mels[first : first + num_crossing]
                frames.append(_stack(shifted))
                lengths.append(length)
            results.append(self._split(torch.cat(frames), lengths))
        return results

    def decode(self, codes: Tensor) -> Tensor:
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.finish()])

    def stream(self) -> DecodeStream:
        return SpectralDecodeStream(self)

    def log_mels_from_codes(self, codes: Tensor) -> Tensor:
        """What codes [K, F] say of the spectrum: log-mels [8 * F, 80]."""
        check_codes(codes, self.num_codebooks, self.vocab_size)
        codes = codes.to(self.device, torch.int64)
        rows = torch.stack([table[index] for table, index in zip(self._codebooks, codes, strict=True)]).sum(dim=0)  # [F, P]
        return (rows @ self._basis + self._mean).reshape(-1, mel.NUM_MELS)

    def with_codebooks(self, num_codebooks: int) -> SpectralCodec:
        """The same codec with its first `num_codebooks` codebooks only."""
        if not 1 <= num_codebooks <= self.num_codebooks:
            raise ValueError(f"num_codebooks={num_codebooks}: this spectral codec has 1 to {self.num_codebooks}; fit one with more")
        return self if num_codebooks == self.num_codebooks else SpectralCodec(self._mean, self._basis, self._codebooks[:num_codebooks])

    def save(self, folder: Path) -> None:
        """Write codec.safetensors, then codec.json."""
        description: dict[str, object] = {
            "name": self.name,
            "num_codebooks": self.num_codebooks,
            "vocab_size": self.vocab_size,
            "digest": self.digest,
            "settings": _SETTINGS,
        }
        write_codec_folder(Path(folder), description, self._tensors())

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> SpectralCodec:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: if the folder holds no codec.
            ValueError: if its files are of another codec or do not match its digest.
        """
        folder = Path(folder)
        description = read_description(folder)
        if description.get("name") != cls.name:
            raise ValueError(f"{folder}: codec.json is of {description.get('name')!r}, expected {cls.name!r}")
        if description.get("settings") != _SETTINGS:
            raise ValueError(
                f"{folder}: made with settings {description.get('settings')}, this version has {_SETTINGS}; fit the codec again"
            )
        tensors = read_weights(folder)
        missing = sorted({"mean", "basis", "codebooks"} - tensors.keys())
        if missing:
            raise ValueError(f"{folder}/codec.safetensors has no {', '.join(missing)}; copy the codec's folder again")
        codec = cls(tensors["mean"], tensors["basis"], tensors["codebooks"])
        check_digest(folder, codec.digest, description)
        return codec.to(device)

    def to(self, device: torch.device | str) -> SpectralCodec:
        self._mean, self._basis, self._codebooks = (t.to(device) for t in (self._mean, self._basis, self._codebooks))
        return self

    @property
    def device(self) -> torch.device:
        return self._mean.device

    def _tensors(self) -> dict[str, Tensor]:
        return {"mean": self._mean, "basis": self._basis, "codebooks": self._codebooks}

    def _split(self, frames: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        entries = self._codebooks[:, 1:]
        codes = mel.in_blocks(lambda block: quantise((block - self._mean) @ self._basis.T, entries), frames) + 1  # [F, K]
        return [part.T.contiguous() for part in codes.split(list(lengths))]


class SpectralDecodeStream(DecodeStream):
    """Decodes frame by frame with one frame of look-ahead: sound comes from the second pushed frame on."""

    def __init__(self, codec: SpectralCodec) -> None:
        self._codec = codec
        self._phases = PhaseStream(codec.device)
        self._is_over = False

    def push(self, codes: Tensor) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        check_codes(codes, self._codec.num_codebooks, self._codec.vocab_size)
        parts = []
        for index in range(codes.shape[1]):  # one at a time, so that any chunking gives the same samples
            log_mels = self._codec.log_mels_from_codes(codes[:, index : index + 1])
            parts.append(self._phases.push(magnitudes_from_log_mels(log_mels)))
        return torch.cat(parts) if parts else torch.zeros(0, device=self._codec.device)

    def finish(self) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        self._is_over = True
        return self._phases.finish()


def _stack(mels: Tensor) -> Tensor:
    """Eight mel frames become one: [8 * F, 80] -> [F, 640]."""
    return mels.reshape(-1, mel.HOPS_PER_FRAME * mel.NUM_MELS)


def _checked(waveform: Tensor) -> Tensor:
    check_waveform(waveform)
    return waveform.detach().float()
