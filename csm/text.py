"""Tokenizers: words (the offline demo), bytes (needs nothing) and Llama-3's (CSM's). All read `[speaker]text`.

Each knows BOS and EOS, refuses what it cannot write, and is saved beside a checkpoint as `tokenizer.json` so that a
trained model brings its own. Markup in a text ("<|begin_of_text|>") is read as plain characters, never as a control id.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from csm.packaged import packaged_file
from csm.whole_files import write_text

BOS_ID, EOS_ID = 128_000, 128_001  # Llama-3
NUM_LLAMA3_BASE_TOKENS = 128_000
LLAMA3_VOCAB_SIZE = 128_256
# Source: the pre-tokenizer pattern published with Llama 3 (llama_models/llama3/tokenizer.py, Meta).
_LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"[^\s\[\]]+"  # of the word tokenizer
FILE_NAME = "tokenizer.json"


class TextTokenizer(ABC):
    """Turns a turn's text into ids."""

    kind: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS and EOS."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; BOS and EOS are left out."""

    def encode_turn(self, speaker: int, text: str) -> list[int]:
        """Ids of `[speaker]text` between BOS and EOS: what stands in front of a turn's audio."""
        if speaker < 0:
            raise ValueError(f"speaker {speaker}: expected a number from 0")
        return [self.bos_id, *self.encode(f"[{speaker}]{text}"), self.eos_id]

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """What `tokenizer.json` holds."""

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`."""
        write_text(folder / FILE_NAME, json.dumps(self.settings(), indent=1, ensure_ascii=False) + "\n")


class WordTokenizer(TextTokenizer):
    """One id a word of a closed vocabulary, one a speaker: what a model needs that must learn in minutes.

    Ids: 0 is never used (an empty column), 1 BOS, 2 EOS, then `[0]`.. of the corpus's speakers, then the words, sorted, then what
    was added after the model was trained: words, and speakers `[n]` in the order of their numbers.
    """

    kind = "words"
    bos_id, eos_id = 1, 2

    def __init__(self, words: Iterable[str], num_speakers: int, added: Sequence[str] = ()) -> None:
        self.words = sorted(set(words))
        self.added = list(added)
        speakers = [f"[{i}]" for i in range(num_speakers)]
        for word in (*self.words, *self.added):
            if word in self.added and word == f"[{len(speakers)}]":
                speakers.append(word)
            elif not re.fullmatch(_WORD, word):
                raise ValueError(
                    f"{word!r} is not a word: expected characters without spaces and brackets, or the next speaker, [{len(speakers)}]"
                )
        self._num_first_speakers, self.num_speakers = num_speakers, len(speakers)
        self._pieces = ["", "<bos>", "<eos>", *speakers[:num_speakers], *self.words, *self.added]
        if len(set(self._pieces)) < len(self._pieces):
            raise ValueError(f"added {self.added}: expected pieces that are not there yet, each once")
        ids = {piece: i for i, piece in enumerate(self._pieces) if i > self.eos_id}  # BOS and EOS cannot be written
        self._speaker_ids = {piece: ids.pop(piece) for piece in speakers}
        self._word_ids = ids
        self.vocab_size = len(self._pieces)

    def with_added(self, pieces: Sequence[str]) -> WordTokenizer:
        """One that knows more words or speakers; the ids of what this one knows stay.

        Raises:
            ValueError: a piece is no word and not the next speaker, or there already.
        """
        return WordTokenizer(self.words, self._num_first_speakers, [*self.added, *pieces])

    def speaker_id(self, speaker: int) -> int:
        """The id of `[speaker]`, one that it knows."""
        return self._speaker_ids[f"[{speaker}]"]

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(rf"\[\d+\]|{_WORD}|[\[\]]", text)
        # A speaker only opens a text: elsewhere it would put words into another's mouth.
        ids = [self._word_ids.get(piece, self._speaker_ids.get(piece) if i == 0 else None) for i, piece in enumerate(pieces)]
        if None in ids:
            raise ValueError(
                f"text {_shortened(text)} has {_shortened(pieces[ids.index(None)])}, which this model never heard; it knows "
                f"speakers 0-{self.num_speakers - 1} and the words: {' '.join(self.words)}"
            )
        return [i for i in ids if i is not None]

    def decode(self, ids: Iterable[int]) -> str:
        pieces = [self._pieces[i] for i in ids if i not in (0, self.bos_id, self.eos_id)]
        return re.sub(r"(\[\d+\]) ", r"\1", " ".join(pieces))

    def settings(self) -> dict[str, object]:
        settings: dict[str, object] = {"kind": self.kind, "num_speakers": self._num_first_speakers, "words": self.words}
        return settings | ({"added": self.added} if self.added else {})


def _shortened(text: str) -> str:
    """Quoted, for a message: what is longer than 80 characters by its beginning."""
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}... ({len(text)} characters)"


class ByteTokenizer(TextTokenizer):
    """UTF-8 bytes as ids 0-255, then BOS and EOS: any text, no files."""

    kind = "bytes"
    bos_id, eos_id = 256, 257
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind}


class Llama3Tokenizer(TextTokenizer):
    """Llama-3's byte-pair tokenizer: 128 000 pieces and 256 specials.

    Reads a transformers folder or hub id (`tokenizer.json`), or a tiktoken file (`tokenizer.model`), as Meta ships it and
    as the `llama-models` package carries it.
    """

    kind = "llama3"
    bos_id, eos_id = BOS_ID, EOS_ID
    vocab_size = LLAMA3_VOCAB_SIZE

    def __init__(self, source: str | None = None) -> None:
        self.source = source
        self._encode, self._decode = _load_llama3(source)
        if (ids := self._encode("Hello world")) != [9906, 1917]:  # Llama-3's published ids
            raise ValueError(f"{source}: reads 'Hello world' as {ids}, Llama-3 as [9906, 1917]; give Llama-3's tokenizer")

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode([i for i in ids if i < NUM_LLAMA3_BASE_TOKENS])

    def settings(self) -> dict[str, object]:
        return {"kind": self.kind, "source": self.source}


def _load_llama3(source: str | None) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Encoding and decoding functions, from whichever form of the tokenizer can be had."""
    path = packaged_llama3() if source is None else Path(source)
    if path is not None and path.is_dir() and (path / "tokenizer.model").is_file():
        path = path / "tokenizer.model"
    if path is not None and path.is_file() and path.name.endswith(".model"):
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        ranks = load_tiktoken_bpe(str(path))
        if len(ranks) != NUM_LLAMA3_BASE_TOKENS:
            raise ValueError(f"{path}: {len(ranks)} pieces, Llama-3 has {NUM_LLAMA3_BASE_TOKENS}; give Llama-3's tokenizer.model")
        encoding = tiktoken.Encoding("llama3", pat_str=_LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
        return encoding.encode_ordinary, encoding.decode
    if source is None:
        raise FileNotFoundError(
            "no Llama-3 tokenizer here: run `pip install llama-models`, or set text.source=<folder or hub id with Llama-3's tokenizer>"
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"text.source={source!r} gave no tokenizer ({error}); run `pip install llama-models` and leave text.source unset"
        ) from error
    return (
        lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True),
        lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False),
    )


def packaged_llama3() -> Path | None:
    """The tokenizer file inside the `llama-models` package, without importing the package; None if it is not installed."""
    return packaged_file("llama-models", "llama3/tokenizer.model")


def load_tokenizer(kind: str, source: str | None = None) -> TextTokenizer:
    """The tokenizer named by `text.tokenizer`.

    Args:
        kind: "words", "bytes" or "llama3".
        source: for words, a folder with `tokenizer.json`; for llama3, a folder, file or hub id, or None.
    Raises:
        FileNotFoundError: if its files cannot be had; the message says which command gets them.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "llama3":
        return Llama3Tokenizer(source)
    if kind != "words":
        raise ValueError(f"text.tokenizer={kind!r}: expected words, bytes or llama3")
    if source is None:
        raise ValueError("text.tokenizer=words needs text.source, a folder with tokenizer.json")
    return tokenizer_from_folder(Path(source))


def tokenizer_from_folder(folder: Path) -> TextTokenizer:
    """The tokenizer that was saved beside shards or a checkpoint."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokenizer there; expected the tokenizer.json that prep or training wrote")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = settings["kind"]
        if kind == "words":
            return WordTokenizer(settings["words"], settings["num_speakers"], settings.get("added", []))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not one of our tokenizer files ({error!r}); prep or training writes it") from error
    return load_tokenizer(kind, settings.get("source"))
