"""Between a DeepSpeed engine and the files of a ZeRO checkpoint: what this process owns, saved and put back.

ZeRO keeps float32 weights and the optimizer's moments as flat tensors, one a group of parameters, cut into equal parts over
the processes: stages 1 and 2 cut the group, stage 3 every parameter. A `Fragment` is the part of one parameter that this
process has. Source of the layout: deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from csm.model.checkpoint_folder import file_digest
from csm.model.weights import Source, stream_tensors
from csm.training.zero_files import SavedState, rank_file


@dataclass
class Fragment:
    """What this process owns of a parameter.

    Attributes:
        start, numel: which elements of the flattened parameter.
        flat: float32, this process's part of the parameter's group; the key of the optimizer's state.
        offset: where in `flat` they are.
    """

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """Its elements in a tensor laid out as `flat`."""
        return flat.detach().narrow(0, self.offset, self.numel)


def is_stage_3(engine: Any) -> bool:
    return int(engine.zero_optimization_stage()) == 3


def own_fragments(engine: Any, model: nn.Module) -> list[Fragment]:
    """The fragments of this process, in the order of the flat tensors."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = engine.optimizer
    fragments = []
    if is_stage_3(engine):
        rank = torch.distributed.get_rank()
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            offset = 0
            for parameter in group:
                padded = parameter.partition_numel()
                start = min(rank * padded, parameter.ds_numel)
                numel = min(padded, parameter.ds_numel - start)
                if numel > 0:
                    fragments.append(Fragment(names[id(parameter)], start, numel, flat, offset))
                offset += padded
        return fragments
    for flat, group in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                owned = mapping.lp_fragment_address
                fragments.append(Fragment(names[id(parameter)], owned.start, owned.numel, flat, mapping.hp_fragment_address.start))
    return fragments


def moments_of(engine: Any, flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's tensors laid out as `flat`, by name; empty before the first step."""
    state = engine.optimizer.optimizer.state.get(flat, {})
    return {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == flat.shape}


@dataclass
class OwnPart:
    """What a process tells the first one about its file."""

    file: str  # relative to the checkpoint
    pieces: list[tuple[str, int, int]]
    moments: list[str]
    num_updates: int
    digest: str


def write_own_part(engine: Any, model: nn.Module, part: Path) -> OwnPart:
    """Write this process's fragments, one at a time."""
    fragments = own_fragments(engine, model)
    sources: dict[str, Source] = {}
    kinds: list[str] = []
    num_updates = 0
    for fragment in fragments:
        moments = moments_of(engine, fragment.flat)
        kinds = sorted(moments)
        for kind, flat in {"weight": fragment.flat, **moments}.items():
            sources[f"{kind}/{fragment.name}"] = ((fragment.numel,), torch.float32, _giver(fragment, flat))
        if moments:
            num_updates = int(engine.optimizer.optimizer.state[fragment.flat]["step"])
    name = rank_file(torch.distributed.get_rank(), torch.distributed.get_world_size())
    path = part / name
    path.parent.mkdir(exist_ok=True)
    stream_tensors(path, sources, {})
    return OwnPart(name, [(f.name, f.start, f.numel) for f in fragments], kinds, num_updates, file_digest(path))


def restore(engine: Any, model: nn.Module, saved: SavedState) -> None:
    """Put weights and moments of a checkpoint into the engine; every process must call it."""
    fragments = own_fragments(engine, model)
    state = engine.optimizer.optimizer.state
    for flat in {id(fragment.flat): fragment.flat for fragment in fragments}.values():
        if saved.moments:
            step = torch.tensor(float(saved.num_updates), device=flat.device)
            state[flat] = {"step": step, **{kind: torch.zeros_like(flat) for kind in saved.moments}}
    with torch.no_grad():
        for fragment in fragments:
            for kind, flat in {"weight": fragment.flat, **moments_of(engine, fragment.flat)}.items():
                fragment.of(flat).copy_(saved.read(kind, fragment.name, fragment.start, fragment.numel))
    _push_weights(engine)


def _push_weights(engine: Any) -> None:
    """Give the weights that the model computes with the values of the float32 ones."""
    optimizer = engine.optimizer
    if not is_stage_3(engine):
        optimizer.update_lp_params()
        return
    for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
        optimizer._unflatten_partitioned_parameters(index)
    persistent = optimizer.persistent_parameters  # small ones, whole on every process
    if len(persistent) > 0:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def write_model(engine: Any, model: nn.Module, write: Callable[[dict[str, Source]], None], *, is_first: bool) -> None:
    """Let the first process write the model's weights as they are computed with; every process must call it.

    Under stage 3 a parameter is put together when the writer asks for it: the first process says which, the others help.

    Args:
        write: called on the first process with the sources of all parameters, in any order of asking.
    """
    parameters = dict(model.named_parameters())
    if not is_stage_3(engine):
        if is_first:
            write({name: (tuple(p.shape), p.dtype, p.detach) for name, p in parameters.items()})
        return
    from deepspeed.runtime.zero import GatheredParameters

    names = list(parameters)
    wanted = torch.zeros(1, dtype=torch.int64, device=engine.device)
    if not is_first:
        while True:
            torch.distributed.broadcast(wanted, src=0)
            if int(wanted) < 0:
                return
            with GatheredParameters([parameters[names[int(wanted)]]]):
                pass

    def gather(index: int) -> Tensor:
        torch.distributed.broadcast(wanted.fill_(index), src=0)
        parameter = parameters[names[index]]
        with GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True)

    def giver(index: int) -> Callable[[], Tensor]:
        return lambda: gather(index)

    try:
        write({name: (tuple(p.ds_shape), p.dtype, giver(index)) for index, (name, p) in enumerate(parameters.items())})
    finally:
        torch.distributed.broadcast(wanted.fill_(-1), src=0)


def _giver(fragment: Fragment, flat: Tensor) -> Callable[[], Tensor]:
    return lambda: fragment.of(flat)
