"""The files of a ZeRO checkpoint: every process's fragments of the float32 weights and moments, and how they are read again.

`zero/rank_00000-of-00002.safetensors` holds flat float32 pieces named `<kind>/<parameter>`: kind `weight`, and one for each
moment of the optimizer (`exp_avg`, `exp_avg_sq`). `zero/index.json` says which elements of which parameter each piece is.
Reading takes the slices that are asked for and no more, so any number of processes can go on from any other number, and
whole weights can be written without ever being in memory together. DeepSpeed is not needed here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from csm.model.checkpoint_folder import read_manifest
from csm.model.weights import Source, read_json
from csm.whole_files import write_text

FOLDER = "zero"
_FORMAT_VERSION = 1
_MAX_ELEMENTS_READ = 1 << 24  # at once, while a parameter is put together: 64 MiB


@dataclass
class Piece:
    """A run of elements of a flattened parameter, in one process's file."""

    start: int
    numel: int
    rank: int


@dataclass
class StoredParameter:
    shape: tuple[int, ...]
    pieces: list[Piece]  # in order; together all of it


class SavedState(Protocol):
    """Float32 weights and moments of a checkpoint, by slices of flattened parameters.

    Attributes:
        optimizer: `optim.name` of the run that wrote it.
        moments: kinds that can be read besides `weight`.
        num_updates: optimizer steps in the moments.
        shapes: of the parameters.
    """

    optimizer: str
    moments: list[str]
    num_updates: int
    shapes: dict[str, tuple[int, ...]]

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """float32 [numel]."""
        ...


def rank_file(rank: int, world_size: int) -> str:
    """Name of a process's file, relative to the checkpoint folder."""
    return f"{FOLDER}/rank_{rank:05d}-of-{world_size:05d}.safetensors"


