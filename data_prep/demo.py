"""The offline corpus: two-speaker conversations over digits and a few carrier phrases, synthesised, encoded and sharded.

A plan (who says what) is drawn from the seed alone; worker processes then speak and encode its conversations in chunks of
fixed size, so the folder's bytes do not depend on how many workers there are. The folder is built as `<output>.tmp` and
renamed when it is whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from csm.codec import SpectralCodec
from csm.codec.voices import VOICES_FOLDER
from csm.config import PrepConfig
from csm.frames import SAMPLE_RATE_HZ, num_frames_from_samples
from csm.text import WordTokenizer
from data_prep.script import SPLITS, VOICES, Conversation, Plan, make_plan, spoken, vocabulary
from data_prep.shard import Sample, write_atomic, write_split
from data_prep.synthesis import LICENCES, LICENSE, PACKAGE, Synthesizer, Voice, draw_voice, random_for, synthesizer_version
from data_prep.voices import add_voices

CORPUS_VERSION = 2  # raise when the same settings would give other bytes
DESCRIPTION_NAME = "corpus.json"
GAP_SAMPLES = 4_800  # 0.2 s between turns
NUM_FIT_TURNS = 1_200  # the codec is fitted on these; about 20 minutes of speech, every second turn in a voice of its own
CHUNK_CONVERSATIONS = 48  # one task of a worker


@dataclass
class _Job:
    """Conversations `first`.. of a split, for one worker."""

    seed: int
    split: str
    first: int
    conversations: list[Conversation]
    num_phases: int = 1
    keep_audio: bool = False
    codec_folder: str | None = None  # None: there is no codec yet, these turns are what it is fitted to


@dataclass
class _Spoken:
    """One conversation as a worker hands it back: `codes[phase][turn]` is int16 [K, F]."""

    digest: str
    turns: Conversation
    num_samples: list[int]
    clipping: list[float]
    codes: list[list[np.ndarray]]
    audio: np.ndarray | None


@dataclass
class _Counts:
    conversations: int = 0
    samples: int = 0  # conversations times phases
    turns: int = 0
    frames: int = 0  # of the first phase
    positions: int = 0  # text, frames and EOS rows of the first phase
    seconds_by_voice: dict[str, float] = field(default_factory=lambda: dict.fromkeys((voice.name for voice in VOICES), 0.0))


def build_demo(config: PrepConfig) -> Path:
    """Build the corpus into `config.output` and return that folder; a finished one of the same settings is left as it is.

    Raises:
        ValueError: if the folder holds a corpus of other settings.
        FileExistsError: if the folder holds something else, or another process is building it.
    """
    output = Path(config.output)
    settings = corpus_settings(config)
    console = Console(soft_wrap=True)
    if _is_finished(output, settings):
        if not (output / VOICES_FOLDER).is_dir():  # built before there were presets
            add_voices(output, json.loads((output / DESCRIPTION_NAME).read_text(encoding="utf-8")))
        console.print(f"{output}: corpus of these settings is there already, nothing to do", highlight=False)
        return output
    started_at_s = time.monotonic()
    with _locked(output):
        part = output.with_name(output.name + ".tmp")
        if part.exists():
            shutil.rmtree(part)
        part.mkdir(parents=True)
        description = _build(config, settings, part, console)
        os.replace(part, output)
    console.print(_table(description))
    console.print(f"{output}: built in {time.monotonic() - started_at_s:.0f} s", highlight=False)
    return output


def corpus_settings(config: PrepConfig) -> dict[str, Any]:
    """What the corpus depends on; equal settings give equal bytes on one machine, whatever `num_workers`."""
    return {
        "corpus_version": CORPUS_VERSION,
        "seed": config.seed,
        "num_train_strings": config.num_train_strings,
        "num_heldout_strings": config.num_heldout_strings,
        "num_phases": config.num_phases,
        "synthesiser": f"{PACKAGE} {synthesizer_version()}",
        "voices": [asdict(voice) for voice in VOICES],
    }


def _build(config: PrepConfig, settings: dict[str, Any], folder: Path, console: Console) -> dict[str, Any]:
    """Fill the folder: codec, tokenizer, splits, description. Returns the description."""
    plan = make_plan(config)
    tokenizer = WordTokenizer(vocabulary(), num_speakers=len(VOICES))
    tokenizer.save(folder)
    counts = {split: _Counts() for split in SPLITS}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("turns, {task.fields[rate]:.0f}/s"))
    # spawn: a forked child would inherit torch's thread pool, and hang.
    pool = ProcessPoolExecutor(config.num_workers, multiprocessing.get_context("spawn"), _start_worker)
    with pool, Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        codec = _fit_codec(pool, config, plan, folder / "codec", progress)
        num_turns = sum(len(c) for split in SPLITS for c in plan.conversations[split])
        task = progress.add_task("speak and encode", total=num_turns, rate=0.0)

        def samples(split: str) -> Iterator[Sample]:
            is_train = split == "train"
            conversations = plan.conversations[split]
            jobs = [
                _Job(
                    config.seed,
                    split,
                    first,
                    conversations[first : first + CHUNK_CONVERSATIONS],
                    num_phases=config.num_phases if is_train else 1,
                    keep_audio=split == "heldout",
                    codec_folder=str(folder / "codec"),
                )
                for first in range(0, len(conversations), CHUNK_CONVERSATIONS)
            ]
            for chunk in pool.map(_speak_and_encode, jobs):
                for conversation in chunk:
                    _count(counts[split], conversation, tokenizer)
                    yield from _samples_of(conversation)
                _advance(progress, task, sum(len(conversation.turns) for conversation in chunk))

        for split in SPLITS:
            write_split(samples(split), folder / split, codec.index_entry())
    description = _describe(settings, plan, counts, codec, tokenizer)
    add_voices(folder, description)
    write_atomic(folder / DESCRIPTION_NAME, (json.dumps(description, indent=1, ensure_ascii=False) + "\n").encode())
    return description


def _fit_codec(pool: ProcessPoolExecutor, config: PrepConfig, plan: Plan, folder: Path, progress: Progress) -> SpectralCodec:
    """Fit the codec on the first training conversations (their order is drawn), in a worker: one thread, one result."""
    conversations: list[Conversation] = []
    num_turns = 0
    for conversation in plan.conversations["train"]:
        if num_turns >= NUM_FIT_TURNS:
            break
        conversations.append(conversation)
        num_turns += len(conversation)
    task = progress.add_task("speak to fit the codec", total=num_turns, rate=0.0)
    jobs = [
        _Job(config.seed, "train", first, conversations[first : first + CHUNK_CONVERSATIONS])
        for first in range(0, len(conversations), CHUNK_CONVERSATIONS)
    ]
    clips: list[np.ndarray] = []
    for chunk in pool.map(_speak, jobs):
        clips.extend(clip for turns in chunk for clip in turns)
        _advance(progress, task, sum(len(turns) for turns in chunk))
    pool.submit(_fit, clips, config.seed, str(folder)).result()
    return SpectralCodec.load(folder)


def _advance(progress: Progress, task: Any, count: int) -> None:
    progress.advance(task, count)
    state = progress.tasks[task]
    progress.update(task, rate=state.completed / max(state.elapsed or 0.0, 1e-6))


def _start_worker() -> None:
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _synthesizer() -> Synthesizer:
    return Synthesizer()


@lru_cache(maxsize=1)
def _codec(folder: str) -> SpectralCodec:
    return SpectralCodec.load(Path(folder))


def _speak(job: _Job) -> list[list[np.ndarray]]:
    """Every turn of the job's conversations, int16 [S]."""
    return [
        [
            _synthesizer().speak(turn.text, _voice_of(job, i, j), random_for(job.seed, f"{job.split}-speech", job.first + i, j))
            for j, turn in enumerate(conversation)
        ]
        for i, conversation in enumerate(job.conversations)
    ]


