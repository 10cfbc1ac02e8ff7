"""Lets the model speak while it learns, and shows what it said: samples/*.wav, *.png and index.html, and W&B's table."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from csm.config import TrainConfig
from csm.generation.audio_files import read_provenance, write_audio
from csm.generation.spectrogram import draw_spectrogram
from csm.model.csm import CSM
from csm.training.callbacks import Clock, is_due
from csm.training.checkpoint import checkpoint_name
from csm.training.loggers import SpokenSample, WandbRecord
from csm.training.module import CSMModule
from csm.whole_files import write_text


class SpokenSamples(Callback):
    """Speaks `trainer.sample_texts` every `trainer.sample_every` steps and after the last, into <run_dir>/samples.

    Args:
        speak: from model, text, speaker and seed to float32 [S] at 24 kHz.
        transcribe: from such audio to the words heard in it; None leaves them out.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainConfig,
        speak: Callable[[CSM, str, int, int], torch.Tensor],
        clock: Clock,
        transcribe: Callable[[torch.Tensor], str] | None = None,
    ) -> None:
        self._folder, self._config, self._speak, self._clock, self._transcribe = run_dir / "samples", config, speak, clock, transcribe

    def on_train_batch_end(self, trainer: Trainer, module: CSMModule, *_: Any) -> None:  # type: ignore[override]
        settings = self._config.trainer
        if not settings.sample_texts or not is_due(module.step, settings.sample_every, settings.max_steps):
            return
        module.eval()
        # Every rank goes in, for getting at whole weights may take them all; one of them speaks.
        with self._clock.pause(), torch.no_grad(), module.weights_for_use():
            model = _whole_model(trainer, module)
            if model is not None:
                samples = [self._say(model, text, speaker, module.step) for speaker, text in enumerate(settings.sample_texts)]
                write_page(self._folder)
                for logger in trainer.loggers:
                    if isinstance(logger, WandbRecord):
                        logger.log_samples(samples)
        module.train()

    def _say(self, model: CSM, text: str, speaker: int, step: int) -> SpokenSample:
        audio = self._speak(model, text, speaker, self._config.seed)
        heard = self._transcribe(audio) if self._transcribe is not None else None
        stem = f"{checkpoint_name(step)}_speaker{speaker}"
        sample = SpokenSample(step, speaker, text, self._folder / f"{stem}.wav", self._folder / f"{stem}.png", heard)
        provenance = {"software": "csm-lab", "text": text, "speaker": speaker, "seed": self._config.seed, "step": step}
        write_audio(sample.audio, [audio], provenance if heard is None else {**provenance, "heard": heard})
        draw_spectrogram(audio, sample.spectrogram)
        return sample


def _whole_model(trainer: Trainer, module: CSMModule) -> CSM | None:
    """The model to speak with, on the first process: a copy where the strategy spreads or wraps the one that trains."""
    copy_model = getattr(trainer.strategy, "copy_model", None)
    if copy_model is not None:
        return copy_model()
    return module.model if trainer.is_global_zero else None


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #888; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; color: var(--dim); font-weight: 600; }
section { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 10px; }
figcaption { margin-bottom: .5rem; } small { color: var(--dim); }
img { width: 100%; height: 130px; object-fit: fill; border-radius: 6px; background: #07071a; } audio { width: 100%; }
"""


def write_page(folder: Path) -> None:
    """Write `index.html`, which plays the clips of a samples folder, the newest step first; needs nothing from elsewhere."""
    notes = [(path.name, read_provenance(path)) for path in sorted(folder.glob("*.wav"))]
    clips = [(int(str(note["step"])), name, note) for name, note in notes if "step" in note]
    clips.sort(key=lambda clip: -clip[0])
    parts = []
    for step, group in groupby(clips, key=lambda clip: clip[0]):
        cards = "\n".join(_card(name, note) for _, name, note in group)
        parts.append(f"<h2>step {step:,}</h2>\n<section>\n{cards}\n</section>")
    title = f"What {escape(folder.resolve().parent.name)} says"
    page = f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{_STYLE}</style>\n'
    write_text(folder / "index.html", f"{page}<h1>{title}</h1>\n" + "\n".join(parts) + "\n</html>\n")


def _card(name: str, note: dict[str, object]) -> str:
    heard = f"<br><small>heard: {escape(str(note['heard']))}</small>" if "heard" in note else ""
    return (
        f"<figure><figcaption><b>{escape(str(note['text']))}</b> <small>speaker {escape(str(note['speaker']))}</small>{heard}</figcaption>"
        f'<img src="{escape(Path(name).stem)}.png" alt="spectrogram" loading="lazy">'
        f'<audio controls preload="none" src="{escape(name)}"></audio></figure>'
    )
