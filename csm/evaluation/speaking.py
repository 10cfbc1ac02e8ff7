"""Speaks the lines of every row and has every clip judged, going on from what an earlier start found.

Generation runs on the calling thread; decoding, watermarking and judging of finished clips run beside it on two. Every draw is
keyed by (seed, key of the line) and every clip is judged by itself: neither the batch size, nor the number of threads, nor a
restart moves a number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from csm.evaluation.dialogue import Dialogue, speak_dialogues
from csm.evaluation.journal import Journal
from csm.evaluation.judging import RESYNTHESIS, Judge, Row, Verdict
from csm.evaluation.metrics import seed_for
from csm.evaluation.suites import DIALOGUE, Utterance
from csm.frames import SAMPLE_RATE_HZ
from csm.generation.generator import GeneratedCodes, Generator, Request
from csm.listening.asr import Recogniser
from csm.listening.naturalness import MosModel
from csm.listening.speaker import SpeakerEncoder, VoiceBook

NUM_WORKERS = 2  # clips judged at a time
MAX_DURATION_RATIO = 3  # a clip is cut when it is this many times as long as the longest reference of its suite


@dataclass
class Listeners:
    """Who judges.

    Attributes:
        scored: keys of the lines whose clips `mos_models` score.
        emotion_of: label of 24 kHz float32 [S]; None: not asked.
    """

    recogniser: Recogniser
    encoder: SpeakerEncoder
    mos_models: Sequence[MosModel] = ()
    scored: frozenset[str] = frozenset()
    emotion_of: Callable[[np.ndarray], str] | None = None


@dataclass(frozen=True)
class Drawing:
    """How codes are drawn."""

    top_k: int
    batch_size: int
    seed: int


def longest_s(utterances: Sequence[Utterance]) -> float:
    """Where clips of these lines are cut."""
    return MAX_DURATION_RATIO * max(utterance.reference_s for utterance in utterances)


def speak(
    generator: Generator,
    utterances: Sequence[Utterance],
    *,
    temperature: float,
    top_k: int,
    batch_size: int,
    seed: int,
    max_duration_s: float,
) -> Iterator[tuple[Utterance, GeneratedCodes]]:
    """Speak lines in batches, in the order of their lengths; a line's draws depend on (seed, its key) only."""
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


def speak_and_judge(
    generator: Generator,
    listeners: Listeners,
    known: Sequence[Utterance],
    suites: dict[str, list[Utterance]],
    dialogues: Sequence[Dialogue],
    rows: Sequence[Row],
    drawing: Drawing,
    journal: Journal,
    console: Console,
) -> tuple[list[Verdict], dict[str, Utterance]]:
    """The verdicts of every row, rows in order and lines in the suite's order; voices are learnt from the `known` lines.

    Returns:
        Verdicts, and the turns of the dialogues by key, with what came before them as context.
    """
    output = journal.path.parent

    def decode(codes: Tensor) -> np.ndarray:
        return generator.codec.decode(codes).cpu().numpy()

    def reference_of(utterance: Utterance) -> np.ndarray:
        return decode(utterance.codes) if utterance.audio is None else utterance.audio

    lines = {**suites, DIALOGUE: [turn for dialogue in dialogues for turn in dialogue.turns]}
    turns: dict[str, Utterance] = {}
    with ThreadPoolExecutor(NUM_WORKERS) as pool, Progress(console=console, transient=True) as progress:
        task = progress.add_task("learn the voices", total=sum(len(lines[row.suite]) for row in rows))
        heard = {utterance.key: utterance for utterances in (known, *lines.values()) for utterance in utterances}
        references = dict(zip(heard, pool.map(reference_of, heard.values()), strict=True))
        embeddings = pool.map(lambda utterance: listeners.encoder.embed(references[utterance.key]), known)
        voices = VoiceBook([(u.voice, u.text, e) for u, e in zip(known, embeddings, strict=True) if e is not None])
        judge = Judge(
            listeners.recogniser,
            listeners.encoder,
            voices,
            mos_models=listeners.mos_models,
            scored=listeners.scored,
            emotion_of=listeners.emotion_of,
        )

        def work(row: Row, utterance: Utterance, said: GeneratedCodes | None) -> Verdict:
            if said is not None:
                audio = generator.audio_from_codes(said.codes).numpy()
            else:
                audio = decode(utterance.codes) if row.source == RESYNTHESIS else references[utterance.key]
            wav = f"clips/{row.name}/{utterance.key}.flac" if len(audio) else ""
            if wav:
                write_clip(output / wav, audio)
            verdict = judge.judge(row, utterance, audio, references[utterance.key], said, wav)
            journal.add(verdict)
            progress.advance(task)
            return verdict

        futures: list[Future[Verdict]] = []
        verdicts: list[Verdict] = []
        for row in rows:
            (output / "clips" / row.name).mkdir(parents=True, exist_ok=True)
            progress.update(task, description=row.title.lower())
            there = [journal.found[row.name, u.key] for u in lines[row.suite] if (row.name, u.key) in journal.found]
            verdicts += there
            progress.advance(task, len(there))
            wanting = [u for u in lines[row.suite] if (row.name, u.key) not in journal.found]
            if row.temperature is None:
                futures.extend(pool.submit(work, row, utterance, None) for utterance in wanting)
            elif row.suite == DIALOGUE:
                unfinished = {utterance.key for utterance in wanting}

                def on_turn(turn: Utterance, said: GeneratedCodes, row: Row = row, unfinished: set[str] = unfinished) -> None:
                    turns[turn.key] = turn
                    if turn.key in unfinished:
                        futures.append(pool.submit(work, row, turn, said))

                # All of every dialogue, also what was judged before: the next turns hear it, and it is said the same again.
                speak_dialogues(
                    generator,
                    dialogues,
                    max_duration_s=longest_s(lines[DIALOGUE]),
                    temperature=row.temperature,
                    top_k=drawing.top_k,
                    batch_size=drawing.batch_size,
                    seed=drawing.seed,
                    on_turn=on_turn,
                )
            else:
                for utterance, said in speak(
                    generator,
                    wanting,
                    temperature=row.temperature,
                    top_k=drawing.top_k,
                    batch_size=drawing.batch_size,
                    seed=drawing.seed,
                    max_duration_s=longest_s(lines[row.suite]),
                ):
                    futures.append(pool.submit(work, row, utterance, said))
        progress.update(task, description="listen to the clips")
        try:
            verdicts += [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)  # report the first failure now, not after the other clips
            raise
    place = {(row.name, u.key): (i, j) for i, row in enumerate(rows) for j, u in enumerate(lines[row.suite])}
    ordered = sorted(verdicts, key=lambda verdict: place[verdict.row, verdict.key])
    return ordered, {key: replace(turn, audio=references[key]) for key, turn in turns.items()}


def write_clip(path: Path, audio: np.ndarray) -> None:
    """Write 24 kHz float32 [S] as FLAC, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    soundfile.write(part, np.clip(audio, -1.0, 1.0), SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    os.replace(part, path)