def _voice_of(job: _Job, conversation: int, turn: int) -> Voice:
    """The speaker's own, but of every second turn that fits the codec a drawn one: a codec of four voices makes them of any fifth."""
    index = job.first + conversation
    if job.codec_folder is None and (index + turn) % 2:
        return draw_voice(random_for(job.seed, "codec-voice", index, turn))
    return VOICES[job.conversations[conversation][turn].speaker]


def _fit(clips: list[np.ndarray], seed: int, folder: str) -> None:
    SpectralCodec.fit([_as_float(clip) for clip in clips], seed=seed).save(Path(folder))


def _speak_and_encode(job: _Job) -> list[_Spoken]:
    assert job.codec_folder is not None
    codec = _codec(job.codec_folder)
    results = []
    for conversation, clips in zip(job.conversations, _speak(job), strict=True):
        by_turn = codec.encode_phases([_as_float(clip) for clip in clips], job.num_phases)
        codes = [[turn[phase].numpy().astype(np.int16) for turn in by_turn] for phase in range(job.num_phases)]
        audio = _recording(clips)
        clipping = [float((np.abs(clip.astype(np.int32)) >= 32767).mean()) for clip in clips]
        results.append(
            _Spoken(
                hashlib.sha256(audio.tobytes()).hexdigest()[:16],
                conversation,
                [len(clip) for clip in clips],
                clipping,
                codes,
                audio if job.keep_audio else None,
            )
        )
    return results


