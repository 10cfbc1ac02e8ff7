"""`csm export`: write a checkpoint in another layout, with what the layout has a place for.

| layout | codec | tokenizer |
|---|---|---|
| transformers | Mimi, as `codec_model.*` | Llama-3's, as the processor's files |
| csm | any, in codec/; voice presets, too | tokenizer.json and its kin |
| sesame | none | none |

Of a ZeRO checkpoint the float32 weights are taken, which lie in pieces in its zero/ folder: they are put together and written
one at a time, so that a large model needs no machine that can hold it.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm.cli.conversation import read_json
from csm.cli.subcommand import add_command

if TYPE_CHECKING:  # torch takes seconds to import; --help is answered without it
    import torch

    from csm.model.csm import CSM
    from csm.model.pretrained import CodecWeights
    from csm.model.weights import Source

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def declare(commands: Any) -> None:
    """Add `export` to the subcommands."""
    command = add_command(commands, "export", _export, "Write a checkpoint in another layout: ours, Sesame's or transformers'.")
    command.add_argument("source", metavar="SRC", help="a run, a checkpoint folder in any layout, or a hub id")
    command.add_argument("target", type=Path, metavar="DST", help="a folder that does not exist yet, or is empty")
    command.add_argument("--layout", required=True, choices=("transformers", "sesame", "csm"))
    command.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights written; as stored without it")


def _export(arguments: argparse.Namespace) -> int:
    import torch

    from csm.model.pretrained import load_model, resolve_checkpoint, save_model
    from csm.training.zero_files import FOLDER

    source, target, layout = resolve_checkpoint(arguments.source), arguments.target, arguments.layout
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not an empty folder; name a new one")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, None: None}[arguments.dtype]
    is_zero = (source / FOLDER).is_dir()
    model, pieces = _open_zero(source, dtype) if is_zero else (load_model(source, dtype=dtype), None)
    if layout == "transformers":
        codec, tokenizer = _mimi_of(source), _llama3_files_of(source)
        save_model(model, target, layout=layout, codec=codec, tokenizer=tokenizer, sources=pieces)
        if codec is None:
            print(f"no Mimi in {source}: transformers will start one with random weights")
        if tokenizer is None:
            print(f"no Llama-3 tokenizer in {source}: no processor files written")
    else:
        save_model(model, target, layout=layout, sources=pieces)
    if layout == "csm":
        _copy_companions(source, target, model.config.num_codebooks)
    print(f"{target}: {model.num_parameters:,} parameters in layout {layout}{', put together from zero/' if is_zero else ''}")
    return 0


def _open_zero(source: Path, dtype: torch.dtype | None) -> tuple[CSM, dict[str, Source]]:
    """A ZeRO checkpoint's model without memory for its weights, and where those come from.

    Raises:
        ValueError: if a file is not as the manifest says.
    """
    import torch

    from csm.model.checkpoint_folder import find_fault
    from csm.model.csm import CSM
    from csm.model.pretrained import read_config
    from csm.training.zero_files import ZeroFiles

    fault = find_fault(source)
    if fault is not None:
        raise ValueError(f"{source}: not usable, {fault}; take another checkpoint of the run")
    with torch.device("meta"):
        model = CSM(read_config(source))
    return model, ZeroFiles(source).sources(dtype or torch.float32)


def _mimi_of(source: Path) -> CodecWeights | None:
    """The Mimi inside a checkpoint or beside it; None where there is none, or another codec."""
    from csm.codec import codec_from_folder
    from csm.model.pretrained import CodecWeights, load_codec_weights

    inside = load_codec_weights(source)
    if inside is not None or not (source / "codec" / "codec.json").is_file():
        return inside
    if read_json(source / "codec" / "codec.json").get("name") != "mimi":
        return None
    model = codec_from_folder(source / "codec").model  # type: ignore[attr-defined]
    return CodecWeights(model.config.to_dict(), model.state_dict())


def _llama3_files_of(source: Path) -> Path | None:
    """A folder or file that `save_model` makes the processor of: transformers' own, or where our Llama-3 tokenizer is read."""
    from csm.text import packaged_llama3

    if (source / "tokenizer_config.json").is_file():
        return source
    if not (source / "tokenizer.json").is_file():
        return None
    settings = read_json(source / "tokenizer.json")
    if settings.get("kind") != "llama3":
        return None
    path = Path(settings["source"]) if settings.get("source") else packaged_llama3()
    return path if path is not None and path.exists() else None


def _copy_companions(source: Path, target: Path, num_codebooks: int) -> None:
    """Tokenizer, codec and voices beside a checkpoint of ours; a Mimi that was inside comes out of it."""
    from csm.codec.voices import VOICES_FOLDER
    from csm.model.pretrained import load_codec_weights

    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if (source / "codec").is_dir():
        shutil.copytree(source / "codec", target / "codec")
    elif (inside := load_codec_weights(source)) is not None:
        from transformers import MimiConfig, MimiModel  # seconds to import

        from csm.codec.mimi import MimiCodec

        model = MimiModel(MimiConfig.from_dict(dict(inside.config)))
        model.load_state_dict(dict(inside.tensors))
        MimiCodec(model, num_codebooks).save(target / "codec")
    if (source / VOICES_FOLDER).is_dir():
        shutil.copytree(source / VOICES_FOLDER, target / VOICES_FOLDER)
