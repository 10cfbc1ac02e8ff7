"""The page of `data_prep.inspect`: one file with figures, histograms and conversations to listen to; it loads nothing else."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from csm.codec import Codec, codec_from_folder
from csm.data.shards import Sample, ShardReader
from csm.frames import SAMPLE_RATE_HZ
from data_prep.inspect import Split, Survey, number, share, split_folders
from data_prep.shard import write_atomic

MAX_CLIP_S = 60.0  # of a conversation; 20 of them are about 8 MB
NUM_COLORS = 6
_NUM_BINS = 24
_SHOWN = ("dnsmos", "snr_db", "asr_log_probability")  # beside a turn's times; everything else where a pointer rests


@dataclass
class Clip:
    """A conversation to listen to: `sound` is a data URI, or None where `why_silent` says why."""

    title: str
    subtitle: str
    turns: list[dict[str, Any]]
    sound: str | None
    why_silent: str = ""


def write_page(found: Survey, path: Path, num_clips: int, chance: random.Random, device: str = "cpu") -> None:
    """Write the page, whole or not at all.

    Raises:
        ValueError: if the codec folder holds another codec than the shards were made with.
    """
    from jinja2 import Environment  # torch brings it

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((Path(__file__).parent / "inspect.html.j2").read_text(encoding="utf-8"))
    listed = [(name, len(values), _histogram(values), _spread(values)) for name, values in sorted(found.measures.items())]
    rejected = [
        {"stage": stage, "reason": reason, "rows": rows, "hours": seconds / 3600, "share": share(found, seconds)}
        for (stage, reason), (rows, seconds) in found.rejected.items()
    ]
    page = template.render(
        found=found,
        name=found.folder.resolve().name,
        num_looked_at=found.counts["conversations"],
        num_all=sum(split.num_samples for split in found.splits),
        histograms=listed,
        rejected=rejected,
        rejected_share=share(found, found.rejected_hours * 3600),
        clips=_clips(found, num_clips, chance, device),
    )
    write_atomic(path, page.encode("utf-8"))


def _clips(found: Survey, num_clips: int, chance: random.Random, device: str) -> list[Clip]:
    pool = [(split, index) for split in found.splits for index, _ in split.metas]
    picked = chance.sample(pool, min(num_clips, len(pool)))
    readers = {path.name: ShardReader(path, keep_faults=True) for path in split_folders(found.folder)}
    codecs: dict[str, Codec | str] = {}
    clips = []
    for split, index in picked:
        sample = readers[split.name].read_many([index])[0]
        if isinstance(sample, ValueError):
            clips.append(Clip(str(index), split.name, [], None, str(sample)))
            continue
        digest = readers[split.name].codec.digest
        if digest not in codecs:
            codecs[digest] = _codec(found.folder, digest, device)
        clips.append(_clip(sample, split, codecs[digest]))
    for reader in readers.values():
        reader.close()
    return clips


def _codec(folder: Path, digest: str, device: str) -> Codec | str:
    """The folder's codec, or why nothing can be decoded."""
    place = next((path for path in (folder / "codec", folder.resolve().parent / "codec") if (path / "codec.json").is_file()), None)
    if place is None:
        return "no codec/ in the folder, so its codes cannot be decoded"
    try:
        codec = codec_from_folder(place, device)
    except (OSError, ImportError) as error:  # Mimi's weights are on the hub
        return f"the codec cannot be loaded: {str(error).splitlines()[0]}"
    if codec.digest != digest:
        raise ValueError(f"{place}: holds another codec than the shards were made with; copy theirs there")
    return codec


