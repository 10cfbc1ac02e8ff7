"""How a codec lies on disk: codec.json says what it is, codec.safetensors holds its weights, a digest ties the two."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.whole_files import write_text

DESCRIPTION_NAME = "codec.json"
WEIGHTS_NAME = "codec.safetensors"


def codec_digest(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> str:
    """sha256 (hex) of settings and tensors, in the order of their names."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().data)
    return sha.hexdigest()


def write_codec_folder(folder: Path, description: Mapping[str, object], tensors: Mapping[str, Tensor] | None) -> None:
    """Write the weights, if there are any to write, then the description; each complete under its name or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is not None:
        partial = folder / f"{WEIGHTS_NAME}.tmp"
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, partial)
        os.replace(partial, folder / WEIGHTS_NAME)
    write_text(folder / DESCRIPTION_NAME, json.dumps(description, indent=2, sort_keys=True) + "\n")


def read_description(folder: Path) -> dict[str, object]:
    """What codec.json says.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a JSON object.
    """
    path = folder / DESCRIPTION_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {DESCRIPTION_NAME}; expected a codec's folder, e.g. <data>/codec, as data_prep writes it")
    try:
        description = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the codec's folder again") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} holds a {type(description).__name__}, expected an object; copy the codec's folder again")
    return description


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of codec.safetensors.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if the file is cut or damaged.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}; copy the codec's folder again, or make it again with data_prep")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); copy the codec's folder again") from error


def check_digest(folder: Path, got: str, description: Mapping[str, object]) -> None:
    """Refuse weights that are not those the description was written with."""
    expected = description.get("digest")
    if got != expected:
        raise ValueError(
            f"{folder}: the codec has digest {got[:12]}, {DESCRIPTION_NAME} says {str(expected)[:12]}; "
            "these are not the weights the codes were made with, copy the folder again or encode again"
        )
