"""Lets the model speak while it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.generation.audio_files import write_audio
from csm.training.callbacks import Clock, is_due
from csm.training.checkpoint import checkpoint_name
from csm.training.module import CSMModule


class SpokenSamples(Callback):
    """Speaks `trainer.sample_texts` every `trainer.sample_every` steps and after the last, into samples/*.wav.

    Args:
        speak: from text, speaker and seed to float32 [S] at 24 kHz.
    """

    def __init__(self, run_dir: Path, config: TrainConfig, speak: Callable[[str, int, int], torch.Tensor], clock: Clock) -> None:
        self._folder, self._config, self._speak, self._clock = run_dir / "samples", config, speak, clock

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        settings = self._config.trainer
        if not trainer.is_global_zero or not is_due(module.step, settings.sample_every, settings.max_steps):
            return
        self._folder.mkdir(exist_ok=True)
        module.eval()
        with self._clock.pause(), torch.no_grad(), module.weights_for_use():
            for index, text in enumerate(settings.sample_texts):
                path = self._folder / f"{checkpoint_name(module.step)}_speaker{index}.wav"
                provenance = {"software": "csm-lab", "text": text, "speaker": index, "seed": self._config.seed, "step": module.step}
                write_audio(path, [self._speak(text, index, self._config.seed)], provenance)
                for logger in trainer.loggers:
                    if hasattr(logger, "log_audio"):  # W&B
                        logger.log_audio("samples", [str(path)], step=module.step, caption=[f"[{index}] {text}"])
        module.train()
