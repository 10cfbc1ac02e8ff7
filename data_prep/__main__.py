"""`python -m data_prep`: prepare data. The only place of this package that knows Hydra."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from csm.config import PrepConfig

ABOUT = (
    "Prepare training data: recordings of people talking become transcripts, speakers, turns and shards (prep=conversations; prep=offline "
    "with models that packages carry); recordings with known texts become shards (prep=turns); the offline demo corpus is synthesised; "
    "or the index of shards made elsewhere is written. Leaves with status 1 when something was dropped for a fault of its own; "
    "failures.jsonl names it."
)
EXAMPLES = (
    "-m data_prep prep=demo output=data/demo",
    "-m data_prep prep=offline input=recordings output=data/mine   # any recordings of speech",
    "-m data_prep prep=turns input=recordings output=data/mine   # a folder of recordings, a .txt beside each",
    "-m data_prep prep=turns input=recordings output=data/mine slice_index=0 slice_count=8   # one of eight; then stages=[merge]",
    "-m data_prep prep=turns input=recordings output=data/mine executor=ray ray.address=auto   # workers of a Ray cluster",
    "-m data_prep prep=turns input=recordings output=data/mine executor=slurm slurm.slices=64   # a job array, waited for",
    "-m data_prep prep=index output=data/mine   # data/mine/<split>/*.tar, data/mine/codec/codec.json",
)
STAGES = {"demo": ("synthesise",), "index": ("index",)}  # of the others: data_prep.turns
ALIASES = {"ingest": "manifest", "shard": "merge"}


def prepare(config: PrepConfig) -> None:
    """Run the stages asked for, or all of the named preparation.

    Raises:
        UsageError: for a command that cannot be meant; nothing has been done then.
    """
    from csm.cli.hydra_entry import UsageError

    if config.name in ("turns", "conversations", "offline"):
        from data_prep.turns import check_command, prepare_turns

        config.stages = [ALIASES.get(stage, stage) for stage in config.stages]
        try:
            check_command(config)
        except (ValueError, FileNotFoundError, FileExistsError) as error:
            raise UsageError(str(error)) from error
        from hydra.core.hydra_config import HydraConfig

        sys.exit(prepare_turns(config, list(HydraConfig.get().overrides.task)))
    known = (*STAGES["demo"], *STAGES["index"])
    unknown = [stage for stage in config.stages if stage not in known]
    if unknown:
        raise UsageError(f"stages={config.stages}: prep={config.name} has no stage {unknown[0]!r}; there are: {', '.join(known)}")
    if config.input is not None:
        raise UsageError(
            f"input={config.input}: prep={config.name} reads no recordings; add prep=offline, or prep=turns where texts are known"
        )
    for stage in config.stages or STAGES[config.name]:
        if stage == "synthesise":
            from data_prep.demo import build_demo

            build_demo(config)
        else:
            index_folder(Path(config.output))


def index_folder(folder: Path) -> None:
    """Index a split folder, or every split of a data folder.

    Raises:
        FileNotFoundError: if there are no tars, or nothing says which codec made the codes.
    """
    from data_prep.shard import index_split

    splits = [folder] if any(folder.glob("*.tar")) else sorted({path.parent for path in folder.glob("*/*.tar")})
    if not splits:
        raise FileNotFoundError(f"{folder}: no *.tar in it or in the folders below; give output=<data folder or split folder>")
    for split in splits:
        index = index_split(split, _codec_entry(split))
        num_samples = sum(shard["num_samples"] for shard in index["shards"])
        print(f"{split}: {len(index['shards'])} shards, {num_samples} samples indexed")


def _codec_entry(split: Path) -> dict[str, Any]:
    """How the index names the codec, read from codec/codec.json beside or above the split."""
    from csm.frames import FRAME_RATE_HZ, SAMPLE_RATE_HZ

    places = [split / "codec" / "codec.json", split.resolve().parent / "codec" / "codec.json"]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{split}: which codec made the codes? expected {places[1]} with its name, num_codebooks and digest; "
            "copy the codec folder there"
        )
    try:
        codec = json.loads(path.read_text(encoding="utf-8"))
        return {
            "name": codec["name"],
            "num_codebooks": codec["num_codebooks"],
            "frame_rate_hz": FRAME_RATE_HZ,
            "sample_rate_hz": SAMPLE_RATE_HZ,
            "digest": codec["digest"],
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected name, num_codebooks and digest of a codec, got {error}") from error


if __name__ == "__main__":
    from csm.cli.hydra_entry import main

    main("prep", PrepConfig, prepare, about=ABOUT, examples=EXAMPLES)
