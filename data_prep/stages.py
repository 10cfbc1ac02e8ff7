"""Listening to recordings without texts: three stages between the manifest and the codes, a file a unit and stage.

`transcribe` hears words and speakers, `segment` makes turns of them and measures each, `filter` chooses. A stage's file
(`prep/<stage>/<unit>.jsonl`) has a line a recording behind a head that names the settings and the input it was made of and
the digest of its lines; it is done again only when one of these is another. So a changed threshold redoes the filter and, if
that chose otherwise, the codes, but no transcript.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from csm.allocator import give_freed_memory_back
from csm.config import DiarizeConfig, FilterConfig, IngestConfig, SegmentConfig, TranscribeConfig
from csm.frames import SAMPLE_RATE_HZ
from csm.listening.naturalness import DNSMOS, dnsmos
from data_prep import quality
from data_prep.channels import channels_differ
from data_prep.decode import read_header
from data_prep.diarize import Diarizer, assign_speakers, load_diarizer
from data_prep.failures import Failure, Rejected
from data_prep.filter import apart, refused_recording
from data_prep.ingest import ingest
from data_prep.manifest import Recording, check_turns, file_digest, manifest_line
from data_prep.segment import turns_of
from data_prep.segmentation import RATE_HZ, local_activity
from data_prep.shard import write_atomic
from data_prep.transcribe import Transcriber
from data_prep.transcript import Dropped, SpeakerSpan, Transcript, transcript_from_json, unheard

STAGE_VERSION = 4  # raise when the same settings would hear, cut or choose otherwise
TRANSCRIBE, SEGMENT, FILTER = "transcribe", "segment", "filter"
NAMES = (TRANSCRIBE, SEGMENT, FILTER)
_LONG_S = 600  # listening to this much leaves 0.4 GB of freed memory with the C library, hours leave a gigabyte


@dataclass
class Listening:
    """What the stages do; plain values, for workers get them by pickle.

    Attributes:
        models: what `models_used` gave; None asks the models, which loads them.
    """

    ingest: IngestConfig
    transcribe: TranscribeConfig
    diarize: DiarizeConfig
    segment: SegmentConfig
    filter: FilterConfig
    models: dict[str, Any] | None = None

    def models_used(self) -> dict[str, Any]:
        """Models by digest, programs by version."""
        if self.models is None:
            self.models = {
                "transcriber": _transcriber(self.transcribe).settings,
                "diarizer": _diarizer(self.diarize, self.transcribe.device).settings,
            }
        return self.models

    def settings(self, stage: str) -> dict[str, Any]:
        """What a stage's lines depend on besides its input. Where it runs is left out: it is no choice of data."""
        if stage == TRANSCRIBE:
            return {"ingest": asdict(self.ingest), **self._heard_by(), **self.models_used()}
        if stage == SEGMENT:
            return {"ingest": asdict(self.ingest), "segment": asdict(self.segment), "dnsmos": self._dnsmos()}
        return {"filter": asdict(self.filter)}

    def _heard_by(self) -> dict[str, Any]:
        transcribe = {key: value for key, value in asdict(self.transcribe).items() if key != "device"}
        return {"transcribe": transcribe, "diarize": asdict(self.diarize)}

    def remember_models(self, path: Path) -> None:
        """Write down which models listened, for steps that only read what they heard: a merge needs no GPU."""
        told = (json.dumps({**self._heard_by(), "models": self.models_used()}, indent=1) + "\n").encode()
        if not path.is_file() or path.read_bytes() != told:
            write_atomic(path, told)

    def recall_models(self, path: Path) -> None:
        """Take the models from there, where they were asked for by the same settings; else they are asked for themselves."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(path.read_text(encoding="utf-8"))
            if {key: told[key] for key in ("transcribe", "diarize")} == self._heard_by():
                self.models = dict(told["models"])

    def _dnsmos(self) -> list[Any]:
        return [DNSMOS.sha256, self.filter.dnsmos_turns] if self.filter.min_dnsmos > 0 else []


@dataclass
class StageFile:
    """A stage's lines for one unit."""

    path: Path
    config_digest: str
    input_digest: str

    def check(self) -> str | None:
        """sha256 of the lines; None when they have to be made (again). They are not parsed: of many hours they are many."""
        try:
            with self.path.open("rb") as stream:
                told = json.loads(stream.readline())
                is_same = (told["config_digest"], told["input_digest"]) == (self.config_digest, self.input_digest)
                is_same = is_same and told["sha256"] == hashlib.file_digest(stream, "sha256").hexdigest()
                return told["sha256"] if is_same else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def read(self) -> list[dict[str, Any]]:
        """The lines, where `check` has found them whole."""
        body = self.path.read_text(encoding="utf-8").partition("\n")[2]
        return [json.loads(line) for line in body.split("\n")[:-1]]

    def write(self, rows: Sequence[dict[str, Any]]) -> str:
        """Write them; returns what `check` will."""
        body = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        head = {"config_digest": self.config_digest, "input_digest": self.input_digest, "sha256": _sha256(body)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, (json.dumps(head) + "\n" + body).encode())
        return head["sha256"]