def _as_float(clip: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(clip.astype(np.float32) / 32768.0)


def _recording(clips: Sequence[np.ndarray]) -> np.ndarray:
    """The turns one after the other, a short silence between them."""
    parts = [part for clip in clips for part in (np.zeros(GAP_SAMPLES, np.int16), clip)]
    return np.concatenate(parts[1:])


def _samples_of(conversation: _Spoken) -> Iterator[Sample]:
    """One sample a phase. Phase p is the conversation with the first p * 10 ms of every turn left out."""
    for phase, codes in enumerate(conversation.codes):
        key = f"{conversation.digest}-{10 * phase}"
        cut = phase * SAMPLE_RATE_HZ // 100
        turns = []
        start, first = 0, 0
        for turn, length, clipping, turn_codes in zip(
            conversation.turns, conversation.num_samples, conversation.clipping, codes, strict=True
        ):
            last = first + turn_codes.shape[1]
            turns.append(
                {
                    "speaker": turn.speaker,
                    "speaker_name": VOICES[turn.speaker].name,
                    "text": turn.text,
                    "start_s": round(start / SAMPLE_RATE_HZ, 6),
                    "end_s": round((start + length - cut) / SAMPLE_RATE_HZ, 6),
                    "frames": [first, last],
                    "words": [],
                    "overlap": False,
                    "backchannel": False,
                    "quality": {"clipping": round(clipping, 6)},
                    "emotion": None,
                    "learn": {"c0": True, "depth": True},
                }
            )
            start += length + GAP_SAMPLES
            first = last
        meta = {
            "id": key,
            "source": PACKAGE,
            "license": LICENSE,
            "language": "en",
            "duration_s": turns[-1]["end_s"],
            "turns": turns,
        }
        yield Sample(key, meta, np.concatenate(codes, axis=1), conversation.audio)


def _count(counts: _Counts, conversation: _Spoken, tokenizer: WordTokenizer) -> None:
    counts.conversations += 1
    counts.samples += len(conversation.codes)
    for turn, num_samples in zip(conversation.turns, conversation.num_samples, strict=True):
        num_frames = num_frames_from_samples(num_samples)
        counts.turns += 1
        counts.frames += num_frames
        counts.positions += len(tokenizer.encode_turn(turn.speaker, turn.text)) + num_frames + 1
        counts.seconds_by_voice[VOICES[turn.speaker].name] += num_samples / SAMPLE_RATE_HZ


def _describe(
    settings: dict[str, Any], plan: Plan, counts: dict[str, _Counts], codec: SpectralCodec, tokenizer: WordTokenizer
) -> dict[str, Any]:
    """What corpus.json holds."""
    return {
        "name": "CSM Lab demo: two-speaker conversations over digits, synthetic",
        "settings_digest": _digest(settings),
        "settings": settings,
        "licences": LICENCES,
        "speakers": [{"speaker": index, **asdict(voice)} for index, voice in enumerate(VOICES)],
        "words": tokenizer.words,
        "codec_digest": codec.digest,
        "splits": {
            split: {
                "conversations": c.conversations,
                "samples": c.samples,
                "turns": c.turns,
                "frames": c.frames,
                "positions": c.positions,
                "seconds_by_voice": {voice.name: round(c.seconds_by_voice[voice.name], 2) for voice in VOICES},
            }
            for split, c in counts.items()
        },
        "heldout_strings": [spoken(digits) for digits in plan.heldout_strings],
        "validation_strings": [spoken(digits) for digits in plan.validation_strings],
    }


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _is_finished(output: Path, settings: dict[str, Any]) -> bool:
    """Whether the folder holds this very corpus; refuses a folder that holds anything else."""
    path = output / DESCRIPTION_NAME
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()) or output.is_file():
            raise FileExistsError(f"{output} holds something that is not a corpus ({DESCRIPTION_NAME} is missing); give another output=")
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a corpus description ({error}); remove {output} or give another output=") from error
    differing = [key for key in settings if found.get(key) != settings[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{output} holds a corpus made with {key}={found.get(key)}, this asks for {key}={settings[key]}; "
            "give another output=, or remove that folder to build it again"
        )
    try:
        SpectralCodec.load(output / "codec")
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{output} was encoded with another codec; remove that folder to build it again ({error})") from error
    return True


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Hold `<output>.lock`, so that two processes never build one folder; a killed process lets go of it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.with_name(output.name + ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{output} is being built by another process; wait for it, or give another output=") from error
        yield


def _table(description: dict[str, Any]) -> Table:
    table = Table(title=description["name"], title_justify="left", caption_justify="left")
    for column in ("split", "conversations", "turns", "frames", "positions", "minutes"):
        table.add_column(column, justify="left" if column == "split" else "right")
    splits = description["splits"]
    for split, counts in splits.items():
        numbers = [f"{counts[key]:,}" for key in ("conversations", "turns", "frames", "positions")]
        table.add_row(split, *numbers, f"{sum(counts['seconds_by_voice'].values()) / 60:.1f}")
    minutes = [f"{voice.name} {sum(c['seconds_by_voice'][voice.name] for c in splits.values()) / 60:.1f}" for voice in VOICES]
    table.caption = f"minutes by voice: {', '.join(minutes)}; training conversations at {description['settings']['num_phases']} phases each"
    return table
