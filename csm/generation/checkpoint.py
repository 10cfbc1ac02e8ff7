"""What a checkpoint needs to speak, besides its weights: the codec and the tokenizer it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from csm.codec import Codec, codec_from_folder, load_codec
from csm.config import ModelConfig
from csm.model.adapter_files import ADAPTER_FOLDER
from csm.model.adapter_files import CONFIG_NAME as ADAPTER_CONFIG_NAME
from csm.model.csm import CSM
from csm.model.pretrained import load_codec_weights, load_model, read_config, resolve_checkpoint
from csm.text import FILE_NAME as TOKENIZER_NAME
from csm.text import LLAMA3_VOCAB_SIZE, TextTokenizer, load_tokenizer, tokenizer_from_folder

MIMI_VOCAB_SIZE = 2048


def load_companions(
    checkpoint: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> tuple[CSM, Codec, TextTokenizer]:
    """Load a checkpoint's model, codec and tokenizer.

    Raises:
        FileNotFoundError: if there is no checkpoint, or its codec or tokenizer cannot be had.
        ValueError: if a file cannot be read.
    """
    folder = resolve_checkpoint(checkpoint)
    config = read_config(folder)
    tokenizer = load_tokenizer_of(folder, config)  # the cheap ones first: what is missing is told at once
    codec = load_codec_of(folder, device)
    return load_model(folder, dtype=dtype, device=device), codec, tokenizer


def find_adapter(place: str | Path) -> Path:
    """The folder of an adapter: the place itself, or that of the checkpoint meant.

    Raises:
        FileNotFoundError: if there is none.
    """
    if (Path(place) / ADAPTER_CONFIG_NAME).is_file():
        return Path(place)
    folder = resolve_checkpoint(place) / ADAPTER_FOLDER
    if not (folder / ADAPTER_CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{place} holds no adapter: expected a run of finetune.py with adapter=lora or dora, or a folder of PEFT's")
    return folder


def load_codec_of(checkpoint: str | Path, device: torch.device | str = "cpu") -> Codec:
    """The codec beside a checkpoint; Mimi where the checkpoint holds it inside, or is of Mimi's kind and brings none."""
    folder = resolve_checkpoint(checkpoint)
    if (folder / "codec").is_dir():
        return codec_from_folder(folder / "codec", device)
    config = read_config(folder)
    inside = load_codec_weights(folder)
    if inside is not None:
        from transformers import MimiConfig, MimiModel  # seconds to import

        from csm.codec.mimi import MimiCodec

        model = MimiModel(MimiConfig.from_dict(dict(inside.config)))
        model.load_state_dict(dict(inside.tensors))
        return MimiCodec(model, config.num_codebooks).to(device)
    if config.audio_vocab_size >= MIMI_VOCAB_SIZE:
        return load_codec("mimi", device=device, num_codebooks=config.num_codebooks)
    raise FileNotFoundError(
        f"{folder} brings no codec and its {config.audio_vocab_size} codes are not Mimi's; copy its codec into {folder}/codec"
    )


def load_tokenizer_of(folder: Path, config: ModelConfig) -> TextTokenizer:
    """The tokenizer beside a checkpoint: ours, or transformers', or Llama-3's where the text table is its size."""
    path = folder / TOKENIZER_NAME
    if path.is_file():
        try:
            is_ours = "kind" in json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{path}: not JSON ({error}); copy the tokenizer again") from error
        return tokenizer_from_folder(folder) if is_ours else load_tokenizer("llama3", str(folder))
    if config.text_vocab_size == LLAMA3_VOCAB_SIZE:
        return load_tokenizer("llama3")
    raise FileNotFoundError(
        f"{folder} brings no {TOKENIZER_NAME} and its text table of {config.text_vocab_size} is not Llama-3's; copy the tokenizer it was "
        "trained with beside it"
    )
