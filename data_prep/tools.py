"""The codec and the tokenizer that a data folder brings: given, or made from the recordings themselves."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from csm.codec import Codec, SpectralCodec, codec_from_folder, load_codec
from csm.config import PrepConfig
from csm.text import TextTokenizer, WordTokenizer, load_tokenizer, tokenizer_from_folder
from data_prep.encode import cut_turns
from data_prep.failures import Rejected
from data_prep.ingest import ingest
from data_prep.manifest import ManifestTurn, Recording
from data_prep.planning import uniform

FIT_S = 1_200.0  # of speech that a spectral codec is fitted on
_WINDOW_S = 6.0
_CODEC_NAME, _TOKENIZER_NAME = "codec.json", "tokenizer.json"


def prepare_codec(config: PrepConfig, recordings: Sequence[Recording], root: Path, output: Path, console: Console) -> Codec:
    """The codec in `<output>/codec`, put there when it is missing: `codec.source`, or a spectral one fitted on the recordings.

    Raises:
        ValueError: if the folder holds another codec than the one asked for: a data folder has one.
        FileNotFoundError: if there is no codec at `codec.source`.
    """
    folder = output / "codec"
    backend = config.encode.codec_backend
    kept = codec_from_folder(folder, backend=backend) if (folder / _CODEC_NAME).is_file() else None
    settings = config.codec
    if settings.name == "spectral" and settings.source is None:
        codec: Codec = kept if kept is not None else _fit(config, recordings, root, console)
        if codec.name != settings.name or codec.num_codebooks != settings.num_codebooks:
            raise ValueError(
                f"{folder} holds codec {codec.name} with {codec.num_codebooks} codebooks, this asks for {settings.name} with "
                f"{settings.num_codebooks}; give another output="
            )
    else:
        source = settings.source
        if settings.name == "spectral" and source is not None:
            source = str(_folder_with(_CODEC_NAME, Path(source), "codec"))
        codec = load_codec(settings.name, source, num_codebooks=settings.num_codebooks, backend=backend)
        if kept is not None and kept.digest != codec.digest:
            raise ValueError(
                f"{folder} holds codec {kept.name} {kept.digest[:12]}, this asks for {codec.name} {codec.digest[:12]}; "
                "codes of two codecs do not mix, give another output="
            )
    if kept is None:
        codec.save(folder)
    return codec


def prepare_tokenizer(config: PrepConfig, recordings: Sequence[Recording], output: Path) -> TextTokenizer:
    """The tokenizer in `<output>/tokenizer.json`: `text.source`'s, or for words one of every word said.

    Raises:
        FileNotFoundError: if `text.source` has none.
    """
    settings = config.text
    if settings.tokenizer == "words" and settings.source is None:
        words = {word for recording in recordings for turn in recording.turns for word in re.findall(r"[^\s\[\]]+", turn.text)}
        tokenizer: TextTokenizer = WordTokenizer(words, num_speakers=_num_speakers(config, recordings))
    elif settings.tokenizer == "words":
        tokenizer = tokenizer_from_folder(_folder_with(_TOKENIZER_NAME, Path(str(settings.source))))
    else:
        tokenizer = load_tokenizer(settings.tokenizer, settings.source)
    tokenizer.save(output)
    return tokenizer


def _folder_with(name: str, folder: Path, *inside: str) -> Path:
    """The folder itself or the one inside it (a data folder's, a checkpoint's) that holds the file; itself where none does."""
    return next((place for place in (folder, *(folder / part for part in inside)) if (place / name).is_file()), folder)


def _num_speakers(config: PrepConfig, recordings: Sequence[Recording]) -> int:
    if config.encode.renumber_speakers:
        return config.encode.first_speaker + max(len({turn.speaker for turn in recording.turns}) for recording in recordings)
    return 1 + max(turn.speaker for recording in recordings for turn in recording.turns)


def _fit(config: PrepConfig, recordings: Sequence[Recording], root: Path, console: Console) -> SpectralCodec:
    """Fit on some twenty minutes of recordings, picked by hash; those that cannot be used are told when they are encoded."""
    clips: list[torch.Tensor] = []
    speech_s = 0.0
    for recording in sorted(recordings, key=lambda recording: uniform(config.seed, "fit", recording.digest)):
        if speech_s >= FIT_S:
            break
        try:
            if not recording.turns:
                recording = _in_windows(recording)
            by_channel = any(turn.channel is not None for turn in recording.turns)
            conversation = cut_turns(recording, ingest(root / recording.source, config.ingest, by_channel=by_channel), config.encode)
        except Rejected:
            continue
        clips += [conversation.clip(turn).clone() for turn in conversation.turns]
        speech_s += sum(turn.duration_s for turn in conversation.turns)
    if not clips:
        raise ValueError("no recording to fit the spectral codec on; give one with codec.source=<folder>")
    console.print(f"fitting a spectral codec on {speech_s / 60:.1f} min of these recordings", highlight=False)
    return SpectralCodec.fit(clips, num_codebooks=config.codec.num_codebooks, seed=config.seed)


def _in_windows(recording: Recording) -> Recording:
    """A recording nobody has listened to yet, cut into stretches to fit a codec on; a minute in ten of a long one."""
    step_s = _WINDOW_S if recording.duration_s < 10 * _WINDOW_S else 10 * _WINDOW_S
    starts = np.arange(0.0, max(recording.duration_s - 1.0, 0.0) + 1e-6, step_s).tolist()
    turns = [ManifestTurn("", start_s=start_s, end_s=min(start_s + _WINDOW_S, recording.duration_s)) for start_s in starts]
    return replace(recording, turns=turns)
