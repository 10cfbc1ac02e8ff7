"""Whether the two channels of a file are two speakers (a call), or one room heard twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.decode import read_blocks, read_header

_SAME_WAVE = 0.85  # correlation of the waveforms above which the channels are one signal
_SAME_LEVEL = 0.6  # of their levels: two microphones in a room rise and fall together, two ends of a line take turns
_FLOOR_DB = 50.0  # below a channel's loudest frame, where nothing is told from silence
_FRAME_S = 0.05


def channels_differ(path: Path) -> bool:
    """True for a file of two channels that are two speakers. Block by block: hours cost no memory.

    Raises:
        Rejected: what `read_header` and `read_blocks` reject.
    """
    header = read_header(path)
    size = max(1, round(_FRAME_S * header.sample_rate_hz))
    powers, product = np.zeros(2), 0.0
    frames: list[np.ndarray] = []
    for block in read_blocks(path, header):
        if block.shape[1] != 2 or not np.isfinite(block).all():
            return False  # ingest says what is wrong with it
        block = block.astype(np.float64)
        powers += np.square(block).sum(axis=0)
        product += float(block[:, 0] @ block[:, 1])
        whole = block[: len(block) // size * size].reshape(-1, size, 2)
        frames.append(np.square(whole).mean(axis=1))
    if powers.min() <= powers.max() * 1e-6:  # an empty channel beside one that speaks, or nothing at all
        return False
    if product / np.sqrt(powers.prod()) > _SAME_WAVE:
        return False
    levels = 10 * np.log10(np.concatenate(frames) + 1e-12)
    levels = np.maximum(levels, levels.max(axis=0) - _FLOOR_DB)
    if len(levels) < 2 or levels.std(axis=0).min() < 1e-6:
        return True
    return float(np.corrcoef(levels.T)[0, 1]) < _SAME_LEVEL
