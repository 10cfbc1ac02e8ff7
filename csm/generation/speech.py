"""From frames to the samples that are heard: codec, silence trim, watermark, each frame by frame."""

from __future__ import annotations

import torch
from torch import Tensor

from csm.codec import Codec
from csm.generation.guards import SilenceTrim
from csm.generation.watermark import Watermarker


class Speech:
    """Frames in, watermarked samples out, for one clip.

    Args:
        trim_silence: cut the silence at the end; see `SilenceTrim`.
    """

    def __init__(self, codec: Codec, watermarker: Watermarker | None, *, trim_silence: bool = False) -> None:
        self._codec_stream = codec.stream()
        self._trim = SilenceTrim() if trim_silence else None
        self._watermark_stream = None if watermarker is None else watermarker.stream()
        self._last_code = codec.vocab_size - 1
        self._has_frames = False

    def push(self, frame: Tensor) -> Tensor:
        """Take a frame int64 [K]; return the samples that are final by now, float32 [S] (possibly none)."""
        self._has_frames = True
        codes = frame[:, None].clamp(max=self._last_code)  # an untrained model draws ids of the table's spare rows, too
        samples = self._codec_stream.push(codes).cpu()
        if self._trim is not None:
            samples = self._trim.push(samples)
        return self._marked(samples)

    def finish(self) -> Tensor:
        """The samples that are left."""
        if not self._has_frames:
            return torch.zeros(0)
        samples = self._codec_stream.finish().cpu()
        if self._trim is not None:
            samples = torch.cat((self._trim.push(samples), self._trim.finish()))
        samples = self._marked(samples)
        return samples if self._watermark_stream is None else torch.cat((samples, self._watermark_stream.finish()))

    def _marked(self, samples: Tensor) -> Tensor:
        return samples if self._watermark_stream is None or not samples.numel() else self._watermark_stream.push(samples)
