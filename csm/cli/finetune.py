"""The recipe of fine-tuning: prepare recordings with the base's tools, train, measure what was won and lost, hand over."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csm.cli.base import Base, open_base
from csm.cli.hydra_entry import main as hydra_main
from csm.cli.train import train
from csm.config import DataConfig, EvaluateConfig, FinetuneConfig, TrainConfig
from csm.whole_files import write_text

if TYPE_CHECKING:  # torch takes seconds to import; --help and a typo are answered without it
    from csm.data.shards import Sample
    from csm.training.stop_request import StopRequest

_ABOUT = (
    "Fine-tune a checkpoint on recordings, with texts or without, or on shards: a LoRA adapter by default. Recordings are prepared with "
    "the base's codec and tokenizer, split by recording, learnt until validation gets no better, and measured against the base."
)
_EXAMPLES = (
    "finetune.py base=sesame/csm-1b data=recordings   # wavs, a .txt beside each; or a metadata.csv, or a manifest.jsonl",
    "finetune.py base=runs/demo/mine data=recordings keep=data/demo replay=0.3",
    "finetune.py base=sesame/csm-1b data=/data/speech experiment=finetune_language trainer=ddp trainer.devices=8   # shards",
)
MAX_SCORED = 100  # conversations of a split that base and result are both scored on, spread evenly
SUMMARY_NAME = "finetune.json"


def main() -> None:
    """`python finetune.py`."""
    sys.argv[1:] = [_as_data_path(argument) for argument in sys.argv[1:]]
    hydra_main("finetune", FinetuneConfig, _finetune_until_done_or_told, about=_ABOUT, examples=_EXAMPLES)


def _as_data_path(argument: str) -> str:
    """`data=<place>` means `data.path=<place>`: to Hydra it would be a choice of the group configs/data."""
    return "data.path=" + argument.removeprefix("data=") if argument.startswith("data=") else argument


def _finetune_until_done_or_told(config: FinetuneConfig) -> float | None:
    """Fine-tune, and tell a sweep how good it became."""
    from csm.training.run_folder import lowest_validation_loss
    from csm.training.stop_request import StopRequest

    with StopRequest() as request:
        run_dir = finetune(config, request)
        if request.answered:
            from csm.training.signals import answer

            sys.exit(answer(request, partial(print, flush=True)))
    return lowest_validation_loss(run_dir)


def finetune(config: FinetuneConfig, request: StopRequest | None = None) -> Path:
    """Fine-tune as configured and return the run folder; stopped by `request`, it ends after the training part.

    Raises:
        ValueError, FileNotFoundError: for input that cannot be used; one line that says what to do.
    """
    from csm.training.run_folder import choose_run_dir
    from csm.training.stop_request import is_first_process

    assert config.base is not None
    config, base = _with_speaker(config, open_base(config.base, config.text.added))
    run_dir = choose_run_dir(config)
    shards = _prepared(config, base, run_dir) if is_first_process() else _shards_of(config, run_dir)
    config, base = _with_styles(config, base, shards)
    settings = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    settings |= {"data": _learnt(config, shards), "run_dir": str(run_dir), "resume": config.resume or "auto"}
    train(TrainConfig(**settings), request)
    if is_first_process() and not (request is not None and request.answered):
        _hand_over(config, base, run_dir, shards)
    return run_dir


def _with_speaker(config: FinetuneConfig, base: Base) -> tuple[FinetuneConfig, Base]:
    """Both with the number of the recordings' voice settled: one that the base knows, or the next, which its tokenizer then learns.

    Raises:
        ValueError: if it cannot be had.
    """
    from csm.text import WordTokenizer

    if not config.renumber_speakers or not _is_recordings(config.data.path):
        return config, base
    tokenizer = base.tokenizer
    if not isinstance(tokenizer, WordTokenizer):
        return replace(config, speaker=config.speaker or 0), base
    speaker = tokenizer.num_speakers if config.speaker is None else config.speaker
    if speaker != tokenizer.num_speakers:
        return replace(config, speaker=speaker), base
    return _with_added(replace(config, speaker=speaker), base, [f"[{speaker}]"])


def _with_styles(config: FinetuneConfig, base: Base, shards: Any) -> tuple[FinetuneConfig, Base]:
    """Both with the tags of the shards' styles, which a word tokenizer has to learn; others read any text."""
    from csm.data.corpora import split_folders
    from csm.data.shards import ShardReader
    from csm.data.styles import style_tag
    from csm.text import WordTokenizer

    if not config.data.tag_styles or not isinstance(base.tokenizer, WordTokenizer):
        return config, base
    reader = ShardReader(
        [folder for path in replace(config.data, path=shards).paths for folder in split_folders(path, config.data.train_split)]
    )
    found = {style_tag(turn) for meta in reader.read_metas(range(len(reader))) if isinstance(meta, dict) for turn in meta["turns"]}
    if not found - {None}:
        raise ValueError(f"data.tag_styles=true: no turn of {shards} has a style or an emotion; name them in a manifest.jsonl")
    known = set(base.tokenizer.words) | set(base.tokenizer.added)
    pieces = sorted(tag for tag in found if tag is not None and tag not in known)
    return _with_added(config, base, pieces) if pieces else (config, base)


