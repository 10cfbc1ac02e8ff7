"""Checkpoints in and out: find one, tell its layout, check every tensor, load it, and write any of the three layouts.

How layouts name things is `csm.model.layouts`', bytes on disk are `csm.model.weights`'. A codec that travels inside a
transformers checkpoint passes through as plain tensors: what it means is `csm.codec`'s business.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from csm.config import ModelConfig
from csm.model.checkpoint_folder import MANIFEST, find_fault, newest_valid_checkpoint
from csm.model.csm import CSM
from csm.model.layouts import (
    CODEC_PREFIX,
    LAYOUTS,
    TIED_TABLE,
    config_from_json,
    csm_json,
    generation_json,
    halves_from_interleaved,
    interleaved_from_halves,
    layout_of_config,
    rotary_heads,
    sesame_json,
    shape_from_llama,
    transformers_json,
    transformers_name,
)
from csm.model.lora import base_state_dict, merged_adapter
from csm.model.processor import save_processor
from csm.model.weights import INDEX_NAME, SINGLE_NAME, Source, TensorFiles, read_json, write_json, write_tensors

CONFIG_NAME = "config.json"
MAX_SHARD_BYTES = 5_000_000_000
HUB_TIMEOUT_S = 5
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class CodecWeights:
    """Mimi as it travels inside a transformers checkpoint.

    Attributes:
        config: its MimiConfig as a dictionary.
        tensors: MimiModel's state dict, without the `codec_model.` in front.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def resolve_checkpoint(path: str | Path, name: str = "best") -> Path:
    """The checkpoint folder that `path` means.

    Args:
        path: a checkpoint folder; a `checkpoints` folder or a run, which give `name`, else `best`, else `last`;
            `.../checkpoints/last` and `.../checkpoints/best`; or a hub id.
        name: `best`, `last`, or a folder's name under checkpoints/.
    Raises:
        FileNotFoundError: if there is none; the message says where was looked.
        ValueError: if `best` or `last` names one that is damaged.
    """
    folder = Path(path)
    if (folder / CONFIG_NAME).is_file():
        return folder
    if not folder.exists() and folder.with_name(folder.name + ".txt").is_file():
        return _follow(folder.parent, folder.name)
    checkpoints = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if checkpoints.is_dir():
        if (checkpoints / name / CONFIG_NAME).is_file():
            return checkpoints / name
        for pointer in (name, "best", "last"):
            if (checkpoints / f"{pointer}.txt").is_file():
                return _follow(checkpoints, pointer)
        if any(checkpoints.glob("*.safetensors*")) or any(checkpoints.glob("*.pt")) or any(checkpoints.glob("*.bin")):
            return folder  # weights without a config: the loader says what is missing
        raise FileNotFoundError(f"{path}: no checkpoint there; expected {CONFIG_NAME} with weights, or a run with checkpoints/{name}.txt")
    if isinstance(path, str) and _HUB_ID.fullmatch(path):
        return _folder_from_hub(path)
    raise FileNotFoundError(f"{path}: no such folder; give a run, a checkpoint folder, or a hub id such as sesame/csm-1b")


def _follow(checkpoints: Path, pointer: str) -> Path:
    path = checkpoints / f"{pointer}.txt"
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    is_name = name != "" and name.isprintable() and Path(name).name == name
    if not is_name or not (checkpoints / name).is_dir():
        raise FileNotFoundError(f"{path} names {name[:40]!r}, which is no checkpoint there; {_advise(checkpoints)}")
    refuse_damaged(checkpoints / name, is_quick=True)
    return checkpoints / name


def refuse_damaged(folder: Path, *, is_quick: bool = False) -> None:
    """Check what a model needs of a checkpoint that training wrote; folders without a manifest pass.

    Args:
        is_quick: compare sizes only.
    Raises:
        ValueError: names the file, what is wrong with it, and a checkpoint beside it that is whole.
    """
    if not (folder / MANIFEST).is_file():
        return
    fault = find_fault(folder, is_quick=is_quick, names=_is_of_model)
    if fault is not None:
        raise ValueError(f"{folder}: not usable, {fault}; {_advise(folder.parent)}")


