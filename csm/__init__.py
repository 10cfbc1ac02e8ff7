"""CSM Lab: train, fine-tune, evaluate and speak with Sesame's conversational speech model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
