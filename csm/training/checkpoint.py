"""Checkpoints as folders: weights, tokenizer, codec, optimizer and position, as safetensors and JSON, never pickle.

A folder is written as `step_000200.tmp`, flushed to disk and renamed, its manifest last, so a folder under its final name
is whole; loading compares every file with the manifest all the same. `last.txt` and `best.txt` beside the folders name
one of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm.model.csm import CSM
from csm.text import TextTokenizer

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
Say = Callable[[str], None]
_WEIGHTS_PREFIX = "model."  # of the CSM inside CSMModule
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def checkpoint_name(step: int) -> str:
    return f"step_{step:06d}"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints in a run's `checkpoints` folder, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=checkpoint_step)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if manifest.get("format_version") != FORMAT_VERSION:
        return f"{MANIFEST} has format version {manifest.get('format_version')}, this program reads {FORMAT_VERSION}"
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, the manifest says {entry['num_bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{name} differs from the manifest's sha256"
    return None


def newest_valid_checkpoint(folder: Path, say: Say = print) -> Path | None:
    """The newest checkpoint whose files are all as written; says which newer ones are not, and why."""
    for path in reversed(list_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            return path
        say(f"{path}: not usable, {fault}; trying the one before")
    return None


def write_pointer(folder: Path, name: str, checkpoint: Path) -> None:
    """Let `<folder>/<name>.txt` (last, best) name a checkpoint."""
    _write_text(folder / f"{name}.txt", checkpoint.name + "\n")


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
        part = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
        part.mkdir(parents=True)
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
        _write_text(part / "state.json", json.dumps(state, indent=1) + "\n")
        files = sorted(file for file in part.rglob("*") if file.is_file())
        entries = {file.relative_to(part).as_posix(): {"num_bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files}
        _write_text(part / MANIFEST, json.dumps({"format_version": FORMAT_VERSION, "files": entries}, indent=1) + "\n")
        for file in [*files, part / MANIFEST, *(d for d in part.rglob("*") if d.is_dir()), part]:
            _flush(file)
        if folder.exists():  # an invalid one of the same step, which a resumed run went behind
            shutil.rmtree(folder)
        os.rename(part, folder)
        _flush(folder.parent)

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
        """Delete a folder; its manifest first, so that half a deletion is never taken for a checkpoint."""
        folder = Path(path)
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".tmp")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _flush(path: Path) -> None:
    """Make the kernel write a file's, or a folder's, content to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
