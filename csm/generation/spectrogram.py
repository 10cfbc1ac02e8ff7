"""A picture of speech: mel bands over time, to look at beside listening."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csm.codec.mel import HOP_SAMPLES, MEL_FLOOR, NUM_MELS, hop_windows, log_mels
from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME

# Dark to bright through blue, violet and orange, each brighter than the last, so that it also reads in grey.
_COLORS = ((7, 7, 22), (46, 27, 110), (160, 47, 122), (243, 120, 70), (252, 246, 190))
_RANGE_NATS = 9.0  # shown between black and white, about 78 dB below the loudest
_BAND_PIXELS, _HOP_PIXELS = 3, 2
_AXIS_PIXELS = 22
_TICK_S = 0.5


def draw_spectrogram(waveform: Tensor, path: Path) -> None:
    """Write a PNG of 24 kHz audio, float32 [S]: 240 pixels high above a time axis, 200 pixels a second wide.

    Audio without samples, which a model that ends at once gives, is drawn as one frame of silence.
    The file gets its name when it is whole.
    """
    from PIL import Image, ImageDraw

    waveform = waveform.float().cpu() if waveform.shape[0] else torch.zeros(SAMPLES_PER_FRAME)
    mels = log_mels([hop_windows(waveform)])[: -(-waveform.shape[0] // HOP_SAMPLES)]  # [hops, 80]
    top = mels.max().clamp(min=float(np.log(MEL_FLOOR)) + _RANGE_NATS)
    levels = ((mels - top) / _RANGE_NATS + 1.0).clamp(0.0, 1.0).mul(255).round().to(torch.uint8)
    bands = levels.T.flip(0).repeat_interleave(_BAND_PIXELS, dim=0).repeat_interleave(_HOP_PIXELS, dim=1)  # low bands below
    places = np.linspace(0, 255, len(_COLORS))
    palette = np.stack([np.interp(np.arange(256), places, channel) for channel in np.array(_COLORS).T], axis=1)  # [256, 3]
    height, width = bands.shape
    image = Image.new("RGB", (width, height + _AXIS_PIXELS), (255, 255, 255))
    image.paste(Image.fromarray(palette.round().astype(np.uint8)[bands.numpy()]))
    pen = ImageDraw.Draw(image)
    pixels_per_s = SAMPLE_RATE_HZ / HOP_SAMPLES * _HOP_PIXELS
    for tick in range(int(width / pixels_per_s / _TICK_S) + 1):
        x = round(tick * _TICK_S * pixels_per_s)
        pen.line((x, height, x, height + 4), fill=(90, 90, 90))
        if x + 30 < width:
            pen.text((x + 3, height + 5), f"{tick * _TICK_S:g} s", fill=(90, 90, 90))
    assert height == NUM_MELS * _BAND_PIXELS
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    image.save(part, format="PNG", optimize=True)
    os.replace(part, path)
