"""Which watermarks are found, after what, and how often where there is none; what they change in the sound, and their cost.

    python benchmarks/watermark.py                              # 50 turns as the offline codec sounds them, 50 recordings; 4 minutes
    python benchmarks/watermark.py --checkpoint runs/demo/...   # 50 clips that a model says besides, streamed
    python benchmarks/watermark.py --speech DIR                 # 50 recordings in a folder besides: wav, flac, mp3, g722 ...

Needs the demo corpus (`python -m data_prep prep=demo output=data/demo`); its held-out turns were used for no setting of a
mark. Every clip is marked with the default (both marks), as 16-bit samples, then treated; every clip is also treated and
searched unmarked. Treatments use PyAV (`pip install -e '.[eval]'` brings it).
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import av
import numpy as np
import soxr
import torch
from torch import Tensor

from csm.codec import codec_from_folder
from csm.data.shards import iter_samples
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.keyed_mark import PUBLIC_KEY, KeyedWatermarker
from csm.generation.perth_mark import PerthWatermarker
from csm.generation.watermark import JointWatermarker, Watermarker

ROOT = Path(__file__).resolve().parents[1]
Treatment = Callable[[Tensor], Tensor]


def as_16_bit(clip: Tensor) -> Tensor:
    """What a WAV file keeps of it."""
    return (clip.clamp(-1, 1) * 32767).round() / 32767


def at_rate(rate_hz: int) -> Treatment:
    def treat(clip: Tensor) -> Tensor:
        there = as_16_bit(torch.from_numpy(soxr.resample(clip.numpy(), SAMPLE_RATE_HZ, rate_hz)))
        return torch.from_numpy(soxr.resample(there.numpy(), rate_hz, SAMPLE_RATE_HZ))

    return treat


def through(container: str, codec: str, bit_rate: int, rate_hz: int) -> Treatment:
    """Encode by FFmpeg's libraries and decode again."""

    def treat(clip: Tensor) -> Tensor:
        samples = soxr.resample(clip.numpy(), SAMPLE_RATE_HZ, rate_hz)
        encoded = io.BytesIO()
        with av.open(encoded, "w", format=container) as output:
            stream = output.add_stream(codec, rate=rate_hz)
            stream.bit_rate, stream.layout = bit_rate, "mono"
            frame = av.AudioFrame.from_ndarray((samples.clip(-1, 1) * 32767).astype(np.int16)[None], format="s16", layout="mono")
            frame.sample_rate = rate_hz
            resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate_hz)
            for part in [*resampler.resample(frame), *resampler.resample(None)]:
                output.mux(stream.encode(part))
            output.mux(stream.encode(None))
        encoded.seek(0)
        return decoded(encoded)

    return treat


