"""Safetensors on disk: one file or shards with an index, read tensor by tensor and written atomically. No pickle, ever."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csm.whole_files import write_text

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# Where a tensor that is not in memory comes from: its shape, its dtype, and a function that gives it.
Source = tuple[tuple[int, ...], torch.dtype, Callable[[], Tensor]]
_DTYPE_NAMES = {  # in safetensors' order, narrow ones first. Source: its format's README and `Dtype` in tensor.rs
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip


class TensorFiles:
    """The tensors of a checkpoint folder by name, left on disk until asked for.

    Args:
        folder: holds one safetensors file, or shards and their index.
        first_choice: name of the file or index to prefer, as `transformers_weights` in a config names it.
    Raises:
        FileNotFoundError: if there are no weights, or a shard of the index is missing.
        ValueError: if there are pickles only, or a file is not safetensors.
    """

    def __init__(self, folder: Path, first_choice: str | None = None) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        for path in _weight_files(folder, first_choice):
            try:
                with safe_open(path, framework="pt") as tensors:
                    for name in tensors.keys():
                        self._file_of[name] = path
                        self._shape_of[name] = tuple(tensors.get_slice(name).get_shape())
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file ({error}); copy the checkpoint again") from error

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shape_of)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own in memory, on the CPU; dtype None keeps the stored one."""
        with safe_open(self._file_of[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(dtype=dtype, copy=True)


def _weight_files(folder: Path, first_choice: str | None) -> list[Path]:
    candidates = [name for name in (first_choice, INDEX_NAME, SINGLE_NAME) if name is not None]
    for name in candidates:
        path = folder / name
        if not path.is_file():
            continue
        if not name.endswith(".index.json"):
            return [path]
        index = read_json(path)
        shards = sorted(set(index.get("weight_map", {}).values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError(f"{path}: expected a weight_map of files beside it; copy the checkpoint again")
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} names {len(shards)} shards, {len(missing)} missing ({missing[0]}); copy the checkpoint again")
        return [folder / shard for shard in shards]
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickles only ({', '.join(pickles[:3])}), which can run code when opened; get the safetensors version, or "
            "convert it where you trust it"
        )
    raise FileNotFoundError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; expected a checkpoint folder")


def stream_tensors(path: Path, sources: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file one tensor at a time: byte for byte safetensors' own `save_file`, without holding them all.

    Raises:
        ValueError: if a source gives another shape or dtype than it states.
    """
    # Wide dtypes first keep every tensor aligned; names in order make equal weights give equal bytes.
    order = list(_DTYPE_NAMES)
    names = sorted(sources, key=lambda name: (-order.index(sources[name][1]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    for name in names:
        shape, dtype, _ = sources[name]
        start, stop = stop, stop + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            shape, dtype, give = sources[name]
            tensor = give().detach().cpu().contiguous()
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"{path}: {name} is {tensor.dtype} {list(tensor.shape)}, announced as {dtype} {list(shape)}")
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")


def write_tensors(
    folder: Path,
    sources: Mapping[str, Source],
    *,
    max_shard_bytes: int | None,
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index when they are more than `max_shard_bytes`.

    Every file is written beside its place and moved there; the index goes last, and what an older checkpoint left in the
    folder is removed after that.

    Args:
        sources: each called once, one after the other; no two are in memory together.
        max_shard_bytes: None writes one file whatever its size.
    """
    shards: list[list[str]] = [[]]
    sizes = {name: dtype.itemsize * torch.Size(shape).numel() for name, (shape, dtype, _) in sources.items()}
    num_bytes = 0
    for name, size in sizes.items():
        if max_shard_bytes is not None and shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(name)
        num_bytes += size
    is_single = len(shards) == 1
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for index, names in enumerate(shards):
        file_name = SINGLE_NAME if is_single else f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        part = folder / (file_name + ".tmp")
        stream_tensors(part, {name: sources[name] for name in names}, metadata)
        os.replace(part, folder / file_name)
        written.append(file_name)
    if not is_single:
        weight_map = {name: file_name for file_name, names in zip(written, shards, strict=True) for name in names}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))})
    else:
        (folder / INDEX_NAME).unlink(missing_ok=True)
    for old in [folder / SINGLE_NAME, *folder.glob("model-?????-of-?????.safetensors")]:
        if old.name not in written:
            old.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if the file holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