def write_index(
    part: Path,
    owned: Sequence[Sequence[tuple[str, int, int]]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    step: int,
    optimizer: str,
    moments: Sequence[str],
    num_updates: int,
) -> None:
    """Write `zero/index.json`.

    Args:
        owned: of each rank, the pieces in its file: (parameter, first element, elements).
    """
    parameters: dict[str, dict[str, Any]] = {name: {"shape": list(shape), "pieces": []} for name, shape in shapes.items()}
    for rank, pieces in enumerate(owned):
        for name, start, numel in pieces:
            parameters[name]["pieces"].append({"start": start, "numel": numel, "rank": rank})
    for entry in parameters.values():
        entry["pieces"].sort(key=lambda piece: piece["start"])
    index = {"format_version": _FORMAT_VERSION, "step": step, "world_size": len(owned), "optimizer": optimizer}
    index |= {"moments": list(moments), "num_updates": num_updates, "parameters": parameters}
    write_text(part / FOLDER / "index.json", json.dumps(index, indent=1) + "\n")


class ZeroFiles:
    """The sharded state of a ZeRO checkpoint, read by slices.

    Args:
        folder: the checkpoint folder; that its files are as the manifest says is the caller's to check.
    Raises:
        ValueError: if index and manifest disagree, or a parameter is not there in full.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = read_json(folder / FOLDER / "index.json")
        if index.get("format_version") != _FORMAT_VERSION:
            raise ValueError(f"{folder}: zero/index.json has format version {index.get('format_version')}, this reads {_FORMAT_VERSION}")
        manifest = read_manifest(folder)
        for key in ("step", "world_size"):
            if manifest[key] != index[key]:
                raise ValueError(f"{folder}: zero/index.json is of {key}={index[key]}, the manifest of {manifest[key]}; take another one")
        self.optimizer, self.moments, self.num_updates = str(index["optimizer"]), list(index["moments"]), int(index["num_updates"])
        self._world_size = int(index["world_size"])
        self.parameters: dict[str, StoredParameter] = {}
        for name, entry in index["parameters"].items():
            pieces = [Piece(**piece) for piece in entry["pieces"]]
            stops = [0, *(piece.start + piece.numel for piece in pieces)]
            if [piece.start for piece in pieces] != stops[:-1] or stops[-1] != math.prod(entry["shape"]):
                raise ValueError(f"{folder}: the pieces of {name} do not make up {entry['shape']}; take another checkpoint")
            self.parameters[name] = StoredParameter(tuple(entry["shape"]), pieces)
        self.shapes = {name: stored.shape for name, stored in self.parameters.items()}
        self._open: dict[int, Any] = {}

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        found = torch.empty(numel, dtype=torch.float32)
        for piece in self.parameters[name].pieces:
            first, last = max(start, piece.start), min(start + numel, piece.start + piece.numel)
            if first < last:
                stored = self._file(piece.rank).get_slice(f"{kind}/{name}")
                found[first - start : last - start] = stored[first - piece.start : last - piece.start]
        return found

    def sources(self, dtype: torch.dtype = torch.float32) -> dict[str, Source]:
        """The weights, each put together when it is asked for; never two at a time, and in float32 only by slices."""
        return {name: (stored.shape, dtype, partial(self._whole, name, dtype)) for name, stored in self.parameters.items()}

    def _whole(self, name: str, dtype: torch.dtype) -> Tensor:
        shape = self.parameters[name].shape
        whole = torch.empty(math.prod(shape), dtype=dtype)
        for start in range(0, whole.numel(), _MAX_ELEMENTS_READ):
            numel = min(_MAX_ELEMENTS_READ, whole.numel() - start)
            whole[start : start + numel] = self.read("weight", name, start, numel)
        return whole.view(shape)

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self.folder / rank_file(rank, self._world_size), framework="pt")
        return self._open[rank]


class PlainFiles:
    """The state in a checkpoint of one process or DDP, read as a ZeRO checkpoint's is.

    Args:
        order: names of the parameters as the optimizer numbers them.
        state: the checkpoint's state.json.
    Raises:
        ValueError: if it has no optimizer state, or another number of parameters.
    """

    def __init__(self, folder: Path, order: Sequence[str], state: Mapping[str, Any]) -> None:
        from csm.model.weights import TensorFiles

        self._weights = TensorFiles(folder)
        self.shapes = self._weights.shapes
        self._number = {name: number for number, name in enumerate(order)}
        self._moments = safe_open(folder / "optimizer.safetensors", framework="pt")
        names = set(self._moments.keys())
        stored = {name.removeprefix("optimizer.0.state.") for name in names if name.startswith("optimizer.0.state.")}
        of_first = sorted(name.partition(".")[2] for name in stored if name.partition(".")[0] == "0")
        self.moments = [kind for kind in of_first if kind in ("exp_avg", "exp_avg_sq")]
        num_groups = [len(group["params"]) for optimizer in state["optimizer_states"] for group in optimizer["param_groups"]]
        if len(state["optimizer_states"]) != 1 or sum(num_groups) != len(order) or set(of_first) - {*self.moments, "step"}:
            raise ValueError(f"{folder}: its optimizer is neither AdamW nor SGD over this model's parameters; ZeRO cannot go on from it")
        self.optimizer = "adamw" if self.moments else "sgd"
        self.num_updates = int(self._moments.get_tensor("optimizer.0.state.0.step")) if self.moments else 0

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        if kind == "weight":
            whole = self._weights.read(name)
        else:
            whole = self._moments.get_tensor(f"optimizer.0.state.{self._number[name]}.{kind}")
        return whole.flatten()[start : start + numel].float()


def whole_state(files: ZeroFiles, order: Sequence[Sequence[str]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Weights and torch's optimizer state, whole, for one process or DDP to go on from a ZeRO checkpoint.

    Args:
        order: parameter names of each group, as the optimizer numbers them.
    """

    def whole(kind: str, name: str) -> Tensor:
        shape = files.parameters[name].shape
        return files.read(kind, name, 0, math.prod(shape)).view(shape)

    names = [name for group in order for name in group]
    state: dict[int, dict[str, Tensor]] = {}
    if files.moments:
        for number, name in enumerate(names):
            state[number] = {"step": torch.tensor(float(files.num_updates)), **{kind: whole(kind, name) for kind in files.moments}}
    groups, first = [], 0
    for group in order:
        # The module puts this run's settings in; `fused` decides where torch keeps the step.
        groups.append({"params": list(range(first, first + len(group))), "fused": True if files.moments else None})
        first += len(group)
    return {name: whole("weight", name) for name in names}, [{"state": state, "param_groups": groups}]
