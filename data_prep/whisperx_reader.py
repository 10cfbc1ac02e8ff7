"""Words by WhisperX, in the prep environment: its batched Whisper, and its wav2vec2 aligner where the weights are at hand.

Speech is found before it (`transcribe.find_speech`, WhisperX's own voice detection weights). Weights that are not here are looked
for once, with a bound on the wait; where they cannot be had, words get Whisper's own times, and a line on stderr says what is
missing and how to get it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from csm.config import TranscribeConfig
from csm.reachable import can_reach
from data_prep.segmentation import samples_between
from data_prep.transcript import Segment, Span, Word, runs_of_words

_PUNCTUATION = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"  # joined to the word behind and before, as WhisperX does


class WhisperXReader:
    """Reads windows of speech; `settings` says with which aligner."""

    def __init__(self, source: str, config: TranscribeConfig, device: str, max_pause_s: float) -> None:
        """Load Whisper.

        Raises:
            ImportError: outside of the prep environment.
            ValueError: if there is no Whisper under `source`.
        """
        try:
            import whisperx.asr
            from whisperx.vads import Vad
        except ImportError as error:
            how = "run `make prep-env` and use .venv-prep/bin/python, or set transcribe.reader=faster-whisper"
            raise ImportError(f"transcribe.reader=whisperx: {error}; {how}") from error

        class Given(Vad):
            """WhisperX's hook for a voice detection of one's own: windows that were found before."""

            windows: Sequence[Span] = ()

            def __call__(self, audio: object, **_: object) -> list[dict[str, float]]:
                return [{"start": window.start_s, "end": window.end_s} for window in self.windows]

            @staticmethod
            def merge_chunks(segments: list[Any], chunk_size: float, onset: float, offset: float | None) -> list[Any]:
                return segments

        self.config, self.device, self.max_pause_s = config, device, max_pause_s
        self.vad = Given(0.5)
        self.times_by_attention = True  # until an aligner is there
        try:
            self.pipeline = whisperx.asr.load_model(
                source,
                device,
                compute_type=config.compute_type,
                asr_options={"beam_size": config.beam_size},
                language=config.language,
                vad_model=self.vad,
                threads=torch.get_num_threads(),
            )
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"transcribe.model={source}: no Whisper could be loaded there ({error}); give a folder or a hub id") from error
        self.whisper = self.pipeline.model
        aligners = [] if config.language is None else [aligner_name(config.language, config.aligner, device)]
        self.settings = {
            "reader": f"whisperx {version('whisperx')}, ctranslate2 {version('ctranslate2')}",
            "aligner": aligners or "by language",
        }

    def read(self, audio: np.ndarray, windows: Sequence[Span], language: str, prompt: str | None) -> list[Segment]:
        self.vad.windows = windows
        self.pipeline.options = replace(self.pipeline.options, initial_prompt=prompt)
        found = self.pipeline.transcribe(audio, batch_size=self.config.batch_size, language=language)["segments"]
        spoken = [(window, entry["text"]) for window, entry in zip(windows, found, strict=True) if entry["text"].strip()]
        aligner = load_aligner(language, self.config.aligner, self.device)
        self.times_by_attention = aligner is None
        if aligner is None:
            read = [self._whisper_words(audio, window, text, language) for window, text in spoken]
        else:
            read = _aligned_words(audio, spoken, aligner, self.device)
        return [Segment(run, 0.0) for words in read for run in runs_of_words(words, self.max_pause_s)]  # it tells no no-speech probability

    def _whisper_words(self, audio: np.ndarray, window: Span, text: str, language: str) -> list[Word]:
        """Times of a window's words from Whisper's own attention."""
        from faster_whisper.audio import pad_or_trim
        from faster_whisper.tokenizer import Tokenizer

        model, clip = self.whisper, samples_between(audio, window.start_s, window.end_s)
        tokenizer = Tokenizer(model.hf_tokenizer, model.model.is_multilingual, task="transcribe", language=language)
        features = model.feature_extractor(clip)[..., :-1]
        segment = {"seek": 0, "tokens": tokenizer.encode(" " + text.strip()), "start": 0.0, "end": window.duration_s}
        num_frames = min(features.shape[-1], 3000)
        model.add_word_timestamps([[segment]], tokenizer, model.encode(pad_or_trim(features)), [num_frames], *_PUNCTUATION, 0.0)
        return [
            Word(word["word"], window.start_s + float(word["start"]), window.start_s + float(word["end"]), float(word["probability"]))
            for word in segment.get("words", [])  # type: ignore[union-attr]
        ]


def _aligned_words(audio: np.ndarray, spoken: Sequence[tuple[Span, str]], aligner: tuple[Any, Any], device: str) -> list[list[Word]]:
    """Words of each window by WhisperX's forced alignment; one that it cannot place begins where the one before ends."""
    import whisperx.alignment

    read = []
    for window, text in spoken:
        entry = {"start": window.start_s, "end": window.end_s, "text": text}
        found = whisperx.alignment.align([entry], *aligner, audio, device)["word_segments"]
        words: list[Word] = []
        for word in found:
            start_s = float(word.get("start", words[-1].end_s if words else window.start_s))
            words.append(Word(" " + word["word"], start_s, float(word.get("end", start_s)), float(word.get("score", 0.5))))
        read.append(words)
    return read


