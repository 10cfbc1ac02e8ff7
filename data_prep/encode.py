"""Turns to codes, and conversations to samples that fit the model's window.

Every turn is encoded by itself, as at generation, in batches that reach over recordings (the codec sorts them by length and
masks; a turn's codes do not depend on its neighbours). A sample is a run of turns, cut only between turns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from csm.codec import Codec
from csm.config import EncodeConfig
from csm.frames import SAMPLE_RATE_HZ, SAMPLES_PER_FRAME
from csm.text import TextTokenizer
from data_prep.failures import Failure, Rejected
from data_prep.ingest import SILENCE_PEAK, Ingested
from data_prep.manifest import ManifestTurn, Recording
from data_prep.shard import Sample

BATCH_S = 300.0  # of audio handed to the codec at once
MAX_OVERHANG_S = 0.1  # how far a last turn may reach beyond its recording: rounding of the times
UNKNOWN = "unknown"  # license of a recording whose manifest names none


@dataclass
class CutTurn:
    """A turn with its place in the recording (samples at 24 kHz) and, once encoded, its codes [K, F] int16."""

    turn: ManifestTurn
    first: int
    last: int
    overlap: bool
    codes: np.ndarray | None = None

    @property
    def duration_s(self) -> float:
        return (self.last - self.first) / SAMPLE_RATE_HZ


@dataclass
class Conversation:
    """A recording between ingest and its samples: runs of turns with nothing dropped in between."""

    recording: Recording
    ingested: Ingested
    runs: list[list[CutTurn]]
    failures: list[Failure] = field(default_factory=list)

    @property
    def turns(self) -> list[CutTurn]:
        return [turn for run in self.runs for turn in run]

    def clip(self, turn: CutTurn) -> torch.Tensor:
        """The turn's audio, float32 [S]."""
        row = 0 if turn.turn.channel is None or len(self.ingested.audio) == 1 else turn.turn.channel
        return torch.from_numpy(self.ingested.audio[row, turn.first : turn.last])


def cut_turns(recording: Recording, ingested: Ingested, config: EncodeConfig) -> Conversation:
    """Place the turns in the audio. A turn that cannot be used ends a run: what follows it was said in another context.

    Raises:
        Rejected: "bad_times" if a turn lies outside of the recording: then no time of it can be trusted.
    """
    num_samples = ingested.audio.shape[1]
    conversation = Conversation(recording, ingested, runs=[[]])
    latest: CutTurn | None = None  # the turn that ends last so far
    for index, turn in enumerate(recording.turns):
        first = round((turn.start_s or 0.0) * SAMPLE_RATE_HZ)
        last = num_samples if turn.end_s is None else round(turn.end_s * SAMPLE_RATE_HZ)
        if last > num_samples + MAX_OVERHANG_S * SAMPLE_RATE_HZ or first >= num_samples:
            raise Rejected(
                "bad_times",
                f"turn {index} is from {first / SAMPLE_RATE_HZ:.2f} to {last / SAMPLE_RATE_HZ:.2f} s, "
                f"the recording has {ingested.duration_s:.2f} s",
            )
        last = min(last, num_samples)
        overlaps = latest is not None and first < latest.last
        cut = CutTurn(turn, first, last, overlap=overlaps or turn.overlap)
        if turn.follows_gap or (latest is not None and first - latest.last > config.max_gap_s * SAMPLE_RATE_HZ):
            conversation.runs.append([])
        if latest is not None and overlaps:
            latest.overlap = True
        if latest is None or last > latest.last:
            latest = cut
        try:
            _check_length(cut, config)
            if float(conversation.clip(cut).abs().max()) < SILENCE_PEAK:
                raise Rejected("silent", "nothing in it is louder than -60 dBFS")
        except Rejected as error:
            conversation.failures.append(Failure.of(recording.source, "encode", error, turn=index, duration_s=cut.duration_s))
            conversation.runs.append([])
            continue
        conversation.runs[-1].append(cut)
    conversation.runs = [run for run in conversation.runs if run]
    return conversation


def _check_length(cut: CutTurn, config: EncodeConfig) -> None:
    if cut.duration_s < config.min_turn_s:
        raise Rejected("short_turn", f"{cut.duration_s:.3f} s, encode.min_turn_s={config.min_turn_s:g}")
    if cut.duration_s > config.max_turn_s:
        raise Rejected("long_turn", f"{cut.duration_s:.1f} s, encode.max_turn_s={config.max_turn_s:g}; split it where its words are known")


def in_phases(conversation: Conversation, num_phases: int) -> Iterator[Conversation]:
    """The conversation, and copies whose turns begin later by parts of a frame: the frames fall differently on the same speech."""
    yield conversation
    for phase in range(1, num_phases):
        shift = phase * SAMPLES_PER_FRAME // num_phases
        runs = [
            [replace(turn, first=turn.first + shift) for turn in run if turn.last - turn.first > 2 * SAMPLES_PER_FRAME]
            for run in conversation.runs
        ]
        yield replace(conversation, runs=[run for run in runs if run], failures=[])


def encode_all(conversations: Iterable[Conversation], codec: Codec) -> Iterator[Conversation]:
    """Give every turn its codes, some `BATCH_S` of audio at a time; the order stays."""
    waiting: list[Conversation] = []
    waiting_s = 0.0
    for conversation in conversations:
        waiting.append(conversation)
        waiting_s += sum(turn.duration_s for turn in conversation.turns)
        if waiting_s >= BATCH_S:
            yield from _encode(waiting, codec)
            waiting, waiting_s = [], 0.0
    yield from _encode(waiting, codec)


