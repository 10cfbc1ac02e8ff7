"""How well recordings are heard: words, speakers, turns and times, on conversations whose truth is known.

    python benchmarks/prep_accuracy.py --truth DIR             # 40 minutes of one core; DIR is made when it is not there (prep_truth.py)
    python benchmarks/prep_accuracy.py --truth DIR --only meeting simulation     # kinds: talk, call, simulation, meeting
    python benchmarks/prep_accuracy.py --truth DIR transcribe.model=tiny.en      # any of transcribe., diarize., segment.

Runs what `prep=offline` runs. In .venv-prep, `transcribe.reader=whisperx` measures WhisperX. Word error rates are of words as
Whisper's own normaliser leaves them; listeners' noises without letters of their own ("mm hmm", "uh huh") count for neither side,
their recall is a row of its own. Concatenated-permutation word errors by meeteval, diarization and detection errors by pyannote.metrics.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import fields
from datetime import date
from difflib import SequenceMatcher
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import soundfile
import torch
from scipy.optimize import linear_sum_assignment
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from prep_truth import NUM_ROUNDS, RATE_HZ, build  # noqa: E402

from csm.config import DiarizeConfig, SegmentConfig, TranscribeConfig  # noqa: E402
from csm.listening.transcripts import normalise_transcript  # noqa: E402
from data_prep.diarize import Diarizer, assign_speakers  # noqa: E402
from data_prep.segment import BACKCHANNELS, turns_of  # noqa: E402
from data_prep.transcribe import Transcriber, find_speech  # noqa: E402
from data_prep.transcript import Transcript  # noqa: E402

NORMALISER = EnglishTextNormalizer({"color": "colour", "neighbors": "neighbours"})  # American spellings of the lines' words
NOISES = {"mm", "hmm", "mmhmm", "mhm", "hm", "uh", "huh", "uhhuh", "um", "ah", "oh"}
NOISY, QUIET = "the talks at 20 dB of noise", "the others"
KINDS = ("talk", "call", "simulation", "meeting")
GROUPS = {"talk": "talks", "simulation": "simulations", "meeting": "meetings"}


def words_of(text: str) -> list[str]:
    return [word for word in NORMALISER(text).split() if word not in NOISES]


def edits(truth: list[str], found: list[str]) -> int:
    row = list(range(len(found) + 1))
    for index, word in enumerate(truth, 1):
        previous, row[0] = row[0], index
        for at, other in enumerate(found, 1):
            previous, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, previous + (word != other))
    return row[-1]


def hear(audio: np.ndarray, transcriber: Transcriber, diarizer: Diarizer) -> list[Transcript]:
    """As the stage `transcribe` does: a transcript a channel where channels are speakers, else one with speakers."""
    transcripts = []
    for channel, row in enumerate(audio):
        transcript = transcriber.transcribe(row)
        transcript.duration_s = len(row) / RATE_HZ
        if len(audio) > 1:
            transcript.channel = channel
            for word in transcript.words:
                word.speaker = channel
        else:
            transcript.speakers = diarizer.diarize(row, transcript.speech)
            assign_speakers(transcript)
        transcripts.append(transcript)
    return transcripts


def speaker_map(truth: list[dict[str, Any]], spans: list[list[Any]]) -> dict[Any, Any]:
    """Found speaker -> true one, by the time that they share."""
    ours, theirs = sorted({span[2] for span in spans}), sorted({turn["speaker"] for turn in truth})
    shared = np.zeros((len(ours), len(theirs)))
    for start_s, end_s, speaker in spans:
        for turn in truth:
            overlap_s = min(end_s, turn["end_s"]) - max(start_s, turn["start_s"])
            shared[ours.index(speaker), theirs.index(turn["speaker"])] += max(0.0, overlap_s)
    return {ours[row]: theirs[column] for row, column in zip(*linear_sum_assignment(-shared), strict=True)}


def word_starts(truth: list[dict[str, Any]], words: list[Any]) -> list[float]:
    """Found minus true start, seconds, of words that were heard right and whose time is known."""
    known = [(word, start_s) for turn in truth for word, start_s, _ in turn["words"]]
    heard = [(normalise_transcript(word.word), word.start_s) for word in words]
    matcher = SequenceMatcher(a=[word for word, _ in known], b=[word for word, _ in heard], autojunk=False)
    errors = []
    for first, second, size in matcher.get_matching_blocks():
        errors += [heard[second + index][1] - known[first + index][1] for index in range(size)]
    return [error for error in errors if abs(error) < 1.0]  # the same word elsewhere is no measure of time


def turn_edges(truth: list[dict[str, Any]], turns: list[Any], speakers: dict[Any, Any]) -> list[float]:
    """Distance of a true turn's start and end from those of the found turn of the same speaker that it shares most time with."""
    distances = []
    for turn in truth:
        if turn["backchannel"]:
            continue
        same = [other for other in turns if speakers.get(other.speaker) == turn["speaker"]]
        best = max(same, key=lambda other: min(other.end_s, turn["end_s"]) - max(other.start_s, turn["start_s"]), default=None)
        if best is not None and min(best.end_s, turn["end_s"]) > max(best.start_s, turn["start_s"]):
            distances += [abs(best.start_s - turn["start_s"]), abs(best.end_s - turn["end_s"])]
    return distances