def aligner_name(language: str, wanted: str, device: str) -> str:
    """Which aligner times words: part of what a transcript depends on."""
    if load_aligner(language, wanted, device) is None:
        return "Whisper's attention"
    return default_aligner(language) or "none" if wanted == "auto" else wanted


def default_aligner(language: str) -> str | None:
    """WhisperX's wav2vec2 for a language: a torchaudio bundle or a hub id."""
    from whisperx.alignment import DEFAULT_ALIGN_MODELS_HF, DEFAULT_ALIGN_MODELS_TORCH

    return DEFAULT_ALIGN_MODELS_TORCH.get(language) or DEFAULT_ALIGN_MODELS_HF.get(language)


@lru_cache(maxsize=4)
def load_aligner(language: str, wanted: str, device: str) -> tuple[Any, Any] | None:
    """(model, metadata) as `whisperx.align` takes them; None where Whisper's own times have to do.

    Args:
        wanted: "auto", "whisper", or a folder or hub id of a wav2vec2 with a CTC head.
    Raises:
        ValueError: if a named aligner cannot be loaded.
    """
    if wanted == "whisper":
        return None
    import nltk
    import torchaudio
    from whisperx.alignment import load_align_model

    name = default_aligner(language) if wanted == "auto" else wanted
    if name is None:
        print(f"no aligner for language {language}: words get Whisper's own times", file=sys.stderr)
        return None
    is_bundle = name in torchaudio.pipelines.__all__
    host = "download.pytorch.org" if is_bundle else "huggingface.co"
    if not _is_here(name, is_bundle) and not can_reach(host):
        how = f"torch's cache ({torch.hub.get_dir()}/checkpoints)" if is_bundle else f"`huggingface-cli download {name}`"
        why = f"the aligner {name} is not here and {host} cannot be reached"
        if wanted != "auto":
            raise ValueError(f"transcribe.aligner={wanted}: {why}; get it by {how}, or set transcribe.aligner=whisper")
        print(f"{why}: words get Whisper's own times. To have it, run once with a network, or put it into {how}", file=sys.stderr)
        return None
    nltk.data.path.append(str(_sentence_rules()))
    try:
        return load_align_model(language, device, model_name=name, model_cache_only=_is_here(name, is_bundle))
    except (OSError, ValueError, RuntimeError) as error:
        if wanted != "auto":
            raise ValueError(f"transcribe.aligner={wanted}: {error}; or set transcribe.aligner=whisper") from error
        print(f"the aligner {name} could not be loaded ({error}): words get Whisper's own times", file=sys.stderr)
        return None


def _is_here(name: str, is_bundle: bool) -> bool:
    if is_bundle:
        import torchaudio

        return (Path(torch.hub.get_dir()) / "checkpoints" / Path(torchaudio.pipelines.__dict__[name]._path).name).is_file()
    if Path(name).is_dir():
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _sentence_rules() -> Path:
    """A folder for nltk with sentence rules of no exceptions: WhisperX splits texts by them, we only want its words."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm-lab" / "nltk"
    english = folder / "tokenizers" / "punkt_tab" / "english"
    english.mkdir(parents=True, exist_ok=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (english / name).touch()
    return folder
