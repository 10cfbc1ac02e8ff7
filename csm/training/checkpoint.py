"""A training checkpoint's content: weights, tokenizer, codec, optimizer and position, as safetensors and JSON, never pickle.

How a folder is written whole, found and checked is `csm.model.checkpoint_folder`'s, whose names are at hand here too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.codec.voices import VOICES_FOLDER
from csm.config import AdapterConfig
from csm.model import checkpoint_folder
from csm.model.adapter_files import ADAPTER_FOLDER, adapter_tensors, read_adapter_config, read_adapter_state, write_adapter
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
    refuse_unusable,
    remove_leftovers,
    write_pointer,
    write_text,
)
from csm.model.csm import CSM
from csm.model.lora import base_state_dict
from csm.model.pretrained import resolve_checkpoint
from csm.text import TextTokenizer
from csm.training import zero_files
from csm.training.background import BackgroundWriter, TensorCopies
from csm.training.optim import decay_groups

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
_ADAPTER_PREFIX = "adapter."
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


class FolderCheckpointIO(CheckpointIO):
    """Reads and writes checkpoint folders for Lightning.

    Args:
        model: saved with its own `save_pretrained`, so that the folder is a model to load anywhere.
        tokenizer, codec_folder: saved beside it, so that the checkpoint speaks by itself; None where the run has none.
        writer: does the writing; an asynchronous one gets copies of the tensors, so that training can go on. None writes at once.
        adapter, base: the run's. With an adapter the model's file holds it merged (save inside `merged_adapter`), for whoever
            loads the checkpoint as a model, and `adapter/` holds it apart, in PEFT's layout, for PEFT and to go on from.
    """

    def __init__(
        self,
        model: CSM,
        tokenizer: TextTokenizer | None = None,
        codec_folder: Path | None = None,
        writer: BackgroundWriter | None = None,
        adapter: AdapterConfig | None = None,
        base: str | None = None,
    ) -> None:
        self.model, self.tokenizer, self.codec_folder = model, tokenizer, codec_folder
        self._adapter = adapter if adapter is not None and adapter.kind != "none" else None
        self._base = base
        self._writer = writer if writer is not None else BackgroundWriter(is_async=False)
        self._copies = TensorCopies()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self._writer.make_room()  # what is in flight reads the copies
        state, tensors = _encode_checkpoint(checkpoint)
        tensors |= {_WEIGHTS_PREFIX + name: tensor for name, tensor in base_state_dict(self.model).items()}
        if self._adapter is not None:
            tensors |= {_ADAPTER_PREFIX + name: tensor for name, tensor in adapter_tensors(self.model, self._adapter).items()}
        copies = self._copies.take(tensors) if self._writer.is_async else None
        if copies is None:
            self._write(Path(path), state, tensors)
        else:
            self._writer.start(partial(self._write, Path(path), state, copies))

    def _write(self, folder: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint: its state, and its tensors, the model's under `model.`, an adapter's under `adapter.`.

        Raises:
            OSError: says what is left to go on from, and what to do.
        """
        weights, adapter = _under(_WEIGHTS_PREFIX, tensors), _under(_ADAPTER_PREFIX, tensors)
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith((_WEIGHTS_PREFIX, _ADAPTER_PREFIX))}
        part: Path | None = None
        try:
            part = open_part(folder)
            self.model.save_pretrained(part, layout="csm", state_dict=weights)
            if self._adapter is not None:
                write_adapter(part / ADAPTER_FOLDER, adapter, self._adapter, base=self._base)
                if self.tokenizer is not None:  # an adapter can teach the base a speaker or a word
                    self.tokenizer.save(part / ADAPTER_FOLDER)
            self._write_companions(part, state, others)
            step = state["global_step"] if "global_step" in state else checkpoint_step(folder)
            publish(part, folder, step=step, world_size=1)
        except (OSError, SafetensorError) as error:
            if part is not None:
                shutil.rmtree(part, ignore_errors=True)
            raise OSError(_explain(error, folder)) from error

    def write_companions(self, part: Path, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint holds besides the model's weights, for a writer that writes those itself."""
        self._write_companions(part, *_encode_checkpoint(checkpoint))

    def _write_companions(self, part: Path, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save(part)
        if self.codec_folder is not None:
            (part / "codec").mkdir()
            for file in sorted(self.codec_folder.glob("codec.*")):  # codec.json, and codec.safetensors where weights are ours
                shutil.copyfile(file, part / "codec" / file.name)
            voices = self.codec_folder.parent / VOICES_FOLDER  # presets of the corpus, so that --voice works from a checkpoint alone
            if voices.is_dir():
                shutil.copytree(voices, part / VOICES_FOLDER, copy_function=shutil.copyfile)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / "optimizer.safetensors")
        write_text(part / "state.json", json.dumps(state, indent=1) + "\n")

    def read_state(self, folder: Path) -> dict[str, Any]:
        """What a checkpoint holds besides weights and moments; `optimizer_states` is left as it is written, without tensors."""
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        optimizer_states = state.pop("optimizer_states")
        with safe_open(folder / "optimizer.safetensors", framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith("optimizer.")}
        return {**_decode(state, tensors), "optimizer_states": optimizer_states}

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a folder back into Lightning's dictionary.

        Args:
            path: a checkpoint folder, a run folder or `.../checkpoints/last`.
        Raises:
            ValueError: if a file is not as the manifest says, or the weights are of another model.
        """
        folder = resolve_checkpoint(path, name="last")
        refuse_unusable(folder)
        weights: dict[str, Tensor] = {}
        if (folder / zero_files.FOLDER).is_dir():
            names = {id(parameter): name for name, parameter in self.model.named_parameters()}
            order = [[names[id(p)] for p in group["params"]] for group in decay_groups(self.model.named_parameters(), 0.0)]
            saved = zero_files.ZeroFiles(folder)
            _check_weights(folder, saved.shapes, self.model)
            weights, optimizer_states = zero_files.whole_state(saved, order)
            state = {**self.read_state(folder), "optimizer_states": optimizer_states}
            return {**state, "state_dict": {_WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}}
        for name in sorted(read_manifest(folder)["files"]):
            if name.startswith("model") and name.endswith(".safetensors"):
                weights |= load_file(folder / name)
        _check_weights(folder, {name: tuple(tensor.shape) for name, tensor in weights.items()}, self.model)
        weights = self._apart(folder, weights)
        tensors = load_file(folder / "optimizer.safetensors")
        state = _decode(json.loads((folder / "state.json").read_text(encoding="utf-8")), tensors)
        return {**state, "state_dict": {_WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}}

    def _apart(self, folder: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights to go on from: those of the file, or the base's, which the model has, and the adapter's.

        Raises:
            ValueError: if the checkpoint has an adapter and the run has none, or the reverse, or another.
        """
        has_adapter = (folder / ADAPTER_FOLDER).is_dir()
        if self._adapter is None or not has_adapter:
            if has_adapter != (self._adapter is not None):
                got, own = ("has one", "has none") if has_adapter else ("has none", "has one")
                raise ValueError(f"{folder}: the checkpoint {got}, this run {own}: an adapter; resume with the adapter.* it was saved with")
            return weights
        saved = replace(read_adapter_config(folder / ADAPTER_FOLDER), dropout=self._adapter.dropout)
        own_config = replace(self._adapter, targets=sorted(self._adapter.targets), parts=sorted(self._adapter.parts))
        if replace(saved, targets=sorted(saved.targets), parts=sorted(saved.parts)) != own_config:
            raise ValueError(f"{folder}: its adapter is {saved}, this run's {self._adapter}; resume with the adapter.* it was saved with")
        return {**self.model.state_dict(), **read_adapter_state(self.model, folder / ADAPTER_FOLDER, self._adapter)}

    def remove_checkpoint(self, path: str | Path) -> None:
        checkpoint_folder.remove_checkpoint(Path(path))


def _explain(error: Exception, folder: Path) -> str:
    """One line about a checkpoint that could not be written."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    earlier = [path.name for path in list_checkpoints(folder.parent) if path != folder and find_fault(path, is_quick=True) is None]
    left = f"{earlier[-1]} and those before it are as they were" if earlier else "there is no earlier checkpoint"
    return f"checkpoint {folder} could not be written: {reason}; {left}. Make room there, or let the run write there, then resume=auto"


def _check_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], model: CSM) -> None:
    own = {name: tensor.shape for name, tensor in base_state_dict(model).items()}
    for name in sorted({*own, *shapes}):
        got = shapes.get(name, "nothing")
        expected = tuple(own[name]) if name in own else "nothing"
        if got != expected:
            raise ValueError(f"{folder} is of another model: {name} is {got}, this run's model={model.config.name} has {expected}")


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _encode_checkpoint(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lightning's dictionary without the weights: a JSON tree, and the tensors it names."""
    tensors: dict[str, Tensor] = {}
    state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    state["optimizer_states"] = _encode(checkpoint["optimizer_states"], "optimizer", tensors)
    return {key: value if key == "optimizer_states" else _encode(value, key, tensors) for key, value in state.items()}, tensors


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