def _with_added(config: FinetuneConfig, base: Base, pieces: list[str]) -> tuple[FinetuneConfig, Base]:
    """Both with pieces that the base's tokenizer did not know, and what an adapter needs to learn them."""
    wholes = config.adapter.also_train
    adapter = replace(config.adapter, also_train=wholes if "text_embeddings" in wholes else [*wholes, "text_embeddings"])
    text = replace(config.text, added=[*config.text.added, *pieces])
    return replace(config, adapter=adapter, text=text), base.with_added(pieces)


def _learnt(config: FinetuneConfig, shards: Any) -> DataConfig:
    """What is learnt from: the shards, and beside them `keep`'s, of which nothing is validated on."""
    if not config.replay:
        return replace(config.data, path=shards)
    weights = [1 - config.replay, config.replay]
    return replace(config.data, path=[shards, config.keep], weights=weights, val_path=config.data.val_path or shards)


def _is_recordings(place: Any) -> bool:
    """Whether it has to be prepared: a folder without shards, a table, or a Hugging Face data set. Globs and URLs are of shards."""
    if _is_dataset(place):
        return True
    if not isinstance(place, str) or "://" in place or any(letter in place for letter in "*?["):
        return False
    path = Path(place)
    return path.is_file() or (path.is_dir() and not any(path.glob("*/index.json")) and not (path / "index.json").is_file())


def _is_dataset(place: Any) -> bool:
    return isinstance(place, str) and place.startswith("hf:") and not place.startswith("hf://")


def _shards_of(config: FinetuneConfig, run_dir: Path) -> Any:
    return str(run_dir / "data") if _is_recordings(config.data.path) else config.data.path


def _prepared(config: FinetuneConfig, base: Base, run_dir: Path) -> Any:
    """The shards to train on: those given, or `<run_dir>/data`, made from the recordings; what is there already is left.

    Raises:
        ValueError, FileNotFoundError: if the recordings cannot be used.
    """
    from csm.training.slurm import num_tasks

    place = config.data.path
    is_path = isinstance(place, str) and "://" not in place and not _is_dataset(place) and not any(letter in place for letter in "*?[")
    if is_path and not Path(place).exists():
        raise FileNotFoundError(f"data={place}: no such file or folder; give a folder of recordings with texts, a table of them, or shards")
    if not _is_recordings(place):
        if config.speaker is not None or not config.renumber_speakers:
            raise ValueError(f"speaker={config.speaker}: {place} holds shards, which have their speakers already; leave it out")
        return place
    if config.speaker is not None:
        try:
            base.tokenizer.encode_turn(config.speaker, "")
        except ValueError as error:
            raise ValueError(f"speaker={config.speaker}: {error}") from error
    if num_tasks() > 1:
        raise ValueError(
            f"data={place}: prepare recordings before a job of many processes, and give their shards: {_in_shell(config, base)}"
        )
    output = run_dir / "data"
    if config.text.added:  # prep reads it from a file
        _text_folder(output).mkdir(parents=True, exist_ok=True)
        base.tokenizer.save(_text_folder(output))
    status = subprocess.run([sys.executable, *_prep_command(config, base, output)], check=False).returncode
    for split in (config.data.train_split, config.data.val_split):
        if not (output / split / "index.json").is_file():
            raise ValueError(
                f"data={place}: preparing left no {split} split, see above and {output}/failures.jsonl; "
                "a few recordings need a larger val_share"
            )
    if status:
        print(f"some recordings were dropped: {output}/failures.jsonl says which and why", flush=True)
    return str(output)


