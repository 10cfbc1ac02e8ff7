"""Low-rank adapters, LoRA and DoRA, on the linear maps of a CSM: attached, switched and merged.

An adapted map keeps its weight under its own name, so a model with adapters still loads and saves as the base it is. Their
files are in `adapter_files`. Sources: Hu et al. 2021 (LoRA); Liu et al. 2024 (DoRA).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.config import AdapterConfig
from csm.model.csm import CSM
from csm.model.functions import gated_linear, swiglu
from csm.model.products import linear
from csm.model.transformer import GatedLinear, Linear


class LowRank(nn.Module):
    """One adapter of one linear map: `scaling * B A` beside a weight [out, in], A [rank, in], B [out, rank].

    B begins at zero, so a new adapter changes nothing. With DoRA each row of the adapted weight is scaled to a learnt length,
    which begins as the row's own.
    """

    def __init__(self, weight: Tensor, rank: int, config: AdapterConfig, generator: torch.Generator | None) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        # Factors are float32 whatever the weight is: steps of 1e-4 are lost in bfloat16.
        place = {"device": weight.device, "dtype": torch.float32}
        self.a = nn.Parameter(torch.empty(rank, in_features, **place))
        self.b = nn.Parameter(torch.zeros(out_features, rank, **place))
        if generator is not None:
            bound = 1 / math.sqrt(in_features)  # PEFT's: kaiming_uniform_(a=sqrt(5))
            with torch.no_grad():
                self.a.copy_(torch.empty(self.a.shape).uniform_(-bound, bound, generator=generator))
        self.magnitude = nn.Parameter(weight.detach().float().norm(dim=1)) if config.kind == "dora" else None
        self.scaling = config.alpha / config.rank
        self.dropout = config.dropout

    def delta(self) -> Tensor:
        """[out, in] float32."""
        return self.scaling * (self.b @ self.a)

    def row_scale(self, weight: Tensor) -> Tensor | None:
        """DoRA's factor of each row, [out]; its norm is held constant in the gradient, as the paper does. None for LoRA."""
        if self.magnitude is None:
            return None
        with torch.no_grad():
            norm = (weight.float() + self.delta()).norm(dim=1)
        return self.magnitude / norm

    def merged(self, weight: Tensor) -> Tensor:
        """The adapted weight, in the weight's dtype."""
        adapted = weight.float() + self.delta()
        scale = self.row_scale(weight)
        return (adapted if scale is None else adapted * scale[:, None]).to(weight.dtype)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        low = linear(F.dropout(x, self.dropout, self.training), self.a.to(x.dtype))
        out = linear(x, weight) + linear(low, self.b.to(x.dtype)) * self.scaling
        scale = self.row_scale(weight)
        return out if scale is None else out * scale.to(out.dtype)


