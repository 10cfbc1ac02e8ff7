"""Evaluates a checkpoint: speaks the held-out lines, judges every clip, scores real speech, writes the results.

Generation runs here, on one thread; decoding, watermarking and judging of finished clips run beside it on two. Every draw
is keyed by (seed, key of the line), every clip is judged by itself, and results are put in order at the end: neither the
batch size nor the number of threads moves a number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from csm.config import EvaluateConfig
from csm.data.index import ShardIndex
from csm.data.shards import iter_samples
from csm.evaluation.judging import RESYNTHESIS, Judge, Row, Verdict, plan_rows, row_metrics
from csm.evaluation.likelihood import score_samples
from csm.evaluation.metrics import Estimate, seed_for
from csm.evaluation.report import terminal_table, write_report
from csm.evaluation.suites import SINGLE, Utterance, evenly_spaced, read_suites
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.generator import GeneratedCodes, Generator, Request
from csm.listening.asr import Recogniser
from csm.listening.speaker import SpeakerEncoder, VoiceBook
from csm.model.pretrained import resolve_checkpoint
from csm.whole_files import write_text

NUM_WORKERS = 2  # clips judged at a time
MAX_VALIDATION_SAMPLES = 200  # conversations scored from the validation split, spread evenly
MAX_DURATION_RATIO = 3  # a clip is cut when it is this many times as long as the longest reference of its suite


@dataclass(frozen=True)
class Places:
    """Where everything is.

    Attributes:
        run: the run folder; the checkpoint itself when it lies in none.
    """

    checkpoint: Path
    run: Path
    data: Path
    val_split: str
    output: Path


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate as configured; write summary.json, samples.jsonl, clips/ and report.html.

    Returns:
        What summary.json holds.
    Raises:
        FileNotFoundError, ValueError: if the run, its data or an evaluator is missing or does not fit.
    """
    console = console or Console(width=max(100, Console().width))  # a table with its numbers cut off says nothing
    if not config.temperatures or len(set(config.temperatures)) != len(config.temperatures):
        raise ValueError(f"temperatures={config.temperatures}: expected at least one, each once")
    torch.set_num_threads(config.num_threads or 1)  # two judges run beside the model: more threads each would only collide
    places = find_places(config)
    everything = read_suites(places.data / config.split, context=config.context)
    suites = {name: evenly_spaced(utterances, config.max_utterances) for name, utterances in everything.items()}
    generator = Generator.from_pretrained(places.checkpoint)
    index = ShardIndex.load(places.data / config.split)
    index.check_codec(num_codebooks=generator.codec.num_codebooks, digest=generator.codec.digest, name=generator.codec.name)
    recogniser = Recogniser(config.asr, prompt=config.asr_prompt, num_workers=NUM_WORKERS)
    encoder = SpeakerEncoder()

    rows = plan_rows(config.temperatures, context=config.context, has_audio=all(u.audio is not None for u in suites[SINGLE]))
    verdicts = _speak_and_judge(config, generator, recogniser, encoder, everything[SINGLE], suites, rows, places.output, console)
    summary = _summarise(config, places, generator, index, rows, verdicts, recogniser, encoder, suites)
    write_text(places.output / "samples.jsonl", "".join(json.dumps(v.as_json(), ensure_ascii=False) + "\n" for v in verdicts))
    write_text(places.output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    if config.html:
        utterances = {utterance.key: utterance for suite in suites.values() for utterance in suite}
        history = places.run / "metrics.csv"
        decode = lambda codes: generator.codec.decode(codes).cpu().numpy()  # noqa: E731
        page = places.output / "report.html"
        write_report(page, summary, rows, verdicts, utterances, decode, history if history.is_file() else None)
    console.print(terminal_table(summary))
    console.print(f"{places.output}: summary.json, samples.jsonl, clips/" + (", report.html" if config.html else ""), highlight=False)
    _log(config, summary, places)
    return summary


def find_places(config: EvaluateConfig) -> Places:
    """Find checkpoint, run, data and output from `run=`, a run folder or a checkpoint folder.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if nothing says which data the run was trained on.
    """
    checkpoint = resolve_checkpoint(config.run, config.checkpoint)
    run = next((folder for folder in checkpoint.parents if (folder / "config.yaml").is_file()), None)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) if run is not None else {}
    data = config.data_path or settings.get("data", {}).get("path")
    if isinstance(data, list):
        raise ValueError(f"{config.run}: trained on {len(data)} folders; say which one to evaluate on: data_path={data[0]}")
    if data is None:
        raise ValueError(
            f"{config.run}: no config.yaml above {checkpoint} says which data it was trained on; give data_path=<folder of shards>"
        )
    output = Path(config.output) if config.output else (run or checkpoint) / "evaluation"
    return Places(checkpoint, run or checkpoint, Path(data), settings.get("data", {}).get("val_split", "validation"), output)


def speak(
    generator: Generator, utterances: Sequence[Utterance], *, temperature: float, top_k: int, batch_size: int, seed: int
) -> Iterator[tuple[Utterance, GeneratedCodes]]:
    """Speak lines in batches, in the order of their lengths; a line's draws depend on (seed, its key) only."""
    max_duration_s = MAX_DURATION_RATIO * max(utterance.reference_s for utterance in utterances)
    ordered = sorted(utterances, key=lambda utterance: (len(utterance.text.split()), utterance.key))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        requests = [
            Request(
                text=utterance.text,
                speaker=utterance.speaker,
                context=utterance.context,
                max_duration_s=max_duration_s,
                temperature=temperature,
                top_k=top_k,
                seed=seed_for(seed, "speak", utterance.key),
            )
            for utterance in batch
        ]
        yield from zip(batch, generator.generate_codes_batch(requests, max_batch_size=batch_size), strict=True)