def _clip(sample: Sample, split: Split, codec: Codec | str) -> Clip:
    turns = [turn for turn in sample.meta["turns"] if turn["start_s"] < MAX_CLIP_S]
    shown = [
        {
            "speaker": turn["speaker"],
            "color": turn["speaker"] % NUM_COLORS,
            "name": turn.get("speaker_name"),
            "text": turn["text"],
            "start_s": round(turn["start_s"], 3),
            "end_s": round(min(turn["end_s"], MAX_CLIP_S), 3),
            "marks": [mark for mark in ("overlap", "backchannel") if turn.get(mark)] + _emotion(turn),
            "quality": _written(turn, sorted(turn.get("quality") or {})),
            "shown": _written(turn, _SHOWN),
        }
        for turn in turns
    ]
    language = sample.meta.get("language") or "language not said"
    subtitle = f"{split.name} · {sample.meta['duration_s']:.1f} s · {language} · {sample.key}"
    title = str(sample.meta.get("source") or sample.key)
    try:
        audio = sample.audio()
        if audio is None:
            if isinstance(codec, str):
                return Clip(title, subtitle, shown, None, codec)
            audio = _decoded(sample, len(turns), codec)
    except (ValueError, RuntimeError) as error:
        return Clip(title, subtitle, shown, None, str(error))
    return Clip(title, subtitle, shown, _sound(audio[: round(MAX_CLIP_S * SAMPLE_RATE_HZ)].cpu().numpy()))


def _written(turn: dict[str, Any], names: Iterable[str]) -> str:
    quality = turn.get("quality") or {}
    return ", ".join(f"{name} {number(quality[name])}" for name in names if isinstance(quality.get(name), (int, float)))


def _emotion(turn: dict[str, Any]) -> list[str]:
    emotion = turn.get("emotion")
    return [f"{emotion['label']} {emotion['probability']:.0%}"] if emotion else []


@torch.inference_mode()
def _decoded(sample: Sample, num_turns: int, codec: Codec) -> torch.Tensor:
    """The turns where they were in the recording, those that overlap on top of one another: [S] at 24 kHz."""
    places = [round(turn["start_s"] * SAMPLE_RATE_HZ) for turn in sample.meta["turns"][:num_turns]]
    parts = [codec.decode(turn.codes).cpu() for turn in sample.turns[:num_turns]]
    mixed = torch.zeros(max((place + len(part) for place, part in zip(places, parts, strict=True)), default=0))
    for place, part in zip(places, parts, strict=True):
        mixed[place : place + len(part)] += part
    return mixed


def _sound(audio: np.ndarray) -> str:
    """MP3 as a data URI: what every browser plays, at some 6 kB a second."""
    written = io.BytesIO()
    soundfile.write(written, np.clip(audio, -1, 1), SAMPLE_RATE_HZ, format="MP3", subtype="MPEG_LAYER_III")
    return "data:audio/mpeg;base64," + base64.b64encode(written.getvalue()).decode()


def _spread(values: list[float]) -> str:
    low, middle, high = np.percentile(values, (5, 50, 95))
    return f"median {number(middle)}, 90% between {number(low)} and {number(high)}"


def _histogram(values: list[float]) -> str:
    """Bars as SVG; what lies beyond the outermost half percent is in the first and last bar."""
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = low - 0.5, low + 0.5
    counts, edges = np.histogram(np.clip(values, low, high), _NUM_BINS, (low, high))
    width, height, most = 320, 92, max(int(counts.max()), 1)
    step = width / _NUM_BINS
    bars = "".join(
        f'<rect x="{place * step + 0.5:.1f}" y="{height - count / most * height:.1f}" width="{step - 1:.1f}" '
        f'height="{count / most * height:.1f}"><title>{number(edges[place])} to {number(edges[place + 1])}: {count}</title></rect>'
        for place, count in enumerate(counts.tolist())
    )
    ticks = "".join(
        f'<text x="{x}" y="{height + 14}" text-anchor="{anchor}">{number(value)}</text>'
        for x, anchor, value in ((0, "start", low), (width / 2, "middle", (low + high) / 2), (width, "end", high))
    )
    return f'<svg viewBox="0 0 {width} {height + 18}" role="img">{bars}<line x1="0" x2="{width}" y1="{height}" y2="{height}"/>{ticks}</svg>'