@dataclass
class Heard:
    """What the last stage left of a unit: its lines, and their sha256."""

    file: StageFile
    digest: str

    def rows(self) -> list[dict[str, Any]]:
        return self.file.read()


def stage_file(listening: Listening, stage: str, work: Path, unit: str, input_digest: str) -> StageFile:
    """Where a stage's lines of a unit are, and what they must have been made of."""
    settings = json.dumps([STAGE_VERSION, stage, listening.settings(stage)], sort_keys=True)
    return StageFile(work / stage / f"{unit}.jsonl", _sha256(settings), input_digest)


def run_stages(
    listening: Listening,
    names: Sequence[str],
    last: str,
    work: Path,
    unit: str,
    unit_digest: str,
    recordings: Callable[[], Iterator[Recording]],
    root: Path,
) -> Heard | None:
    """Do the named stages of a unit that are not done, in order, up to `last`.

    Returns:
        What `last` left; None where it, or a stage before it, is not done and was not asked for.
    """
    steps: dict[str, Callable[[Iterator[Any]], Iterator[dict[str, Any]]]] = {
        TRANSCRIBE: lambda rows: (_named(recording.source, _transcribe, recording, root, listening) for recording in rows),
        SEGMENT: lambda rows: (_named(row["recording"]["source"], _segment, row, root, listening) for row in rows),
        FILTER: lambda rows: (_filter(row, listening.filter) for row in rows),
    }
    digest = unit_digest
    file: StageFile | None = None
    for stage in NAMES[: NAMES.index(last) + 1]:
        before, file = file, stage_file(listening, stage, work, unit, digest)
        found = file.check()
        if found is None:
            if stage not in names:
                return None
            found = file.write(list(steps[stage](recordings() if before is None else iter(before.read()))))
        digest = found
    assert file is not None
    return Heard(file, digest)