def heard_noises(truth: list[dict[str, Any]], words: list[Any]) -> tuple[int, int]:
    """Listeners' noises of which a word of the kind was heard within half a second, and how many there are."""
    noises = [turn for turn in truth if turn["backchannel"]]
    count = 0
    for turn in noises:
        near = [word for word in words if turn["start_s"] - 0.5 < word.start_s and word.end_s < turn["end_s"] + 0.5]
        count += any(normalise_transcript(word.word.replace("-", "")) in BACKCHANNELS for word in near)
    return count, len(noises)


def silent_sounds() -> dict[str, np.ndarray]:
    """30 s in which nobody speaks."""
    time_s = np.arange(30 * RATE_HZ) / RATE_HZ
    random = np.random.default_rng(0)
    beat = np.maximum(0, 1 - (time_s % 0.5) * 6)
    melody = np.repeat(random.choice([220.0, 246.9, 277.2, 329.6, 370.0, 440.0], 60), RATE_HZ // 2)
    phase = 2 * np.pi * np.cumsum(melody) / RATE_HZ
    music = beat * sum(np.sin(phase * number) / number for number in range(1, 8)) + 0.3 * beat * random.normal(0, 1, len(time_s))
    chords = sum(np.sin(2 * np.pi * hz * time_s) for hz in (220, 277.2, 329.6)) * (0.5 + 0.5 * np.sin(2 * np.pi * 2 * time_s))
    sounds = {
        "silence": np.zeros(len(time_s)),
        "white noise": random.normal(0, 0.05, len(time_s)),
        "brown noise": np.cumsum(random.normal(0, 1, len(time_s))) / 2_000,
        "music (melody, drums)": 0.1 * music,
        "music (chords)": 0.1 * chords,
    }
    return {name: np.clip(sound, -1, 1).astype(np.float32) for name, sound in sounds.items()}


def measure(folder: Path, kinds: list[str], configs: dict[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(measure -> value, lines of the table of conversations)."""
    truth = {name: entry for name, entry in build(folder).items() if entry["kind"] in kinds}
    transcriber, diarizer = Transcriber(configs["transcribe"]), Diarizer(configs["diarize"])
    bare = TranscribeConfig(**{**vars(configs["transcribe"]), "pad_s": 0.0})
    asked: dict[str, Any] = {"der": {}, "detection": {}, "cpwer": {}}
    rows, starts, edges = [], [], []
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, entry in truth.items():
        kind, turns = entry["kind"], entry["turns"]
        audio = soundfile.read(folder / entry["path"], dtype="float32", always_2d=True)[0].T
        begun_s = time.process_time()
        if kind in ("talk", "call"):
            transcripts = hear(audio, transcriber, diarizer)
        else:
            transcripts = [Transcript(speech=find_speech(audio[0], configs["transcribe"]))]
            transcripts[0].speakers = diarizer.diarize(audio[0], transcripts[0].speech)
        spent_s = time.process_time() - begun_s
        spans = [[turn["start_s"], turn["end_s"], turn["speaker"]] for turn in turns]
        found = [[span.start_s, span.end_s, span.speaker] for transcript in transcripts for span in transcript.speakers]
        speech = [[span.start_s, span.end_s, 0] for span in find_speech(audio.mean(axis=0), bare)]
        asked["detection"].setdefault(GROUPS.get(kind, kind), {})[name] = dict(truth=spans, found=speech)
        num_true, num_found = len({turn["speaker"] for turn in turns}), len({span[2] for span in found})
        if kind == "call":
            found, num_found = [], num_true
        else:
            asked["der"].setdefault(GROUPS[kind], {})[name] = dict(truth=spans, found=found)
            if kind != "meeting":
                counts["speakers"][0] += num_true == num_found
                counts["speakers"][1] += 1
        wer = cells = ""
        if kind in ("talk", "call"):
            words = sorted((word for transcript in transcripts for word in transcript.words), key=lambda word: word.start_s)
            made, _ = turns_of(transcripts, configs["segment"])
            said = [word for turn in turns for word in words_of(turn["text"])]
            errors = edits(said, [word for turn in made for word in words_of(turn.text)])
            if kind == "talk":
                counts["wer"][0] += errors
                counts["wer"][1] += len(said)
                said_in_turns = [word for turn in turns if not turn["backchannel"] for word in words_of(turn["text"])]
                errors_in_turns = edits(said_in_turns, [word for turn in made if not turn.backchannel for word in words_of(turn.text)])
                for key in ("wer_turns", f"round {entry['round']}", NOISY if entry["is_noisy"] else QUIET):
                    counts[key][0] += errors_in_turns
                    counts[key][1] += len(said_in_turns)
            wer = f"{errors / len(said):.1%}"
            by_speaker: list[dict[str, str]] = [{}, {}]
            for side, entries in zip(by_speaker, (turns, made), strict=True):
                for turn in entries:
                    who, text = (turn["speaker"], turn["text"]) if isinstance(turn, dict) else (turn.speaker, turn.text)
                    side[str(who)] = side.get(str(who), "") + " " + " ".join(words_of(text))
            asked["cpwer"][name] = by_speaker
            mapped = {0: 0, 1: 1} if kind == "call" else speaker_map(turns, found)
            starts += word_starts(turns, words)
            edges += turn_edges(turns, made, mapped)
            heard, num_noises = heard_noises(turns, words)
            key = "noise_call" if kind == "call" else "noise_mix"
            counts[key][0] += heard
            counts[key][1] += num_noises
            cells = f"{heard} of {num_noises}"
        rows.append(
            [name, f"{entry['duration_s']:.0f}", f"{num_true} / {num_found}", wer, "", "", cells, f"{entry['duration_s'] / spent_s:.0f}x"]
        )
        print(rows[-1], flush=True)
    scores = json.loads(
        subprocess.run(
            [folder / "tools" / "bin" / "python", ROOT / "benchmarks" / "prep_scores.py"],
            input=json.dumps(asked), capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    each = {name: value for group in scores["der"].values() for name, value in group["each"].items()}
    for row in rows:
        if row[0] in scores["cpwer"]:
            row[4] = f"{scores['cpwer'][row[0]]['errors'] / scores['cpwer'][row[0]]['length']:.1%}"
        row[5] = f"{each[row[0]]:.1%}" if row[0] in each else ""
    values = {}
    if "talk" in kinds:
        talks = [entry for name, entry in scores["cpwer"].items() if truth[name]["kind"] == "talk"]
        values["word error rate, talks"] = f"{counts['wer'][0] / counts['wer'][1]:.2%}"
        values["the same without listeners' noises on either side"] = f"{counts['wer_turns'][0] / counts['wer_turns'][1]:.2%}"
        for key in (*(f"round {number + 1}" for number in range(NUM_ROUNDS)), NOISY, QUIET):
            wrong, said_there = counts[key]
            values[f"... in {key}"] = f"{wrong:,} words of {said_there:,}, {wrong / max(1, said_there):.2%}"
        values["cpWER, talks"] = f"{sum(entry['errors'] for entry in talks) / sum(entry['length'] for entry in talks):.2%}"
    calls = [entry for name, entry in scores["cpwer"].items() if truth[name]["kind"] == "call"]
    if calls:
        values["cpWER, calls of two channels"] = f"{sum(entry['errors'] for entry in calls) / sum(entry['length'] for entry in calls):.2%}"
    for group, entry in scores["der"].items():
        values[f"diarization error, {group}, collar 0.25 s"] = f"{entry['all']:.1%}"
    for group, entry in scores["detection"].items():
        values[f"voice detection error, {group}"] = f"{entry['all']:.1%} (missed {entry['missed']:.1%}, false {entry['false']:.1%})"
    if counts["speakers"][1]:
        values["number of speakers right"] = f"{counts['speakers'][0]} of {counts['speakers'][1]}"
    if starts:
        values["word starts off by, median"] = f"{spread(np.abs(starts))}; bias {1000 * median(starts):+.0f} ms"
        values["turn starts and ends off by, median"] = spread(np.array(edges))
        for key, name in (("noise_mix", "mixed talks"), ("noise_call", "calls of two channels")):
            if counts[key][1]:
                values[f"listeners' noises heard, {name}"] = f"{counts[key][0]} of {counts[key][1]}"
        for name, sound in silent_sounds().items():
            heard = transcriber.transcribe(sound)
            values[f"words in 30 s of {name}"] = f"{len(heard.words)}"
    return values, ["| " + " | ".join(row) + " |" for row in rows]


def spread(seconds: np.ndarray) -> str:
    """Median and 90th percentile."""
    return f"{1000 * np.median(seconds):.0f} ms, p90 {1000 * np.quantile(seconds, 0.9):.0f} ms (n = {len(seconds)})"


def configs_of(overrides: list[str]) -> dict[str, Any]:
    """Dataclasses with `group.key=value` put in, by the type of the default."""
    kinds = {"transcribe": TranscribeConfig, "diarize": DiarizeConfig, "segment": SegmentConfig}
    values: dict[str, dict[str, Any]] = {kind: {} for kind in kinds}
    for override in overrides:
        path, _, value = override.partition("=")
        group, _, key = path.partition(".")
        default = next((getattr(kinds[group](), field.name) for field in fields(kinds[group]) if field.name == key), NotImplemented)
        if default is NotImplemented:
            raise SystemExit(f"{override}: expected transcribe., diarize. or segment. with one of their keys")
        values[group][key] = value if default is None or isinstance(default, str) else type(default)(json.loads(value))
    return {kind: make(**values[kind]) for kind, make in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--truth", type=Path, required=True, help="folder of the conversations; made when it is not there")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "prep_accuracy.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    configs = configs_of(arguments.overrides)
    values, rows = measure(arguments.truth, arguments.only, configs)
    models = Transcriber(configs["transcribe"]).settings
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    command = "python benchmarks/prep_accuracy.py " + " ".join(argument for argument in sys.argv[1:])
    text = [
        "# Accuracy of data preparation",
        "",
        f"- command: `{command.strip()}`",
        f"- commit: {commit}; date: {date.today()}; machine: {platform.machine()}, one thread",
        f"- models: {', '.join(f'{key} {value[:40] if isinstance(value, str) else value}' for key, value in models.items())}",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in values.items()),
        "",
        "| conversation | s | speakers, true / found | WER | cpWER | DER | noises heard | x real time |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
    arguments.output.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