def _text_folder(output: Path) -> Path:
    """Where the base's tokenizer lies with what it learnt anew, for preparing."""
    return output.with_name("text")


def _has_texts(place: Path) -> bool:
    """Whether the recordings say what is said in them; otherwise they are transcribed."""
    return place.is_file() or (place / "manifest.jsonl").is_file() or (place / "metadata.csv").is_file() or any(place.rglob("*.txt"))


def _prep_command(config: FinetuneConfig, base: Base, output: Path) -> list[str]:
    """Arguments of Python that prepare the recordings, transcribed where they bring no texts, with the base's codec and tokenizer."""
    from csm.text import FILE_NAME

    codec = "mimi" if base.codec_folder is None else base.codec_name
    kind = base.tokenizer.kind
    has_texts = _is_dataset(config.data.path) or _has_texts(Path(config.data.path))
    command = ["-m", "data_prep", f"prep={'turns' if has_texts else 'offline'}", f"input={config.data.path}", f"output={output}"]
    command.append(f"seed={config.seed}")
    if not has_texts:
        if config.renumber_speakers:  # one voice: nobody else is looked for
            command.append("diarize.num_speakers=1")
        if kind == "words":  # it knows words as they are said, not "742."
            command.append("segment.text=spoken")
    command += [f"val_share={config.val_share}", "split_by=recording", f"encode.num_phases={config.num_phases}"]
    command += [f"codec={codec}", f"codec.num_codebooks={base.model.num_codebooks}", f"text={kind}"]
    if base.codec_folder is not None:
        command.append(f"codec.source={base.codec_folder}")
    if config.text.added:
        command.append(f"text.source={_text_folder(output)}")
    elif kind != "bytes" and (base.folder / FILE_NAME).is_file():
        command.append(f"text.source={base.folder}")
    if config.renumber_speakers:
        return [*command, f"encode.first_speaker={config.speaker}"]
    return [*command, "encode.renumber_speakers=false"]


def _in_shell(config: FinetuneConfig, base: Base) -> str:
    return " ".join(["python", *_prep_command(config, base, Path("data/prepared"))])


