"""The features of CAM++ against torchaudio's Kaldi, which 3D-Speaker trained it with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from csm.listening.campplus import log_mels

pytestmark = pytest.mark.prep


def test_log_mels_are_kaldis() -> None:
    from torchaudio.compliance import kaldi

    clip = np.random.default_rng(0).normal(0, 0.1, 24_000).astype(np.float32)
    theirs = kaldi.fbank(torch.from_numpy(clip)[None], num_mel_bins=80, sample_frequency=16_000, dither=0.0).numpy()
    ours = log_mels(clip)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs - theirs.mean(axis=0), atol=2e-3)  # they compute in float32, we in float64