def _named(source: str, step: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Let an error that nobody foresaw name the recording: of a unit's many, it is the one to look at."""
    try:
        return step(*arguments)
    except Exception as error:
        raise RuntimeError(f"{source}: {type(error).__name__}: {error}") from error


def recordings_of(rows: Sequence[dict[str, Any]]) -> Iterator[Recording]:
    """The recordings that the filter left something of, with their turns."""
    for row in rows:
        if row["recording"]["turns"]:
            values = dict(row["recording"])
            values["turns"] = check_turns(values["turns"], values["source"])
            yield Recording(**values)


def failures_of(rows: Sequence[dict[str, Any]]) -> list[Failure]:
    """Everything that the stages dropped."""
    return [Failure(**failure) for row in rows for failure in row["failures"]]


def _transcribe(recording: Recording, root: Path, listening: Listening) -> dict[str, Any]:
    row = _row(recording)
    try:
        if file_digest(root / recording.source) != recording.digest:
            raise Rejected("changed", "the file is not the one the manifest was made of; run stages=[manifest] again")
        channels = (0, 1) if _channels_are_speakers(root / recording.source, listening) else (None,)
        row["transcripts"] = [_listen(root / recording.source, channel, listening).as_json() for channel in channels]
        if recording.duration_s >= _LONG_S:
            give_freed_memory_back()  # for the stages that follow
    except Rejected as error:
        row["failures"].append(Failure.of(recording.source, "ingest", error, duration_s=recording.duration_s).row())
    return row


def _listen(path: Path, channel: int | None, listening: Listening) -> Transcript:
    """What is said in a recording and by whom; of one channel, which is a speaker, or of all.

    A channel is decoded by itself: of three hours it takes a gigabyte.

    Raises:
        Rejected: as `ingest` does.
    """
    ingested = ingest(path, listening.ingest, by_channel=channel is not None, channel=channel)
    duration_s = ingested.duration_s
    audio = soxr.resample(ingested.audio[0], SAMPLE_RATE_HZ, RATE_HZ).astype(np.float32, copy=False)
    del ingested  # another gigabyte
    activity = local_activity(audio, listening.transcribe.device)  # heard once, for words and for speakers
    transcript = _transcriber(listening.transcribe).transcribe(audio, activity)
    transcript.duration_s = duration_s
    if channel is not None:
        transcript.channel = channel
        for word in transcript.words:
            word.speaker = channel
    elif listening.diarize.num_speakers == 1:
        transcript.speakers = [SpeakerSpan(0, span.start_s, span.end_s) for span in transcript.speech]
        assign_speakers(transcript)
    elif transcript.words:
        transcript.speakers = _diarizer(listening.diarize, listening.transcribe.device).diarize(audio, transcript.speech, activity)
        assign_speakers(transcript)
    return transcript


def _channels_are_speakers(path: Path, listening: Listening) -> bool:
    """Whether the two channels of a file are two speakers.

    Raises:
        Rejected: as `ingest` does.
    """
    wanted = listening.diarize.channels
    if wanted == "mix" or read_header(path).num_channels != 2:
        return False
    if wanted == "speakers":
        return True
    return channels_differ(path)


def _segment(row: dict[str, Any], root: Path, listening: Listening) -> dict[str, Any]:
    recording, transcripts = Recording(**row["recording"]), _transcripts(row)
    turns, without_words = turns_of(transcripts, listening.segment)
    made = _row(replace(recording, turns=turns))
    made["heard_s"] = round(sum(span.duration_s for transcript in transcripts for span in transcript.speech), 3)
    made["failures"] = list(row["failures"])
    for transcript in transcripts:
        made["failures"] += [_dropped(recording, entry, TRANSCRIBE) for entry in [*transcript.dropped, *unheard(transcript)]]
    made["failures"] += [_dropped(recording, entry, SEGMENT) for entry in without_words]
    heard = max(transcripts, key=lambda transcript: len(transcript.words), default=Transcript())
    made["language"], made["language_probability"] = heard.language, heard.language_probability
    made["recording"]["language"] = recording.language or heard.language
    if not turns:
        if not row["failures"]:
            why = Rejected("no_speech", "nobody was heard to speak in it")
            made["failures"].append(Failure.of(recording.source, SEGMENT, why, duration_s=recording.duration_s).row())
        return made
    by_channel = turns[0].channel is not None
    audio = ingest(root / recording.source, listening.ingest, by_channel=by_channel).audio
    noise = [quality.noise_level_db(channel) for channel in audio]
    speech = {transcript.channel: transcript.speech for transcript in transcripts}
    for turn in turns:
        assert turn.start_s is not None and turn.end_s is not None
        line = turn.channel or 0
        clip = _cut(audio[line], turn.start_s, turn.end_s)
        turn.quality |= quality.turn_quality(clip, turn.start_s, turn.end_s, speech[turn.channel], noise[line])
        turn.quality |= quality.text_quality(turn)
        background = quality.background_db(audio[line], turn.start_s, turn.end_s, speech[turn.channel])
        turn.quality |= {} if background is None else {"background_db": background}
        turn.quality["language_probability"] = round(heard.language_probability, 4)
    if listening.filter.min_dnsmos > 0:
        num_looked_at = min(listening.filter.dnsmos_turns or len(turns), len(turns))
        looked_at = [turns[index] for index in np.linspace(0, len(turns) - 1, num_looked_at).round().astype(int)]
        for turn in looked_at:
            if "dnsmos" not in turn.quality:
                turn.quality |= dnsmos(audio[turn.channel or 0], ((turn.start_s or 0.0) + (turn.end_s or 0.0)) / 2)
        made["dnsmos"] = round(statistics.median(turn.quality["dnsmos"] for turn in looked_at), 3)
        for turn in turns:
            turn.quality["dnsmos_recording"] = made["dnsmos"]
    made["recording"] = json.loads(manifest_line(replace(recording, turns=turns, language=made["recording"]["language"])))
    return made


def _filter(row: dict[str, Any], config: FilterConfig) -> dict[str, Any]:
    values = dict(row["recording"])
    turns = check_turns(values.get("turns", []), values["source"], may_be_empty=True)
    recording = Recording(**{**values, "turns": turns})
    made = _row(replace(recording, turns=[]))
    made["heard_s"] = row["heard_s"]
    made["failures"] = list(row["failures"])
    if not turns:
        return made
    why = refused_recording(row["language"], row["language_probability"], row.get("dnsmos"), config)
    if why is not None:
        made["failures"].append(Failure.of(recording.source, FILTER, why, duration_s=recording.duration_s).row())
        return made
    kept = []
    for index, turn, refused in apart(turns, config):
        if refused is None:
            kept.append(turn)
        else:
            duration_s = (turn.end_s or 0.0) - (turn.start_s or 0.0)
            made["failures"].append(Failure.of(recording.source, FILTER, refused, turn=index, duration_s=duration_s).row())
    made["recording"] = json.loads(manifest_line(replace(recording, turns=kept)))
    return made


def _row(recording: Recording) -> dict[str, Any]:
    return {"recording": json.loads(manifest_line(recording)), "transcripts": [], "failures": []}


def _transcripts(row: dict[str, Any]) -> list[Transcript]:
    return [transcript_from_json(entry, row["recording"]["source"]) for entry in row["transcripts"]]


def _dropped(recording: Recording, entry: Dropped, stage: str) -> dict[str, Any]:
    why = Rejected(entry.reason, f"at {entry.start_s:.2f} s: {entry.detail}")
    return Failure.of(recording.source, stage, why, turn=-1, duration_s=entry.end_s - entry.start_s).row()


def _cut(audio: np.ndarray, start_s: float, end_s: float) -> np.ndarray:
    return audio[max(0, round(start_s * SAMPLE_RATE_HZ)) : round(end_s * SAMPLE_RATE_HZ)]


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


_MODELS: dict[str, Any] = {}


def _transcriber(config: TranscribeConfig) -> Transcriber:
    return _loaded("transcriber", config, lambda: Transcriber(config))


def _diarizer(config: DiarizeConfig, device: str) -> Diarizer:
    return _loaded("diarizer", (config, device), lambda: load_diarizer(config, device))


def _loaded(name: str, key: Any, load: Callable[[], Any]) -> Any:
    """A model, loaded once a process for a configuration."""
    if name not in _MODELS or _MODELS[name][0] != key:
        _MODELS[name] = key, load()
    return _MODELS[name][1]
