"""Codecs: 24 kHz audio to codes [K, F] and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from csm.codec.folder import read_description
from csm.codec.interface import Codec, DecodeStream
from csm.codec.spectral import SpectralCodec

if TYPE_CHECKING:
    from csm.codec.mimi import MimiCodec
    from csm.codec.moshi_mimi import MoshiMimiCodec

__all__ = ["Codec", "DecodeStream", "SpectralCodec", "codec_from_folder", "load_codec"]


def load_codec(
    name: str,
    source: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    num_codebooks: int | None = None,
    backend: str = "transformers",
) -> Codec:
    """Load a codec by name.

    Args:
        name: "spectral" or "mimi".
        source: folder of a fitted spectral codec (needed); hub id or folder of Mimi (default kyutai/mimi).
        backend: what runs Mimi: "transformers", or "moshi" in the preparation environment.
        num_codebooks: use the first that many; None takes all of spectral's and CSM's 32 of Mimi's.
    Raises:
        ValueError: if the name is unknown, or the codec has fewer codebooks.
        FileNotFoundError: if there is nothing at `source`.
    """
    if name == "spectral":
        if source is None:
            raise ValueError("codec spectral is fitted on data: give its folder, e.g. codec.source=data/demo/codec")
        codec = SpectralCodec.load(Path(source), device)
        return codec if num_codebooks is None else codec.with_codebooks(num_codebooks)
    if name == "mimi":
        return _mimi(backend).load(source or "kyutai/mimi", device=device, num_codebooks=num_codebooks)
    raise ValueError(f"codec.name={name!r}: expected spectral or mimi")


def codec_from_folder(folder: Path, device: torch.device | str = "cpu", backend: str = "transformers") -> Codec:
    """Load the codec that `Codec.save` wrote into `folder`, checked against its digest.

    Raises:
        FileNotFoundError: if the folder has no codec.json, or the weights it names cannot be had.
        ValueError: if the weights are not those it was written with.
    """
    folder = Path(folder)
    name = read_description(folder).get("name")
    if name == "spectral":
        return SpectralCodec.load(folder, device)
    if name == "mimi":
        return _mimi(backend).load_saved(folder, device=device)
    raise ValueError(f"{folder}/codec.json: codec {name!r} is unknown, expected spectral or mimi")


def _mimi(backend: str) -> type[MimiCodec] | type[MoshiMimiCodec]:
    """transformers and moshi take seconds to import, so only what is asked for is."""
    if backend == "moshi":
        from csm.codec.moshi_mimi import MoshiMimiCodec

        return MoshiMimiCodec
    from csm.codec.mimi import MimiCodec

    return MimiCodec
