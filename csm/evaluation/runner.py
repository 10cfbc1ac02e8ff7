"""Evaluates a checkpoint: speaks the held-out lines, has every clip judged, scores real speech, writes the results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.console import Console

from csm.config import EvaluateConfig
from csm.data.index import ShardIndex
from csm.data.shards import iter_samples
from csm.evaluation import pronunciation
from csm.evaluation.compare import read_runs
from csm.evaluation.context_gain import context_gain
from csm.evaluation.dialogue import Dialogue, dialogue_metrics, plan_dialogues
from csm.evaluation.journal import Journal
from csm.evaluation.judging import Row, Verdict, plan_rows, row_metrics
from csm.evaluation.likelihood import score_samples
from csm.evaluation.metrics import Estimate
from csm.evaluation.report import write_report
from csm.evaluation.speaking import NUM_WORKERS, Drawing, Listeners, longest_s, speak_and_judge, write_clip
from csm.evaluation.speed import measure_speed
from csm.evaluation.suites import SINGLE, Utterance, evenly_spaced, read_suites
from csm.evaluation.tables import markdown_tables, terminal_table
from csm.generation.generator import Generator
from csm.listening.asr import Recogniser
from csm.listening.emotion import EmotionClassifier
from csm.listening.naturalness import load_mos_models
from csm.listening.phonemes import PhonemeRecogniser
from csm.listening.speaker import SpeakerEncoder
from csm.model.pretrained import resolve_checkpoint
from csm.whole_files import write_text

NUM_LOGGED_CLIPS = 8  # of each row, to W&B
MAX_VALIDATION_SAMPLES = 200  # conversations scored from the validation split, spread evenly


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


@dataclass
class Findings:
    """What summary.json holds beside its header."""

    metrics: dict[str, Estimate] = field(default_factory=dict)
    codebook_nll: dict[str, list[float]] = field(default_factory=dict)
    by_turn: dict[str, list[float]] = field(default_factory=dict)
    evaluators: dict[str, dict[str, str | None] | str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def evaluate(config: EvaluateConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate as configured; write summary.json, summary.md, samples.jsonl, clips/ and report.html; speed.json apart.

    Killed and started again with the same settings it goes on where it was, and ends with the same table.

    Returns:
        What summary.json holds.
    Raises:
        FileNotFoundError, ValueError: if the run, its data or an evaluator is missing or does not fit.
    """
    console = console or Console(width=max(100, Console().width))  # a table with its numbers cut off says nothing
    if not config.temperatures or len(set(config.temperatures)) != len(config.temperatures):
        raise ValueError(f"temperatures={config.temperatures}: expected at least one, each once")
    others = read_runs(config.compare)
    torch.set_num_threads(config.num_threads or 1)  # two judges run beside the model: more threads each would only collide
    places = find_places(config)
    asked = [name for name in config.suites.names if config.context or name not in ("context", "dialogue", "context_gain")]
    everything = read_suites(places.data / config.split, context="context" in asked)
    suites = {name: evenly_spaced(utterances, config.max_utterances) for name, utterances in everything.items()}
    generator = Generator.from_pretrained(places.checkpoint)
    index = ShardIndex.load(places.data / config.split)
    index.check_codec(num_codebooks=generator.codec.num_codebooks, digest=generator.codec.digest, name=generator.codec.name)

    findings = Findings()
    listeners = _listeners(config, asked, suites, findings)
    dialogues: list[Dialogue] = []
    if "dialogue" in asked:
        sizes = {"num_dialogues": config.suites.num_dialogues, "num_turns": config.suites.dialogue_turns}
        dialogues = plan_dialogues(everything[SINGLE], seed=config.seed, **sizes)
    has_audio = all(u.audio is not None for u in suites[SINGLE])
    rows = plan_rows(config.temperatures, context="context" in asked, has_audio=has_audio, dialogue=bool(dialogues))
    header = _header(config, places, generator, index, rows, suites, dialogues)

    drawing = Drawing(config.top_k, config.batch_size, config.seed)
    identity = _digest({**header, "evaluators": findings.evaluators, "batch_size": None, "cut": [longest_s(s) for s in suites.values()]})
    journal = Journal(places.output, identity)
    is_done = False
    try:
        if journal.found:
            console.print(f"going on with {len(journal.found)} clips judged before", highlight=False)
        known = everything[SINGLE]
        verdicts, turns = speak_and_judge(generator, listeners, known, suites, dialogues, rows, drawing, journal, console)
        _measure_rows(config, rows, verdicts, findings)
        _measure_model(config, asked, places, generator, findings, console)
        _measure_words(config, asked, generator, places, drawing, findings)
        summary = header | {
            "metrics": {name: estimate.as_json() for name, estimate in findings.metrics.items()},
            "codebook_nll": findings.codebook_nll,
            "by_turn": findings.by_turn,
            "unavailable": findings.unavailable,
            "evaluators": findings.evaluators,
        }
        write_text(places.output / "samples.jsonl", "".join(json.dumps(v.as_json(), ensure_ascii=False) + "\n" for v in verdicts))
        write_text(places.output / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        write_text(places.output / "summary.md", markdown_tables(summary))
        speed = None
        if "speed" in asked:
            chosen = evenly_spaced(suites[SINGLE], config.suites.speed_clips)
            draws: dict[str, Any] = {"temperature": config.temperatures[-1], "top_k": config.top_k, "seed": config.seed}
            speed = measure_speed(generator, chosen, max_duration_s=longest_s(suites[SINGLE]), **draws)
            write_text(places.output / "speed.json", json.dumps(speed, indent=1) + "\n")
        if config.html:
            utterances = {utterance.key: utterance for suite in suites.values() for utterance in suite} | turns
            history = places.run / "metrics.csv"
            decode = lambda codes: generator.codec.decode(codes).cpu().numpy()  # noqa: E731
            page = places.output / "report.html"
            write_report(page, summary, speed, rows, verdicts, utterances, decode, history if history.is_file() else None, others)
        is_done = True
    finally:
        journal.close(is_done=is_done)
    console.print(terminal_table(summary))
    for name, reason in findings.unavailable.items():
        console.print(f"not measured: {name}: {reason}", highlight=False, markup=False)
    files = "summary.json, summary.md, samples.jsonl, clips/" + (", speed.json" if speed else "") + (", report.html" if config.html else "")
    console.print(f"{places.output}: {files}", highlight=False)
    _log(config, summary, speed, verdicts, places)
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


def _listeners(config: EvaluateConfig, asked: Sequence[str], suites: dict[str, list[Utterance]], findings: Findings) -> Listeners:
    """Those who judge clips; who cannot be had is noted."""
    recogniser = Recogniser(config.asr, prompt=config.asr_prompt, num_workers=NUM_WORKERS)
    encoder = SpeakerEncoder()
    listeners = Listeners(recogniser, encoder)
    findings.evaluators |= {"asr": recogniser.describe(), "speaker": encoder.describe(), "alignment": f"jiwer {version('jiwer')}"}  # type: ignore[dict-item]
    if "dialogue" in asked:
        findings.evaluators["cpwer"] = f"meeteval {version('meeteval')}"
    if "naturalness" in asked:
        listeners.mos_models, missing = load_mos_models(config.suites.naturalness)
        findings.unavailable |= missing
        findings.evaluators.update((model.name, dict(model.describe())) for model in listeners.mos_models)
        scored = [u.key for suite in suites.values() for u in evenly_spaced(suite, config.suites.naturalness_clips)]
        listeners.scored = frozenset(scored)
    if "emotion" in asked:
        if config.suites.emotion is None:
            findings.unavailable["emotion_match"] = (
                "no classifier ships in a package; set suites.emotion=<folder or hub id of an audio classifier>"
            )
        else:
            classifier = EmotionClassifier(config.suites.emotion)
            listeners.emotion_of = lambda audio: classifier.classify(audio)[0]
            findings.evaluators["emotion"] = classifier.describe()  # type: ignore[assignment]
    return listeners


def _measure_rows(config: EvaluateConfig, rows: Sequence[Row], verdicts: Sequence[Verdict], findings: Findings) -> None:
    for row in rows:
        of_row = [verdict for verdict in verdicts if verdict.row == row.name]
        findings.metrics |= row_metrics(of_row, row, seed=config.seed)
        if row.suite == "dialogue":
            metrics, findings.by_turn = dialogue_metrics(of_row, seed=config.seed, suffix=row.suffix)
            findings.metrics |= metrics


def _measure_model(
    config: EvaluateConfig, asked: Sequence[str], places: Places, generator: Generator, findings: Findings, console: Console
) -> None:
    """What the model makes of real speech, teacher-forced."""
    splits = ((config.split, "", config.max_utterances), (places.val_split, "_validation", MAX_VALIDATION_SAMPLES))
    for split, suffix, limit in splits if "likelihood" in asked else ():
        with console.status(f"losses of {split}"):
            samples = evenly_spaced(list(iter_samples(places.data / split)), limit)
            scores = score_samples(generator.model, generator.tokenizer, samples, seed=config.seed, name=split)
        found = {"c0_nll": scores.c0, "depth_nll": scores.depth, "eos_recall": scores.eos_recall, "false_stop": scores.false_stop}
        found |= {"eos_expected": scores.eos_expected, "eos_ece": scores.eos_ece}
        findings.metrics |= {name + suffix: estimate for name, estimate in found.items()}
        findings.codebook_nll[split] = scores.per_codebook
    if "context_gain" in asked:
        with console.status("what context is worth"):
            talks = [sample for sample in iter_samples(places.data / config.split) if len(sample.turns) > 1]
            samples = evenly_spaced(talks, config.max_utterances)
            gains, missing = context_gain(generator.model, generator.tokenizer, samples, seed=config.seed)
        findings.metrics |= gains
        findings.unavailable |= missing


def _measure_words(
    config: EvaluateConfig, asked: Sequence[str], generator: Generator, places: Places, drawing: Drawing, findings: Findings
) -> None:
    """Homographs and pronunciations, where the checkpoint can say the sentences and a phoneme recogniser can be had."""
    records: list[dict[str, object]] = []
    for suite in (pronunciation.HOMOGRAPHS, pronunciation.CONSISTENCY):
        if suite not in asked:
            continue
        reason = pronunciation.why_not_speakable(generator, pronunciation.read_scripts(suite))
        if reason is None:
            try:
                recogniser = PhonemeRecogniser(config.suites.phonemes)
            except ValueError as error:
                reason = str(error)
        if reason is not None:
            findings.unavailable[suite] = reason
            continue

        def keep(name: str, audio: np.ndarray) -> None:
            if len(audio):
                write_clip(places.output / f"clips/words/{name}.flac", audio)

        settings = {"top_k": drawing.top_k, "batch_size": drawing.batch_size, "seed": drawing.seed}
        estimate, found = pronunciation.measure(generator, recogniser, suite, temperature=config.temperatures[0], keep=keep, **settings)
        findings.metrics["homograph_accuracy" if suite == pronunciation.HOMOGRAPHS else "pronunciation_consistency"] = estimate
        findings.evaluators["phonemes"] = recogniser.describe()  # type: ignore[assignment]
        records += found
    if records:
        write_text(places.output / "words.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _header(
    config: EvaluateConfig,
    places: Places,
    generator: Generator,
    index: ShardIndex,
    rows: Sequence[Row],
    suites: dict[str, list[Utterance]],
    dialogues: Sequence[Dialogue],
) -> dict[str, Any]:
    """What was evaluated: nothing in it depends on the clock, the machine's paths or the order of work."""
    weights = places.checkpoint / "model.safetensors"
    return {
        "checkpoint": os.path.relpath(places.checkpoint, places.run) if places.run != places.checkpoint else places.checkpoint.name,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "",
        "split": config.split,
        "data_digest": index.digest,
        "seed": config.seed,
        "top_k": config.top_k,
        "suites": asdict(config.suites),
        "num_utterances": {name: len(utterances) for name, utterances in suites.items()}
        | {"dialogue": sum(len(d.turns) for d in dialogues)},
        "rows": [{"name": row.name, "title": row.title, **asdict(row)} for row in rows],
        "codec": {"name": index.codec.name, "num_codebooks": index.codec.num_codebooks, "digest": index.codec.digest},
        "watermark": generator.watermark_name,
    }


def _digest(thing: Any) -> str:
    return hashlib.sha256(json.dumps(thing, sort_keys=True, default=str).encode()).hexdigest()


def _log(
    config: EvaluateConfig, summary: dict[str, Any], speed: dict[str, Any] | None, verdicts: Sequence[Verdict], places: Places
) -> None:
    """Send the numbers, a table of clips and the page to W&B, when asked."""
    if config.logger.name != "wandb":
        return
    import wandb

    settings: dict[str, Any] = {"project": config.logger.project, "mode": config.logger.mode, "job_type": "evaluate"}
    run = wandb.init(dir=str(places.output), config=asdict(config), **settings)
    run.summary.update({f"evaluation/{name}": estimate["value"] for name, estimate in summary["metrics"].items()})
    if speed is not None:
        run.summary.update(
            {f"evaluation/{name}": value for name, value in speed.items() if name in ("rtf", "first_audio_s", "peak_memory_mib")}
        )
    table = wandb.Table(columns=["row", "voice", "text", "heard", "errors"])
    clips = []
    by_row: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        by_row.setdefault(verdict.row, []).append(verdict)
        table.add_data(verdict.row, verdict.voice, verdict.text, verdict.hypothesis, verdict.word_errors.errors)
    for name, of_row in by_row.items():
        chosen = [verdict for verdict in evenly_spaced(of_row, NUM_LOGGED_CLIPS) if verdict.wav]
        clips += [wandb.Audio(str(places.output / v.wav), caption=f"{name}, {v.voice}: {v.text}") for v in chosen]
    run.log({"evaluation/lines": table, "evaluation/clips": clips})
    page = places.output / "report.html"
    if config.html:
        run.log({"evaluation/report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
    run.finish()