def _encode(conversations: Sequence[Conversation], codec: Codec) -> Iterator[Conversation]:
    todo = [(conversation, turn) for conversation in conversations for turn in conversation.turns]
    start = 0
    while start < len(todo):
        stop, batch_s = start, 0.0
        while stop < len(todo) and (stop == start or batch_s + todo[stop][1].duration_s <= BATCH_S):
            batch_s += todo[stop][1].duration_s
            stop += 1
        clips = [conversation.clip(turn) for conversation, turn in todo[start:stop]]
        with torch.inference_mode():
            codes = codec.encode(clips)
        for (_, turn), turn_codes in zip(todo[start:stop], codes, strict=True):
            turn.codes = turn_codes.cpu().numpy().astype(np.int16)
        start = stop
    yield from conversations


def samples_of(conversation: Conversation, tokenizer: TextTokenizer, config: EncodeConfig) -> Iterator[Sample | Failure]:
    """The conversation as samples of at most `max_positions`; turns that no sample can hold, as failures."""
    yield from conversation.failures
    recording = conversation.recording
    last_start_ms = -1
    for piece in _pieces(conversation, tokenizer, config):
        if isinstance(piece, Failure):
            yield piece
            continue
        start_ms = max(piece[0].first * 1000 // SAMPLE_RATE_HZ, last_start_ms + 1)  # overlapping turns may start together
        last_start_ms = start_ms
        yield _sample(f"{recording.digest}-{start_ms}", piece, conversation, config)


def _pieces(conversation: Conversation, tokenizer: TextTokenizer, config: EncodeConfig) -> Iterator[list[CutTurn] | Failure]:
    numbers = {id(turn): index for index, turn in enumerate(conversation.recording.turns)}
    for run in conversation.runs:
        piece: list[CutTurn] = []
        for turn in run:
            try:
                is_fitting = _num_positions([*piece, turn], tokenizer, config) <= config.max_positions
                if not is_fitting and _num_positions([turn], tokenizer, config) > config.max_positions:
                    raise Rejected("long_turn", f"its text and {turn.duration_s:.1f} s are more than encode.max_positions")
            except (Rejected, ValueError) as error:
                why = error if isinstance(error, Rejected) else Rejected("unknown_text", str(error))
                source = conversation.recording.source
                yield Failure.of(source, "encode", why, turn=numbers[id(turn.turn)], duration_s=turn.duration_s)
                if piece:
                    yield piece
                piece = []
                continue
            if is_fitting:
                piece.append(turn)
            else:
                yield piece
                piece = [turn]
        if piece:
            yield piece


def _speakers(piece: Sequence[CutTurn], config: EncodeConfig) -> list[int]:
    if not config.renumber_speakers:
        return [cut.turn.speaker for cut in piece]
    numbers: dict[int, int] = {}
    return [numbers.setdefault(cut.turn.speaker, config.first_speaker + len(numbers)) for cut in piece]


def _num_positions(piece: Sequence[CutTurn], tokenizer: TextTokenizer, config: EncodeConfig) -> int:
    """Text ids, frames and EOS rows.

    Raises:
        ValueError: if the tokenizer cannot write a turn.
    """
    total = 0
    for cut, speaker in zip(piece, _speakers(piece, config), strict=True):
        assert cut.codes is not None
        total += len(tokenizer.encode_turn(speaker, cut.turn.text)) + cut.codes.shape[1] + 1
    return total


def _from(word: dict[str, Any], begin: int) -> dict[str, Any]:
    """A word with its times counted from the sample's first turn."""
    times = {key: round(word[key] - begin / SAMPLE_RATE_HZ, 4) for key in ("start_s", "end_s")}
    return {**word, "word": word["word"].strip(), **times}


def _sample(key: str, piece: Sequence[CutTurn], conversation: Conversation, config: EncodeConfig) -> Sample:
    """One sample; its times begin with its first turn."""
    recording, ingested = conversation.recording, conversation.ingested
    begin = min(cut.first for cut in piece)
    end = max(cut.last for cut in piece)
    turns = []
    first = 0
    for cut, speaker in zip(piece, _speakers(piece, config), strict=True):
        assert cut.codes is not None
        last = first + cut.codes.shape[1]
        turns.append(
            {
                "speaker": speaker,
                "speaker_name": cut.turn.speaker_name,
                "text": cut.turn.text,
                "start_s": round((cut.first - begin) / SAMPLE_RATE_HZ, 6),
                "end_s": round((cut.last - begin) / SAMPLE_RATE_HZ, 6),
                "frames": [first, last],
                "words": [_from(word, begin) for word in cut.turn.words],
                "overlap": cut.overlap,
                "backchannel": cut.turn.backchannel,
                "quality": {"clipping": round(ingested.clipping, 6), **cut.turn.quality},
                "emotion": cut.turn.emotion,
                **({"style": cut.turn.style} if cut.turn.style is not None else {}),
                "learn": {"c0": cut.turn.learn, "depth": cut.turn.learn},
            }
        )
        first = last
    meta = {
        "id": key,
        "source": recording.source,
        "license": recording.license or UNKNOWN,
        "language": recording.language,
        "duration_s": round((end - begin) / SAMPLE_RATE_HZ, 6),
        "turns": turns,
    }
    codes = np.concatenate([cut.codes for cut in piece if cut.codes is not None], axis=1)
    audio = ingested.audio[:, begin:end].mean(axis=0) if config.keep_audio else None
    return Sample(key, meta, codes, audio)