def _speak_and_judge(
    config: EvaluateConfig,
    generator: Generator,
    recogniser: Recogniser,
    encoder: SpeakerEncoder,
    known: Sequence[Utterance],
    suites: dict[str, list[Utterance]],
    rows: Sequence[Row],
    output: Path,
    console: Console,
) -> list[Verdict]:
    """The verdicts of every row, rows in order and lines in the suite's order; voices are learnt from the `known` lines."""

    def decode(codes: Tensor) -> np.ndarray:
        return generator.codec.decode(codes).cpu().numpy()

    def reference_of(utterance: Utterance) -> np.ndarray:
        return decode(utterance.codes) if utterance.audio is None else utterance.audio

    with ThreadPoolExecutor(NUM_WORKERS) as pool, Progress(console=console, transient=True) as progress:
        total = sum(len(suites[row.suite]) for row in rows)
        task = progress.add_task("learn the voices", total=total)
        heard = {utterance.key: utterance for utterances in (known, *suites.values()) for utterance in utterances}
        references = dict(zip(heard, pool.map(reference_of, heard.values()), strict=True))
        embeddings = pool.map(lambda utterance: encoder.embed(references[utterance.key]), known)
        voices = VoiceBook([(u.voice, u.text, e) for u, e in zip(known, embeddings, strict=True) if e is not None])
        judge = Judge(recogniser, encoder, voices)

        def work(row: Row, utterance: Utterance, said: GeneratedCodes | None) -> Verdict:
            if said is not None:
                audio = generator.audio_from_codes(said.codes).numpy()
            else:
                audio = decode(utterance.codes) if row.source == RESYNTHESIS else references[utterance.key]
            wav = f"clips/{row.name}/{utterance.key}.flac" if len(audio) else ""
            if wav:
                _write_audio(output / wav, audio)
            verdict = judge.judge(row, utterance, audio, references[utterance.key], said, wav)
            progress.advance(task)
            return verdict

        futures: list[Future[Verdict]] = []
        for row in rows:
            (output / "clips" / row.name).mkdir(parents=True, exist_ok=True)
            progress.update(task, description=row.title.lower())
            if row.temperature is None:
                futures += [pool.submit(work, row, utterance, None) for utterance in suites[row.suite]]
                continue
            settings = {"top_k": config.top_k, "batch_size": config.batch_size, "seed": config.seed}
            for utterance, said in speak(generator, suites[row.suite], temperature=row.temperature, **settings):
                futures.append(pool.submit(work, row, utterance, said))
        progress.update(task, description="listen to the clips")
        try:
            verdicts = [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # report the first failure now, not after the other clips
            raise
    place = {(row.name, u.key): (i, j) for i, row in enumerate(rows) for j, u in enumerate(suites[row.suite])}
    return sorted(verdicts, key=lambda verdict: place[verdict.row, verdict.key])


def _summarise(
    config: EvaluateConfig,
    places: Places,
    generator: Generator,
    index: ShardIndex,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    recogniser: Recogniser,
    encoder: SpeakerEncoder,
    suites: dict[str, list[Utterance]],
) -> dict[str, Any]:
    """What summary.json holds: nothing in it depends on the clock, the machine's paths or the order of work."""
    metrics: dict[str, Estimate] = {}
    for row in rows:
        metrics |= row_metrics([verdict for verdict in verdicts if verdict.row == row.name], row, seed=config.seed)
    codebook_nll = {}
    for split, suffix, limit in ((config.split, "", config.max_utterances), (places.val_split, "_validation", MAX_VALIDATION_SAMPLES)):
        samples = evenly_spaced(list(iter_samples(places.data / split)), limit)
        scores = score_samples(generator.model, generator.tokenizer, samples, seed=config.seed, name=split)
        metrics |= {"c0_nll" + suffix: scores.c0, "depth_nll" + suffix: scores.depth}
        metrics |= {"eos_recall" + suffix: scores.eos_recall, "false_stop" + suffix: scores.false_stop}
        codebook_nll[split] = scores.per_codebook
    weights = places.checkpoint / "model.safetensors"
    return {
        "checkpoint": os.path.relpath(places.checkpoint, places.run) if places.run != places.checkpoint else places.checkpoint.name,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "",
        "split": config.split,
        "data_digest": index.digest,
        "seed": config.seed,
        "top_k": config.top_k,
        "num_utterances": {name: len(utterances) for name, utterances in suites.items()},
        "rows": [{"name": row.name, "title": row.title, **asdict(row)} for row in rows],
        "metrics": {name: estimate.as_json() for name, estimate in metrics.items()},
        "codebook_nll": codebook_nll,
        "evaluators": {
            "asr": recogniser.describe(),
            "speaker": encoder.describe(),
            "alignment": f"jiwer {version('jiwer')}",
        },
        "codec": {"name": index.codec.name, "num_codebooks": index.codec.num_codebooks, "digest": index.codec.digest},
        "watermark": generator.watermark_name,
    }


def _write_audio(path: Path, audio: np.ndarray) -> None:
    part = path.with_suffix(".tmp")
    soundfile.write(part, np.clip(audio, -1.0, 1.0), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(part, path)


def _log(config: EvaluateConfig, summary: dict[str, Any], places: Places) -> None:
    """Send the numbers and the page to W&B, when asked."""
    if config.logger.name != "wandb":
        return
    import wandb

    settings: dict[str, Any] = {"project": config.logger.project, "mode": config.logger.mode, "job_type": "evaluate"}
    run = wandb.init(dir=str(places.output), config=asdict(config), **settings)
    run.summary.update({f"evaluation/{name}": estimate["value"] for name, estimate in summary["metrics"].items()})
    page = places.output / "report.html"
    if config.html:
        run.log({"evaluation/report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    run.finish()
