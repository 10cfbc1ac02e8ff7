"""What a run takes over from a checkpoint it starts from: shapes, weights, tokenizer, codec."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from csm.config import CodecConfig, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from csm.text import TextTokenizer


@dataclass
class Base:
    """A checkpoint to start from.

    Attributes:
        name: as the user gave it.
        folder: where it lies; a hub id's after its download.
        codec_folder, codec_digest: None where it brings no codec of its own (Mimi from the hub).
    """

    name: str
    folder: Path
    model: ModelConfig
    tokenizer: TextTokenizer
    codec_folder: Path | None
    codec_digest: str | None

    def configure(self, config: TrainConfig) -> TrainConfig:
        """The run's configuration with the base's shapes.

        Raises:
            ValueError: if the run asks for what the base does not have.
        """
        model = replace(self.model, max_seq_len=max(self.model.max_seq_len, config.data.seq_len))
        name = "mimi" if self.codec_folder is None else self.codec_name
        codec = CodecConfig(name=name, num_codebooks=self.model.num_codebooks)
        return replace(config, model=model, codec=codec)

    @property
    def codec_name(self) -> str:
        from csm.codec.folder import read_description

        assert self.codec_folder is not None
        return str(read_description(self.codec_folder)["name"])

    def with_added(self, pieces: Sequence[str]) -> Base:
        """The base with a word tokenizer that knows more, in rows of the text table that it never used.

        Raises:
            ValueError: if the tokenizer is of another kind, or the table has no row left.
        """
        from csm.text import WordTokenizer

        if not isinstance(self.tokenizer, WordTokenizer):
            raise ValueError(f"text.added={list(pieces)}: the {self.tokenizer.kind} tokenizer of {self.name} reads any text; leave it out")
        try:
            tokenizer = self.tokenizer.with_added(pieces)
        except ValueError as error:
            raise ValueError(f"text.added={list(pieces)}: {error}") from error
        if tokenizer.vocab_size > self.model.text_vocab_size:
            free = self.model.text_vocab_size - self.tokenizer.vocab_size
            raise ValueError(
                f"text.added={list(pieces)}: the text table of {self.name} has {free} rows left; train a base with a larger "
                "model.text_vocab_size"
            )
        return replace(self, tokenizer=tokenizer)

    def weights_digest(self) -> str:
        """sha256 over its weight files: an adapter only means something beside the same weights."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name.startswith("model"):
                with open(path, "rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def open_base(name: str, added: Sequence[str] = ()) -> Base:
    """Find a checkpoint and what it needs besides its weights, which are not read yet.

    Args:
        added: pieces that its tokenizer is to know besides (`text.added`).
    Raises:
        FileNotFoundError, ValueError: if there is none, its tokenizer is missing or cannot take `added`.
    """
    from csm.codec.folder import DESCRIPTION_NAME, read_description
    from csm.generation.checkpoint import load_tokenizer_of
    from csm.model.pretrained import read_config, resolve_checkpoint

    folder = resolve_checkpoint(name)
    model = read_config(folder)
    codec_folder = folder / "codec" if (folder / "codec" / DESCRIPTION_NAME).is_file() else None
    digest = None if codec_folder is None else str(read_description(codec_folder)["digest"])
    base = Base(name, folder, model, load_tokenizer_of(folder, model), codec_folder, digest)
    return base.with_added(added) if added else base