def _advise(checkpoints: Path) -> str:
    whole = newest_valid_checkpoint(checkpoints, say=lambda line: None, names=_is_of_model)
    return f"the newest that is whole is {whole}: give that one" if whole is not None else "no checkpoint beside it is whole"


def _is_of_model(name: str) -> bool:
    """Whether a checkpoint's file is read to speak with it, not only to train on."""
    return name.startswith((CONFIG_NAME, "model", "tokenizer", "codec/"))


def detect_layout(folder: str | Path) -> str:
    """ "csm", "sesame" or "transformers", by the tensors' names and the config.

    Raises:
        ValueError: if it is none of them, or config and tensors disagree.
    """
    return _Checkpoint(Path(folder)).layout


def read_config(folder: str | Path) -> ModelConfig:
    """The shapes that a checkpoint folder's config states, without opening its weights."""
    folder = Path(folder)
    return config_from_json(_config_json(folder), f"{folder}/{CONFIG_NAME}")


def load_model(path: str | Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> CSM:
    """Read a checkpoint into a CSM; see `CSM.from_pretrained`.

    Args:
        dtype: None keeps the stored one.
    """
    checkpoint = _Checkpoint(resolve_checkpoint(path))
    refuse_damaged(checkpoint.folder)
    with torch.device("meta"):
        model = CSM(checkpoint.config)
    checkpoint.check(_shapes(model.state_dict()))
    tensors = {name: checkpoint.read(name, dtype).to(device) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    return model


def load_codec_weights(path: str | Path) -> CodecWeights | None:
    """The Mimi inside a transformers checkpoint; None where there is none."""
    checkpoint = _Checkpoint(resolve_checkpoint(path))
    names = [name for name in checkpoint.files.shapes if name.startswith(CODEC_PREFIX)]
    if not names:
        return None
    tensors = {name.removeprefix(CODEC_PREFIX): checkpoint.files.read(name) for name in names}
    return CodecWeights(checkpoint.json.get("codec_config") or {"model_type": "mimi"}, tensors)


def save_model(
    model: CSM,
    folder: str | Path,
    *,
    layout: str = "csm",
    codec: CodecWeights | None = None,
    tokenizer: str | Path | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    sources: Mapping[str, Source] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights and config in one of the layouts; a model with an adapter is written merged.

    Args:
        layout: "csm" (config.json and model.safetensors), "sesame" (the same tensors, Sesame's config, never sharded) or
            "transformers" (with generation_config.json; `CsmForConditionalGeneration.from_pretrained` reads it).
        codec: written inside the transformers layout; without it transformers starts a Mimi of its own.
        tokenizer: with the transformers layout, Llama-3's `tokenizer.model` or a transformers tokenizer's folder; then the
            processor's files are written too.
        state_dict: used in place of the model's.
        sources: used in place of the model's, which may then be on the meta device: weights that are not in memory, fetched
            and written one at a time.
        max_shard_bytes: above it the weights go to several files and an index.
    Raises:
        ValueError: for an unknown layout, a codec where the layout has no place for one, or tensors that are not the model's.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if codec is not None and layout != "transformers":
        raise ValueError(f"layout={layout} holds no codec; leave codec out, or choose layout=transformers")
    if tokenizer is not None and layout != "transformers":
        raise ValueError(f"layout={layout} holds no processor; leave tokenizer out, or choose layout=transformers")
    folder = Path(folder)
    config = model.config
    own = base_state_dict(model)
    if sources is None and state_dict is None:
        with merged_adapter(model):  # only here: a checkpoint is written from a state dict, beside a model that trains
            state_dict = base_state_dict(model)
    if sources is None:
        assert state_dict is not None
        sources = _sources(state_dict)
    _refuse_differences(folder, "the model being saved", {name: shape for name, (shape, _, _) in sources.items()}, _shapes(own))
    if tokenizer is not None:
        save_processor(folder, tokenizer, config.text_vocab_size)
    dtype = next(dtype for _, dtype, _ in sources.values())
    if layout == "transformers":
        sources = _transformers_sources(sources, config, codec)
    # One key of metadata only: safetensors writes several in a random order, and equal weights must give equal bytes.
    write_tensors(folder, sources, max_shard_bytes=None if layout == "sesame" else max_shard_bytes, metadata={"format": "pt"})
    if layout == "transformers":
        write_json(folder / "generation_config.json", generation_json(config))
        settings = transformers_json(config, codec.config if codec is not None else None)
        write_json(folder / CONFIG_NAME, {**settings, "dtype": str(dtype).removeprefix("torch.")})
    else:
        write_json(folder / CONFIG_NAME, csm_json(config) if layout == "csm" else sesame_json(config))


def load_llama_backbone(model: CSM, source: str | Path) -> None:
    """Start the backbone from Llama weights (transformers layout): its layers and last norm; the rest stays as it is.

    The text table is taken as well when it has the model's size.

    Raises:
        FileNotFoundError: if there is nothing at `source`.
        ValueError: if the Llama's shape is not the backbone's, or tensors are missing.
    """
    folder = Path(source) if Path(source).is_dir() else resolve_checkpoint(str(source))
    settings = _config_json(folder)
    if settings.get("model_type") != "llama":
        raise ValueError(f"{folder}: model_type={settings.get('model_type')!r}, model.warm_start wants a Llama in transformers' layout")
    llama, ours = shape_from_llama(settings), model.config.backbone
    if llama != ours:
        raise ValueError(f"{folder}: {llama} does not fit the backbone, {ours}; choose the model whose backbone has the Llama's shape")
    files = TensorFiles(folder, settings.get("transformers_weights"))
    own = dict(model.backbone.named_parameters(prefix="backbone"))
    names = {name: transformers_name(name).replace("backbone_model.", "model.", 1) for name in own}
    found = {name: shape for name, shape in files.shapes.items() if name in names.values()}  # it has heads of its own, too
    _refuse_differences(folder, "its Llama", found, {names[name]: shape for name, shape in _shapes(own).items()})
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(_from_halves(files.read(names[name]), name, model.config))
        table = model.text_embeddings.weight
        if files.shapes.get("model.embed_tokens.weight") == tuple(table.shape):
            table.copy_(files.read("model.embed_tokens.weight"))


class _Checkpoint:
    """A folder whose config and tensor names agree on a layout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if not (folder / CONFIG_NAME).is_file():
            TensorFiles(folder)  # says so if there are pickles only, or nothing
            raise FileNotFoundError(f"{folder} has weights and no {CONFIG_NAME}; copy the config from where the weights came")
        self.json = _config_json(folder)
        self.config = config_from_json(self.json, f"{folder}/{CONFIG_NAME}")
        self.files = TensorFiles(folder, self.json.get("transformers_weights"))
        of_config = layout_of_config(self.json)
        assert of_config is not None  # config_from_json refuses others
        if any(name.startswith("backbone_model.") for name in self.files.shapes):
            self.layout = "transformers"
        else:
            # Sesame's hub folder has transformers' config beside Sesame's tensors: the names decide.
            self.layout = "csm" if of_config == "csm" else "sesame"
        if self.layout == "transformers" and of_config != "transformers":
            raise ValueError(f"{folder}: {CONFIG_NAME} is of layout {of_config}, the tensors are transformers'; copy the checkpoint again")

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse missing, extra and misshapen tensors, in one message."""
        found = self.files.shapes
        if self.layout == "transformers":
            expected = {transformers_name(name): shape for name, shape in expected.items()}
            found = {name: shape for name, shape in found.items() if not name.startswith(CODEC_PREFIX)}
            table = transformers_name("audio_embeddings.weight")
            if TIED_TABLE in found:
                both = table in found
                if both and not torch.equal(self.files.read(table), self.files.read(TIED_TABLE)):
                    raise ValueError(f"{self.folder}: {table} and {TIED_TABLE} differ, our model shares one audio table")
                shape = found.pop(TIED_TABLE)
                found.setdefault(table, shape)  # transformers itself writes only one of the two
        _refuse_differences(self.folder, f"the model of its {CONFIG_NAME}", found, expected)

    def read(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """One of our tensors, whatever this layout calls it."""
        if self.layout != "transformers":
            return self.files.read(name, dtype)
        theirs = transformers_name(name)
        if theirs not in self.files.shapes:
            theirs = TIED_TABLE
        return _from_halves(self.files.read(theirs, dtype), name, self.config)


def _from_halves(tensor: Tensor, name: str, config: ModelConfig) -> Tensor:
    heads = rotary_heads(name, config)
    return tensor if heads is None else interleaved_from_halves(tensor, heads)


def _config_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint folder has {CONFIG_NAME} and safetensors")
    return read_json(path)


def _refuse_differences(folder: Path, whose: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    misshapen = sorted(name for name in set(found) & set(expected) if found[name] != expected[name])
    named = ((what, names) for what, names in (("missing", missing), ("unknown", extra)) if names)
    parts = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for what, names in named]
    parts += [f"{name} is {list(found[name])}, expected {list(expected[name])}" for name in misshapen[:3]]
    if len(misshapen) > 3:
        parts.append(f"{len(misshapen) - 3} more of a wrong shape")
    if parts:
        raise ValueError(f"{folder}: tensors are not those of {whose}: {'; '.join(parts)}; use the checkpoint with its own config")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _sources(tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    return {name: (tuple(tensor.shape), tensor.dtype, tensor.detach) for name, tensor in tensors.items()}


def _transformers_sources(own: Mapping[str, Source], config: ModelConfig, codec: CodecWeights | None) -> dict[str, Source]:
    """transformers' tensors, permuted only when they are written, so that one at a time is in memory."""
    sources: dict[str, Source] = {}
    for name, (shape, dtype, give) in own.items():
        heads = rotary_heads(name, config)
        sources[transformers_name(name)] = (shape, dtype, give if heads is None else partial(_to_halves, give, heads))
    sources[TIED_TABLE] = own["audio_embeddings.weight"]
    if codec is not None:
        sources |= {CODEC_PREFIX + name: source for name, source in _sources(codec.tensors).items()}
    return sources


def _to_halves(give: Callable[[], Tensor], heads: int) -> Tensor:
    return halves_from_interleaved(give(), heads)


def _folder_from_hub(repository: str) -> Path:
    """A hub repository's config and safetensors, from the local cache when they are there, else downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(patterns: list[str], **where: Any) -> Path:
        return Path(snapshot_download(repository, allow_patterns=patterns, **where))

    def fetch(**where: Any) -> Path:
        folder = snapshot(["*.json", "tokenizer*", "codec/*"], **where)
        settings = _config_json(folder)
        index = folder / settings.get("transformers_weights", INDEX_NAME)
        is_sharded = index.name.endswith(".index.json") and index.is_file()
        snapshot(sorted(set(read_json(index)["weight_map"].values())) if is_sharded else [SINGLE_NAME, index.name], **where)
        TensorFiles(folder, settings.get("transformers_weights"))  # a snapshot may be in the cache in part
        return folder

    try:
        return fetch(local_files_only=True)
    except (OSError, ValueError):
        pass  # not in the cache, or not all of it
    reason = "HF_HUB_OFFLINE is set"
    if os.environ.get("HF_HUB_OFFLINE", "").upper() not in ("1", "TRUE", "YES", "ON"):
        try:
            return fetch(etag_timeout=HUB_TIMEOUT_S)
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise FileNotFoundError(
        f"{repository}: no such folder here, not in the hub's cache, and not downloaded ({reason}); on a connected machine run "
        f"`hf download {repository} --local-dir {repository.split('/')[1]}` and give that folder"
    )