def _hand_over(config: FinetuneConfig, base: Base, run_dir: Path, shards: Any) -> None:
    """Measure base and result, evaluate and export where that is asked for, tell where everything is."""
    from rich.console import Console

    from csm.model.pretrained import resolve_checkpoint
    from csm.training.progress import print_summary

    best = resolve_checkpoint(run_dir)
    places = {"new": shards} if isinstance(shards, str) and "://" not in shards else {}
    if config.keep is not None:
        places["kept"] = config.keep
    summary: dict[str, Any] = {"base": base.name, "base_folder": str(base.folder), "best": str(best), "data": shards}
    summary |= _count_parameters(best, base)
    summary["nats"] = {
        name: {"place": place, "base": _score(base.folder, place, config, base), "result": _score(best, place, config, base)}
        for name, place in places.items()
    }
    if config.evaluate:
        from csm.evaluation.runner import evaluate

        evaluate(EvaluateConfig(run=str(run_dir), data_path=config.keep))
        summary["evaluation"] = str(run_dir / "evaluation")
    if config.export is not None:
        summary["export"] = str(_export(best, run_dir / "export", config.export))
    write_text(run_dir / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    print_summary(Console(), _lines(summary, config, run_dir))


def _score(checkpoint: Path, place: Any, config: FinetuneConfig, base: Base) -> dict[str, float]:
    """Means over the validation split of a data folder, or over the folder where it is a split itself."""
    from csm.data.index import ShardIndex
    from csm.data.shards import ShardReader
    from csm.evaluation.likelihood import score_samples
    from csm.model.pretrained import load_model

    folder = Path(place) / config.data.val_split
    folder = folder if folder.is_dir() else Path(place)
    ShardIndex.load(folder).check_codec(num_codebooks=base.model.num_codebooks, digest=base.codec_digest)
    reader = ShardReader(folder)
    samples = [reader.read(index) for index in reader.spread(MAX_SCORED)]
    if config.data.tag_styles:
        samples = [_tagged(sample) for sample in samples]
    scores = score_samples(load_model(checkpoint), base.tokenizer, samples, seed=config.seed, name=str(place))
    return {"c0": scores.c0.value, "depth": scores.depth.value, "eos_recall": scores.eos_recall.value}


def _tagged(sample: Sample) -> Sample:
    """A sample whose every text has its tag."""
    from csm.data.styles import StyleTags

    tags = StyleTags(dropout=0.0)
    pairs = enumerate(zip(sample.turns, sample.meta["turns"], strict=True))
    return replace(sample, turns=[replace(turn, text=tags.text(meta, sample.key, index)) for index, (turn, meta) in pairs])


def _count_parameters(best: Path, base: Base) -> dict[str, int]:
    """Parameters of the model, and those of the adapter where there is one."""
    from safetensors import safe_open

    from csm.model.adapter_files import ADAPTER_FOLDER

    def count(path: Path) -> int:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())

    counts = {"parameters": sum(count(path) for path in sorted(best.glob("model*.safetensors")))}
    adapter = best / ADAPTER_FOLDER / "adapter_model.safetensors"
    return counts | ({"adapter_parameters": count(adapter)} if adapter.is_file() else {})


def _export(best: Path, target: Path, layout: str) -> Path:
    """Write the result in another layout, into a folder that is not there yet."""
    if target.exists():
        print(f"{target} is there already, left as it is", flush=True)
        return target
    command = [sys.executable, "-m", "csm.cli.commands", "export", str(best), str(target), "--layout", layout]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the export failed, see above; try it by itself: csm export {best} {target} --layout {layout}")
    return target


def _lines(summary: dict[str, Any], config: FinetuneConfig, run_dir: Path) -> list[tuple[str, str]]:
    lines = [("base", summary["base"]), ("trained on", str(summary["data"]))]
    if "adapter_parameters" in summary:
        share = summary["adapter_parameters"] / summary["parameters"]
        lines.append(("adapter", f"{summary['adapter_parameters']:,} parameters, {share:.2%} of {summary['parameters']:,}"))
    else:
        lines.append(("learnt", f"all {summary['parameters']:,} parameters"))
    for name, scores in summary["nats"].items():
        before, after = scores["base"], scores["result"]
        told = f"c0 {before['c0']:.3f} -> {after['c0']:.3f}, depth {before['depth']:.3f} -> {after['depth']:.3f} nats"
        lines.append(({"new": "new recordings", "kept": "kept abilities"}[name], told))
    if "kept" not in summary["nats"]:
        lines.append(("kept abilities", "not measured; give keep=<folder of shards the base was good at>"))
    lines += [("run folder", str(run_dir)), ("result", summary["best"])]
    lines += [(key, summary[key]) for key in ("evaluation", "export") if key in summary]
    lines.append(("summary", str(run_dir / SUMMARY_NAME)))
    number = config.speaker if config.renumber_speakers else "N"
    lines.append(("next", f'csm generate --checkpoint {run_dir} --speaker {number} --text "..." --out new.wav'))
    return lines
