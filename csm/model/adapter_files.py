"""Adapters on disk, in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json`.

Names and the RoPE lane order are those of transformers' CSM, so `peft` loads our files onto our transformers export, and we
load what `peft` trained there. Source: the files that peft 0.21 writes.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from csm.config import ADAPTER_TARGETS, ADAPTER_WHOLES, AdapterConfig
from csm.model.csm import CSM
from csm.model.layouts import halves_from_interleaved, interleaved_from_halves, rotary_heads, transformers_name
from csm.model.lora import adaptable_maps, adapted_maps, attach_adapter, detach_adapter, whole_parameter
from csm.whole_files import write_text

ADAPTER_FOLDER = "adapter"  # in a training checkpoint
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_THEIRS_OF_OURS = {
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "output_proj": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
_PART_OF_OURS = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}


def save_adapter(model: CSM, folder: str | Path, config: AdapterConfig, *, name: str = "default", base: str | None = None) -> None:
    """Write an adapter in PEFT's layout.

    Args:
        config: as attached.
        base: what it belongs to, for `adapter_config.json`: a folder or hub id.
    Raises:
        ValueError: if the model has no adapter of that name.
    """
    write_adapter(Path(folder), adapter_tensors(model, config, name=name), config, base=base)


def adapter_tensors(model: CSM, config: AdapterConfig, *, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors under PEFT's names, in transformers' order of lanes.

    Raises:
        ValueError: if the model has no adapter of that name.
    """
    tensors: dict[str, Tensor] = {}
    for place, adapted in adapted_maps(model).items():
        if name not in adapted.adapters:
            continue
        low, heads, prefix = adapted.adapters[name], rotary_heads(f"{place}.weight", model.config), _peft_name(place)
        tensors[prefix + _A] = low.a.detach()
        tensors[prefix + _B] = low.b.detach() if heads is None else halves_from_interleaved(low.b.detach(), heads)
        if low.magnitude is not None:
            magnitude = low.magnitude.detach()
            tensors[prefix + _MAGNITUDE] = magnitude if heads is None else halves_from_interleaved(magnitude, heads)
    if not tensors:
        raise ValueError(f"adapter {name!r}: the model has none of that name to save")
    return tensors | {_PREFIX + _whole_name(whole): whole_parameter(model, whole).detach() for whole in config.also_train}


def write_adapter(folder: Path, tensors: dict[str, Tensor], config: AdapterConfig, *, base: str | None = None) -> None:
    """Write `adapter_tensors` and the configuration that goes with them."""
    described = {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": "CsmForConditionalGeneration", "parent_library": "transformers.models.csm.modeling_csm"},
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        **_decoder_patterns(config),
        "lora_dropout": config.dropout,
        "use_dora": config.kind == "dora",
        "target_modules": _peft_targets(config),
        "modules_to_save": [_whole_name(whole).removesuffix(".weight") for whole in config.also_train] or None,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS_NAME + ".tmp")
    save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, part, metadata={"format": "pt"})
    os.replace(part, folder / WEIGHTS_NAME)
    write_text(folder / CONFIG_NAME, json.dumps(described, indent=2) + "\n")


