"""A training checkpoint's content: weights, tokenizer, codec, optimizer and position, as safetensors and JSON, never pickle.

How a folder is written whole, found and checked is `csm.model.checkpoint_folder`'s, whose names are at hand here too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.model import checkpoint_folder
from csm.model.checkpoint_folder import (
    Say,
    checkpoint_name,
    checkpoint_step,
    find_fault,
    list_checkpoints,
    newest_valid_checkpoint,
    open_part,
    publish,
    read_manifest,
    remove_leftovers,
    write_pointer,
    write_text,
)
from csm.model.csm import CSM
from csm.text import TextTokenizer

__all__ = [
    "FolderCheckpointIO",
    "Say",
    "checkpoint_name",
    "checkpoint_step",
    "find_fault",
    "list_checkpoints",
    "newest_valid_checkpoint",
    "open_part",
    "publish",
    "read_manifest",
    "remove_leftovers",
    "write_pointer",
]

_WEIGHTS_PREFIX = "model."  # of the CSM inside CSMModule
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes checkpoint folders for Lightning.

    Args:
        model: saved with its own `save_pretrained`, so that the folder is a model to load anywhere.
        tokenizer, codec_folder: saved beside it, so that the checkpoint speaks by itself; None where the run has none.
    """

    def __init__(self, model: CSM, tokenizer: TextTokenizer | None = None, codec_folder: Path | None = None) -> None:
        self.model, self.tokenizer, self.codec_folder = model, tokenizer, codec_folder

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        folder = Path(path)
        part = open_part(folder)
        self.model.save_pretrained(part, layout="csm")
        if self.tokenizer is not None:
            self.tokenizer.save(part)
        if self.codec_folder is not None:
            (part / "codec").mkdir()
            for file in sorted(self.codec_folder.glob("codec.*")):  # codec.json, and codec.safetensors where weights are ours
                shutil.copyfile(file, part / "codec" / file.name)
        state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        tensors: dict[str, Tensor] = {}
        state["optimizer_states"] = _encode(checkpoint["optimizer_states"], "optimizer", tensors)
        state = {key: value if key == "optimizer_states" else _encode(value, key, tensors) for key, value in state.items()}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / "optimizer.safetensors")
        write_text(part / "state.json", json.dumps(state, indent=1) + "\n")
        publish(part, folder, step=checkpoint["global_step"], world_size=1)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder back into Lightning's dictionary.

        Raises:
            ValueError: if a file is not as the manifest says, or the weights are of another model.
        """
        folder = Path(path)
        fault = find_fault(folder)
        if fault is not None:
            raise ValueError(f"{folder}: not usable, {fault}; resume=auto takes the newest checkpoint that is whole")
        weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("model*.safetensors")):
            weights |= load_file(file)
        _check_weights(folder, weights, self.model)
        tensors = load_file(folder / "optimizer.safetensors")
        state = _decode(json.loads((folder / "state.json").read_text(encoding="utf-8")), tensors)
        return {**state, "state_dict": {_WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}}

    def remove_checkpoint(self, path: str | Path) -> None:
        checkpoint_folder.remove_checkpoint(Path(path))


def _check_weights(folder: Path, weights: dict[str, Tensor], model: CSM) -> None:
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted({*own, *weights}):
        got = tuple(weights[name].shape) if name in weights else "nothing"
        expected = tuple(own[name]) if name in own else "nothing"
        if got != expected:
            raise ValueError(f"{folder} is of another model: {name} is {got}, this run's model={model.config.name} has {expected}")


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON tree for `value`; its tensors move to `tensors` under dotted names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _encode(item, f"{name}.{key}", tensors) for key, item in value.items()}
        return {_ITEMS: [[key, _encode(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"checkpoint entry {name}: {type(value).__name__} cannot be written as JSON or safetensors")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(item, tensors) for item in value[_TUPLE])
    if _ITEMS in value:
        return {key: _decode(item, tensors) for key, item in value[_ITEMS]}
    return {key: _decode(item, tensors) for key, item in value.items()}