def decoded(source: io.BytesIO | str) -> Tensor:
    """Any sound that FFmpeg's libraries read, mono float32 [S] at 24 kHz."""
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE_HZ)
    with av.open(source) as file:
        parts = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in resampler.resample(frame)]
    parts += [part.to_ndarray()[0] for part in resampler.resample(None)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def with_noise(snr_db: float) -> Treatment:
    def treat(clip: Tensor) -> Tensor:
        noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
        return clip + noise * clip.square().mean().sqrt() * 10 ** (-snr_db / 20)

    return treat


def faster(factor: float) -> Treatment:
    return lambda clip: torch.from_numpy(soxr.resample(clip.numpy(), SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ))


def middle(duration_s: float) -> Treatment:
    """The middle of the clip, of this length at most."""

    def treat(clip: Tensor) -> Tensor:
        count = round(duration_s * SAMPLE_RATE_HZ)
        start = max(0, (clip.shape[0] - count) // 2)
        return clip[start : start + count]

    return treat


TREATMENTS: dict[str, Treatment] = {
    "none (16-bit)": lambda clip: clip,
    "to 16 kHz and back": at_rate(16_000),
    "to 8 kHz and back": at_rate(8_000),
    "mp3 64 kb/s": through("mp3", "libmp3lame", 64_000, SAMPLE_RATE_HZ),
    "mp3 32 kb/s": through("mp3", "libmp3lame", 32_000, SAMPLE_RATE_HZ),
    "opus 24 kb/s": through("ogg", "libopus", 24_000, 48_000),
    "opus 12 kb/s": through("ogg", "libopus", 12_000, 48_000),
    "-6 dB": lambda clip: as_16_bit(clip * 10 ** (-6 / 20)),
    "noise at 30 dB": with_noise(30),
    "noise at 20 dB": with_noise(20),
    "noise at 10 dB": with_noise(10),
    "first 1,237 samples cut": lambda clip: clip[1237:],
    "middle 1 s": middle(1.0),
    "middle 0.75 s": middle(0.75),
    "middle 0.5 s": middle(0.5),
    "middle 0.25 s": middle(0.25),
    "5% faster": faster(1.05),
    "3.5% slower": faster(0.965),
}


def demo_clips(data: Path, count: int) -> dict[str, list[Tensor]]:
    """Held-out turns through the codec, as a model sounds, and the recordings of held-out conversations."""
    codec = codec_from_folder(data / "codec")
    sounded: list[Tensor] = []
    recorded: list[Tensor] = []
    for index, sample in enumerate(iter_samples(data / "heldout")):
        if index % 4 == 0 and len(recorded) < count:
            audio = sample.audio()
            assert audio is not None
            recorded.append(audio)
        if index % 3 == 0 and len(sounded) < count and sample.turns[-1].codes is not None:
            sounded.append(codec.decode(sample.turns[-1].codes))
    return {"held-out turns as the offline codec sounds them": sounded, "recordings of held-out conversations (synthetic speech)": recorded}


def spoken_clips(checkpoint: str, data: Path, count: int) -> list[Tensor]:
    """What a model says, unmarked: held-out lines in every voice."""
    from csm.generation.generator import Generator

    generator = Generator.from_pretrained(checkpoint, watermark="off")
    lines = [(sample.turns[0].text, sample.turns[0].speaker) for sample in iter_samples(data / "heldout") if len(sample.turns) == 1]
    return [generator.generate(text, speaker, temperature=0.5, seed=index) for index, (text, speaker) in enumerate(lines[:count])]


def recorded_clips(folder: Path, count: int) -> list[Tensor]:
    """Recordings of 1.2 to 8 s in a folder, spread over it."""
    clips: list[Tensor] = []
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".wav", ".flac", ".mp3", ".ogg", ".g722", ".m4a"))
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(1)).tolist()
    for index in order:
        clip = decoded(str(paths[index]))
        if 1.2 <= clip.shape[0] / SAMPLE_RATE_HZ <= 8:
            clips.append(clip)
        if len(clips) == count:
            break
    return clips


def stream_marked(watermarker: Watermarker, clip: Tensor) -> Tensor:
    """Marked frame by frame, as `Generator.stream` does."""
    stream = watermarker.stream()
    return torch.cat([*(stream.push(part) for part in clip.split(1920)), stream.finish()])


def distance_db(clip: Tensor, marked: Tensor) -> float:
    return float(10 * torch.log10(clip.square().sum() / (marked - clip).square().sum()))


def segmental_db(clip: Tensor, marked: Tensor) -> float:
    """Mean over 20 ms segments that are not silent, each held to -10..35 dB."""
    count = clip.shape[0] // 480 * 480
    power = clip[:count].view(-1, 480).square().mean(dim=1)
    change = (marked - clip)[:count].view(-1, 480).square().mean(dim=1)
    heard = power > power.max() * 1e-4
    return float((10 * (power[heard] / change[heard].clamp(min=1e-12)).log10()).clamp(-10, 35).mean())