def load_adapter(model: CSM, folder: str | Path, *, name: str = "default") -> AdapterConfig:
    """Attach an adapter read from PEFT's layout (ours or peft's own), make it active, and return its configuration.

    Raises:
        FileNotFoundError: if the folder has no adapter.
        ValueError: if it is no LoRA, is of another model, or lacks tensors; says which.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    tensors = _read_tensors(folder)
    wanted = {place for place, _ in adaptable_maps(model, config)}
    if not any(_peft_name(place) + _A in tensors for place in wanted):
        raise ValueError(
            f"{folder}: none of its {len(tensors)} tensors belongs to a CSM; expected names like {_peft_name(min(wanted))}{_A}"
        )
    attach_adapter(model, config, name=name)
    own = dict(model.named_parameters())
    try:
        state = read_adapter_state(model, folder, config, name=name)
    except ValueError:
        detach_adapter(model, name)
        raise
    with torch.no_grad():
        for key, tensor in state.items():
            own[key].copy_(tensor)
    return config


def read_adapter_state(model: CSM, folder: Path, config: AdapterConfig, *, name: str = "default") -> dict[str, Tensor]:
    """The files' tensors under the names of a model that already has the adapter: its factors, and what is trained whole.

    Raises:
        ValueError: if they are not those of the adapter; says which.
    """
    tensors = _read_tensors(folder)
    state: dict[str, Tensor] = {}
    for place, adapted in adapted_maps(model).items():
        if name not in adapted.adapters:
            continue
        low, heads, prefix = adapted.adapters[name], rotary_heads(f"{place}.weight", model.config), _peft_name(place)
        inside = f"{place}.adapters.{name}"
        state[f"{inside}.a"] = _take(tensors, prefix + _A, low.a, folder)
        b = _take(tensors, prefix + _B, low.b, folder)
        state[f"{inside}.b"] = b if heads is None else interleaved_from_halves(b, heads)
        if low.magnitude is not None:
            magnitude = _take(tensors, prefix + _MAGNITUDE, low.magnitude, folder)
            state[f"{inside}.magnitude"] = magnitude if heads is None else interleaved_from_halves(magnitude, heads)
    for whole in config.also_train:
        own_name = whole if whole == "audio_head" else f"{whole}.weight"
        state[own_name] = _take(tensors, _PREFIX + _whole_name(whole), whole_parameter(model, whole), folder)
    if tensors:
        raise ValueError(f"{folder}: {len(tensors)} tensors have no place in model={model.config.name}, such as {min(tensors)}")
    return state


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of an adapter in PEFT's layout.

    Raises:
        FileNotFoundError, ValueError: if there is none, or it asks for what we do not have.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG_NAME} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        kind = values["peft_type"]
        rank, alpha = int(values["r"]), float(values["lora_alpha"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a LoRA configuration ({error!r})") from error
    strange = [key for key in ("use_rslora", "fan_in_fan_out", "layers_to_transform") if values.get(key)]
    if kind != "LORA" or values.get("bias", "none") != "none" or strange:
        raise ValueError(f"{path}: peft_type {kind}, {', '.join(strange) or 'bias'}: only plain LoRA and DoRA without bias can be read")
    whole = {_whole_name(name).removesuffix(".weight"): name for name in ADAPTER_WHOLES}
    modules = values.get("modules_to_save") or []
    unknown = [module for module in modules if module not in whole]
    if unknown:
        raise ValueError(f"{path}: modules_to_save {unknown}: expected some of {sorted(whole)}")
    config = AdapterConfig(
        kind="dora" if values.get("use_dora") else "lora",
        rank=rank,
        alpha=alpha,
        dropout=float(values.get("lora_dropout") or 0.0),
        also_train=[whole[module] for module in modules],
    )
    config = _with_targets(config, values.get("target_modules"), path)
    patterns = values.get("rank_pattern") or {}, values.get("alpha_pattern") or {}
    return replace(config, decoder_rank=_read_decoder_rank(config, *patterns, path)) if any(patterns) else config


def _peft_targets(config: AdapterConfig) -> str:
    """The regular expression that PEFT matches module names with."""
    return _peft_pattern(config.parts, config.targets)


def _peft_pattern(parts: Sequence[str], targets: Sequence[str]) -> str:
    theirs = "|".join(_THEIRS_OF_OURS[target] for target in targets)
    return rf"({'|'.join(re.escape(_PART_OF_OURS[part]) for part in parts)})\.layers\.\d+\.(self_attn|mlp)\.({theirs})"


def _decoder_patterns(config: AdapterConfig) -> dict[str, dict[str, float]]:
    """PEFT's way to say `decoder_rank`: ranks, and the alphas that keep the scale, of the modules that a pattern matches."""
    if config.decoder_rank is None or "decoder" not in config.parts:
        return {}
    pattern = _peft_pattern(["decoder"], config.targets)
    return {"rank_pattern": {pattern: config.decoder_rank}, "alpha_pattern": {pattern: config.alpha * config.decoder_rank / config.rank}}


def _read_decoder_rank(config: AdapterConfig, ranks: dict[str, int], alphas: dict[str, float], path: Path) -> int:
    """The depth decoder's rank, where patterns say that and nothing else: one rank for all of it, scaled as the backbone is."""
    pattern, rank = next(iter(ranks.items()), ("", None))
    meant = {part: [_matches(pattern, _peft_module(part, target)) for target in config.targets] for part in config.parts}
    is_decoders = all(meant.get("decoder", [False])) and not any(meant.get("backbone", []))
    if not (len(ranks) == 1 and alphas.keys() == ranks.keys() and is_decoders and isinstance(rank, int) and rank > 0) or (
        not math.isclose(alphas[pattern] / rank, config.alpha / config.rank)
    ):
        raise ValueError(
            f"{path}: rank_pattern {ranks}, alpha_pattern {alphas}: expected one pattern, the same in both, for all of the depth decoder's "
            "targets and none of the backbone's, with alpha / r as everywhere else"
        )
    return rank


def _matches(pattern: str, module: str) -> bool:
    """Whether PEFT takes a pattern for a module's: to its end, from its beginning or from a dot on."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _with_targets(config: AdapterConfig, targets: object, path: Path) -> AdapterConfig:
    """The configuration with PEFT's `target_modules` read: a pattern, or a list of names that hold in both transformers."""
    ours = [name for name in ADAPTER_TARGETS if any(_is_target(targets, part, name) for part in _PART_OF_OURS)]
    parts = [part for part in _PART_OF_OURS if any(_is_target(targets, part, name) for name in ours)]
    if not ours:
        raise ValueError(
            f"{path}: target_modules {targets!r} names no linear map of a CSM; expected some of {sorted(_THEIRS_OF_OURS.values())}"
        )
    return replace(config, targets=ours, parts=parts)


def _is_target(targets: object, part: str, ours: str) -> bool:
    full = _peft_module(part, ours)
    if isinstance(targets, str):
        return re.fullmatch(targets, full) is not None
    return isinstance(targets, list) and any(full == target or full.endswith(f".{target}") for target in targets)


def _peft_module(part: str, target: str) -> str:
    """A map's name in PEFT's patterns, in the first layer of a part."""
    inner = "mlp" if target.startswith("w") else "self_attn"
    return f"{_PART_OF_OURS[part]}.layers.0.{inner}.{_THEIRS_OF_OURS[target]}"


def _whole_name(name: str) -> str:
    return transformers_name(name if name == "audio_head" else f"{name}.weight")


def _peft_name(place: str) -> str:
    return _PREFIX + transformers_name(f"{place}.weight").removesuffix(".weight")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / WEIGHTS_NAME}: cannot be read ({error})") from error


def _take(tensors: dict[str, Tensor], key: str, like: nn.Parameter, folder: Path) -> Tensor:
    got = tensors.pop(key, None)
    if got is None or got.shape != like.shape:
        shape = "missing" if got is None else tuple(got.shape)
        raise ValueError(f"{folder}: {key} is {shape}, the model takes {tuple(like.shape)}; the adapter is of another model")
    return got
