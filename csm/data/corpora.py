"""Which folders `data.path` means, and how the corpora in it are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from csm.config import DataConfig
from csm.data.index import prep_advice
from csm.data.storage import is_url, join, match_folders, open_folder

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Corpus:
    """One entry of `data.path`.

    Attributes:
        name: the entry as it was given.
        folders: of one split, one or, of a glob, several.
        weight: share of the positions it gives, all shares together 1; None when corpora are not weighed.
    """

    name: str
    folders: list[str | Path]
    weight: float | None = None


def find_corpora(data: DataConfig, split: str, *, is_weighted: bool) -> list[Corpus]:
    """The corpora of a split.

    Raises:
        FileNotFoundError: a glob matches no folder with that split.
    """
    weights: Sequence[float | None] = [None] * len(data.paths)
    if is_weighted and data.weights is not None:
        weights = [weight / sum(data.weights) for weight in data.weights]
    return [Corpus(path, split_folders(path, split), weight) for path, weight in zip(data.paths, weights, strict=True)]


def split_folders(path: Path | str, split: str) -> list[str | Path]:
    """The folders of a split: `path` is a data folder, or a glob of several; a path or a URL."""
    if not _MAGIC & set(str(path)):
        return [join(path, split)]
    folders = [join(match, split) for match in match_folders(str(path))]
    folders = [folder for folder in folders if _is_folder(folder)]
    if not folders:
        raise FileNotFoundError(f"data.path={path!s}: no folder matches that has a {split!r} split; {prep_advice(path)}")
    return folders


def _is_folder(place: str | Path) -> bool:
    if not is_url(place):
        return Path(place).is_dir()
    try:
        open_folder(place).sizes()
    except FileNotFoundError:
        return False
    return True