def measure(name: str, clips: Sequence[Tensor], treatments: Sequence[str]) -> list[str]:
    """The lines of one set of clips."""
    keyed, perth = KeyedWatermarker(PUBLIC_KEY), PerthWatermarker()
    both = JointWatermarker([keyed, perth])
    marked = [stream_marked(both, clip) for clip in clips]
    assert all(torch.equal(one, both.embed(clip)) for one, clip in zip(marked, clips, strict=True)), "streamed differs from whole"
    seconds = [clip.shape[0] / SAMPLE_RATE_HZ for clip in clips]
    lines = [
        f"### {name[0].upper()}{name[1:]}",
        "",
        f"{len(clips)} clips of {min(seconds):.1f} to {max(seconds):.1f} s (median {median(seconds):.1f}), marked frame by frame.",
        "",
        "| treatment | keyed: found | p, median | worst | keyed: false | smallest p | perth: found | perth: false |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for treatment in treatments:
        treat = TREATMENTS[treatment]
        dirty = [treat(as_16_bit(clip)) for clip in marked]
        clean = [treat(as_16_bit(clip)) for clip in clips]
        k_marked, k_clean = [keyed.detect(clip) for clip in dirty], [keyed.detect(clip) for clip in clean]
        p_marked, p_clean = [perth.detect(clip) for clip in dirty], [perth.detect(clip) for clip in clean]
        values = sorted(result.p_value or 0.0 for result in k_marked)
        found, false = (sum(result.is_marked for result in results) for results in (k_marked, k_clean))
        p_found, p_false = (sum(result.is_marked for result in results) for results in (p_marked, p_clean))
        smallest = min(result.p_value or 0.0 for result in k_clean)
        lines.append(
            f"| {treatment} | {found} | {_p(median(values))} | {_p(values[-1])} | {false} | {_p(smallest)} | {p_found} | {p_false} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        "| mark | change below the sound | by segments | embedding, x real time | detection, marked | clean |",
        "|---|---|---|---|---|---|",
    ]
    for mark in (keyed, perth, both):
        start_s = time.perf_counter()
        own = [mark.embed(clip) for clip in clips]
        embedded_s = time.perf_counter()
        for clip in own:
            mark.detect(clip)
        found_s = time.perf_counter()
        for clip in clips:
            mark.detect(clip)
        rates = [sum(seconds) / span for span in (embedded_s - start_s, found_s - embedded_s, time.perf_counter() - found_s)]
        whole = median(distance_db(clip, one) for clip, one in zip(clips, own, strict=True))
        parts = median(segmental_db(clip, one) for clip, one in zip(clips, own, strict=True))
        lines.append(f"| {mark.name} | {whole:.1f} dB | {parts:.1f} dB | {rates[0]:.0f} | {rates[1]:.0f} | {rates[2]:.0f} |")
    return [*lines, ""]


def _p(value: float) -> str:
    return "< 1e-30" if value < 1e-30 else f"{value:.0e}" if value < 0.01 else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "demo", metavar="DIR", help="the demo corpus (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="C", help="a model whose speech is marked, too")
    parser.add_argument("--speech", type=Path, metavar="DIR", help="recordings that are marked, too")
    parser.add_argument("--clips", type=int, default=50, metavar="N", help="of each set (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="4 clips and 3 treatments: whether it runs")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "watermark.md", metavar="FILE")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    count = 4 if arguments.quick else arguments.clips
    treatments = list(TREATMENTS)[:3] if arguments.quick else list(TREATMENTS)
    sets = demo_clips(arguments.data, count)
    if arguments.checkpoint is not None:
        sets[f"said by {'/'.join(Path(arguments.checkpoint).parts[-3:])}"] = spoken_clips(arguments.checkpoint, arguments.data, count)
    if arguments.speech is not None:
        sets[f"recordings in {arguments.speech.name}"] = recorded_clips(arguments.speech, count)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [
        "# Watermarks",
        "",
        f"- command: `{' '.join(['python benchmarks/watermark.py', *(argv if argv is not None else sys.argv[1:])])}`",
        f"- commit: {commit}; {date.today().isoformat()}",
        f"- machine: {os.cpu_count()} cores; torch {torch.__version__}, python {platform.python_version()}, one thread",
        "",
        "Clips carry both marks. `found` is of marked clips, `false` of the same clips unmarked and treated alike.",
        "The keyed mark's threshold is p <= 1e-6, from theory; Perth's is a confidence of 0.40.",
        "",
    ]
    for name, clips in sets.items():
        print(name, flush=True)
        lines += measure(name, clips, treatments)
    part = arguments.output.with_name(arguments.output.name + ".tmp")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text("\n".join(lines), encoding="utf-8")
    os.replace(part, arguments.output)
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
