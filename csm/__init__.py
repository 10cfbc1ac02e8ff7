"""CSM Lab: train, fine-tune, evaluate and speak with Sesame's conversational speech model."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Before torch is imported. Waiting OpenMP threads must sleep: spinning, two on contended cores speak at a hundredth of the
# speed (measured: 1 s of speech in 66 s, not 0.8). And large tensors get large pages: fresh memory comes at half the price
# (134 MB of zeros: 22 ms, not 53). What is set already stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from csm.config import LossConfig, ModelConfig, TransformerConfig
from csm.frames import Turn
from csm.loss import Losses, csm_loss
from csm.model.csm import CSM

if TYPE_CHECKING:
    from csm.generation.generator import Generator

__version__ = "0.1.0"
__all__ = ["CSM", "Generator", "LossConfig", "Losses", "ModelConfig", "TransformerConfig", "Turn", "csm_loss"]


def __getattr__(name: str) -> Any:
    """`csm.Generator`, imported only when asked for: it brings the codec and the watermark, which a model does not need."""
    if name == "Generator":
        from importlib import import_module

        return import_module("csm.generation.generator").Generator
    raise AttributeError(f"module 'csm' has no attribute {name!r}")