class AdaptedLinear(Linear):
    """A linear map with adapters by name, of which one is active, or none.

    Attributes:
        weight: the base's parameter itself; while merged, the adapted weight.
    """

    def __init__(self, base: Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, None
        self.weight = base.weight
        self.train(base.training)
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self._base: Tensor | None = None  # the weight as it was, while merged

    @property
    def is_merged(self) -> bool:
        return self._base is not None

    @property
    def is_plain(self) -> bool:
        """Whether the weight alone is the map."""
        return self.active is None or self.is_merged

    def forward(self, x: Tensor) -> Tensor:
        if self.is_plain:
            return linear(x, self.weight)
        return self.adapters[self.active](x, self.weight)

    @torch.no_grad()
    def merge(self) -> None:
        if self.active is not None and not self.is_merged:
            self._base = self.weight.data
            self.weight.data = self.adapters[self.active].merged(self._base)

    @torch.no_grad()
    def unmerge(self) -> None:
        if self._base is not None:
            self.weight.data, self._base = self._base, None


class AdaptedGatedLinear(AdaptedLinear):
    """The same for the map that ends a feed-forward part."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        return gated_linear(gate, up, self.weight) if self.is_plain else super().forward(swiglu(gate, up))


class _Wholes:
    """Tables and heads that adapters train whole: the base's values, and each adapter's while another is active."""

    def __init__(self) -> None:
        self._base: dict[str, Tensor] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}  # by adapter
        self._active: str | None = None

    def start(self, model: CSM, adapter: str, names: list[str]) -> None:
        """From now on the parameters of these names are the adapter's own, a copy of the base's."""
        for name in names:
            parameter = whole_parameter(model, name)
            self._base.setdefault(name, parameter.data)
            parameter.data = parameter.data.clone()
        self._kept[adapter] = {name: whole_parameter(model, name).data for name in names}
        self._active = adapter

    def switch(self, model: CSM, adapter: str | None) -> None:
        if adapter == self._active:
            return
        for name, base in self._base.items():
            parameter = whole_parameter(model, name)
            if name in self._kept.get(self._active or "", {}):
                self._kept[self._active or ""][name] = parameter.data
            parameter.data = self._kept.get(adapter or "", {}).get(name, base)
        self._active = adapter

    def forget(self, adapter: str) -> None:
        """Drop an adapter that is not active."""
        self._kept.pop(adapter, None)


def _wholes(model: CSM) -> _Wholes:
    if "_adapter_wholes" not in model.__dict__:
        model.__dict__["_adapter_wholes"] = _Wholes()
    return model.__dict__["_adapter_wholes"]


def attach_adapter(model: CSM, config: AdapterConfig, seed: int = 0, name: str = "default") -> None:
    """Give a model a new adapter, make it the active one, and freeze all that is not the adapter's.

    Args:
        config: `kind` "lora" or "dora", rank, alpha, dropout, targets, and the tables or heads to train beside it.
        seed: of A; the same seed gives the same adapter.
        name: must be new to the model.
    Raises:
        ValueError: if nothing would be adapted, the name is taken, or the model is merged.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for place, module in adaptable_maps(model, config):
        adapted = _adapted(model, place, module)
        if name in adapted.adapters:
            raise ValueError(f"adapter {name!r}: the model already has one of that name")
        adapted.adapters[name] = LowRank(adapted.weight, _rank(place, config), config, generator).train(adapted.training)
        adapted.active = name
    wholes = _wholes(model)
    wholes.switch(model, None)  # what is trained whole begins as the base's
    wholes.start(model, name, config.also_train)
    for whole in config.also_train:
        whole_parameter(model, whole).requires_grad_(True)


def adapted_maps(model: CSM) -> dict[str, AdaptedLinear]:
    """The maps that have adapters, by name (`backbone.layers.0.attn.q_proj`)."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def set_adapter(model: CSM, name: str | None) -> None:
    """Make one adapter the active one; None is the base alone. A merged model is unmerged first.

    Raises:
        ValueError: if no map has an adapter of that name.
    """
    maps = adapted_maps(model)
    known = sorted({known for adapted in maps.values() for known in adapted.adapters})
    if name is not None and name not in known:
        raise ValueError(f"adapter {name!r}: the model has {', '.join(known) or 'none'}")
    for adapted in maps.values():
        adapted.unmerge()
        adapted.active = name if name in adapted.adapters else None
    _wholes(model).switch(model, name)


def detach_adapter(model: CSM, name: str) -> None:
    """Take an adapter off the model, which is then the base alone; the name is free again."""
    set_adapter(model, None)
    for adapted in adapted_maps(model).values():
        if name in adapted.adapters:
            del adapted.adapters[name]
    _wholes(model).forget(name)


def merge_adapter(model: CSM) -> None:
    """Fold the active adapter into the weights: the model then runs as fast as its base. `unmerge_adapter` takes it back."""
    for adapted in adapted_maps(model).values():
        adapted.merge()


def unmerge_adapter(model: CSM) -> None:
    """Put back the base's weights, bit for bit: they were kept, not computed back."""
    for adapted in adapted_maps(model).values():
        adapted.unmerge()


@contextmanager
def merged_adapter(model: CSM) -> Iterator[None]:
    """The model with its active adapter merged, inside; outside as it was."""
    before = {name for name, adapted in adapted_maps(model).items() if adapted.is_merged}
    merge_adapter(model)
    try:
        yield
    finally:
        for name, adapted in adapted_maps(model).items():
            if name not in before:
                adapted.unmerge()


def base_state_dict(model: CSM) -> dict[str, Tensor]:
    """The model's tensors under the names of a model without adapters: of the merged model while it is merged."""
    return {name: tensor for name, tensor in model.state_dict().items() if ".adapters." not in name}


def adaptable_maps(model: CSM, config: AdapterConfig) -> list[tuple[str, Linear]]:
    """The maps that a configuration names, in the order of the model."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and name.split(".", 1)[0] in config.parts
        and ".layers." in name
        and name.rsplit(".", 1)[1] in config.targets
    ]
    if not found:
        raise ValueError(f"adapter.targets={config.targets} in adapter.parts={config.parts}: no linear map of the model is meant")
    return found


def _rank(place: str, config: AdapterConfig) -> int:
    in_decoder = place.split(".", 1)[0] == "decoder"
    return config.decoder_rank if in_decoder and config.decoder_rank is not None else config.rank


def _adapted(model: CSM, place: str, module: Linear) -> AdaptedLinear:
    """The map with room for adapters, put in the place of the plain one."""
    if isinstance(module, AdaptedLinear):
        if module.is_merged:
            raise ValueError("the model's adapter is merged; unmerge it before another is attached")
        return module
    adapted = AdaptedGatedLinear(module) if isinstance(module, GatedLinear) else AdaptedLinear(module)
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, adapted)
    return adapted


def whole_parameter(model: CSM, name: str) -> nn.Parameter:
    """A table or head that is trained whole."""
    return model.audio_head if name == "audio_head" else model.get_submodule(name).weight
