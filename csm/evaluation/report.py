"""The report: one page with the tables, clips to listen to, and charts, everything inside."""

from __future__ import annotations

import base64
import csv
import io
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import soundfile
from jinja2 import Environment
from torch import Tensor

from csm.evaluation.compare import EvaluatedRun, differences
from csm.evaluation.judging import GROUND_TRUTH, MODEL, Row, Verdict
from csm.evaluation.metrics import align_words
from csm.evaluation.plots import Series, bar_chart, line_chart
from csm.evaluation.suites import CONTEXT, DIALOGUE, SINGLE, Utterance, evenly_spaced
from csm.evaluation.tables import COLUMNS, SPEECH_MEASURES, WORD_MEASURES, context_rows, interval, shown
from csm.frames import SAMPLE_RATE_HZ
from csm.listening.acoustics import log_mel_db
from csm.whole_files import write_text

NUM_CARDS = {SINGLE: 16, CONTEXT: 8}  # utterances that can be heard; with four to six clips each, about 3 MB
NUM_DIALOGUES = 3
THIS_RUN = "this run"
_WORST_SHARE = 0.25  # of the cards go to the lines with most errors, the others are spread evenly
_SPECTROGRAM_HOP = 240  # 10 ms a pixel
_SPECTROGRAM_RANGE_DB = 70.0
_PALETTE_ANCHORS = (
    (8, 6, 15),
    (49, 20, 92),
    (120, 34, 114),
    (190, 60, 90),
    (240, 117, 62),
    (253, 190, 94),
    (252, 250, 205),
)  # dark to light
_REFERENCE_COLORS = {"_ground_truth": "var(--c-truth)", "_resynthesis": "var(--c-codec)"}


@dataclass(frozen=True)
class Player:
    """One clip on a card; `run` tells whose it is, "" where it is nobody's: real speech."""

    title: str
    color: str
    transcript: str  # HTML
    notes: list[str]
    audio: str  # data URI
    spectrogram: str  # data URI
    run: str = ""


@dataclass(frozen=True)
class Card:
    """One line to speak, with every voice that spoke it; or a dialogue, with its turns."""

    text: str
    voice: str
    suite: str
    has_errors: bool
    players: list[Player]


def write_report(
    path: Path,
    summary: Mapping,
    speed: Mapping | None,
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    utterances: Mapping[str, Utterance],
    decode: Callable[[Tensor], np.ndarray],
    history: Path | None,
    others: Sequence[EvaluatedRun] = (),
) -> None:
    """Write the page.

    Args:
        summary: as in summary.json; `speed` as in speed.json.
        verdicts: of all rows; their clips lie below `path`'s folder.
        utterances: by key.
        decode: codes [K, F] to samples, for the turns that come before an answer.
        history: metrics.csv of the run, None when there is none.
        others: runs to set beside it.
    Raises:
        ValueError: if another run was evaluated on other data.
    """
    colors = {row.name: color for row, color in zip(rows, _row_colors(rows), strict=True)}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        summary=summary,
        metrics=summary["metrics"],
        columns=[column for column in COLUMNS if any(column[1] + row.suffix in summary["metrics"] for row in rows)],
        shown=shown,
        interval=interval,
        speech_measures=SPEECH_MEASURES,
        word_measures=[measure for measure in WORD_MEASURES if measure[1] in summary["metrics"]],
        context_rows=context_rows(summary),
        speed=speed,
        comparisons=[(other, differences(summary, verdicts, other, seed=summary["seed"])) for other in others],
        runs=[THIS_RUN, *(other.name for other in others)],
        rows=[(row, colors[row.name]) for row in rows],
        cards=[
            *_cards(rows, verdicts, utterances, decode, path.parent, colors, others),
            *_dialogue_cards(rows, verdicts, path.parent, colors, others),
        ],
        charts=_charts(summary, rows, verdicts, history, colors),
        voices=sorted({verdict.voice for verdict in verdicts}),
    )
    write_text(path, page)


def _row_colors(rows: Sequence[Row]) -> list[str]:
    colors, count = [], 0
    for row in rows:
        if row.suffix in _REFERENCE_COLORS:
            colors.append(_REFERENCE_COLORS[row.suffix])
        else:
            colors.append(f"var(--c-{count % 4})")
            count += 1
    return colors


def _cards(
    rows: Sequence[Row],
    verdicts: Sequence[Verdict],
    utterances: Mapping[str, Utterance],
    decode: Callable[[Tensor], np.ndarray],
    folder: Path,
    colors: Mapping[str, str],
    others: Sequence[EvaluatedRun],
) -> list[Card]:
    titles = {row.name: row.title for row in rows}
    cards = []
    for suite, count in NUM_CARDS.items():
        by_key: dict[str, list[Verdict]] = {}
        for verdict in verdicts:
            if verdict.suite == suite:
                by_key.setdefault(verdict.key, []).append(verdict)
        for key in _choose(by_key, count):
            utterance, spoken = utterances[key], by_key[key]
            players = []
            for turn in utterance.context:
                assert turn.codes is not None
                players.append(_player(f"Before: speaker {turn.speaker}", "var(--c-codec)", escape(turn.text), [], decode(turn.codes)))
            if suite == CONTEXT and utterance.audio is not None:
                title = titles.get(GROUND_TRUTH, "Ground truth")
                players.append(_player(title, _REFERENCE_COLORS["_ground_truth"], escape(utterance.text), [], utterance.audio))
            for verdict in spoken:
                run = THIS_RUN if verdict.row.startswith(MODEL) else ""
                players.append(_spoken(titles[verdict.row], colors[verdict.row], verdict, folder, run))
            players += _of_others(spoken, titles, others)
            has_errors = any(_num_faults(verdict) for verdict in spoken)
            cards.append(Card(utterance.text, utterance.voice, suite, has_errors, players))
    return cards


def _dialogue_cards(
    rows: Sequence[Row], verdicts: Sequence[Verdict], folder: Path, colors: Mapping[str, str], others: Sequence[EvaluatedRun]
) -> list[Card]:
    """A card a dialogue, its turns in order, then those of the other runs."""
    color = next((colors[row.name] for row in rows if row.suite == DIALOGUE), "")
    by_name: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.suite == DIALOGUE:
            by_name.setdefault(verdict.key.rsplit("-", 1)[0], []).append(verdict)
    cards = []
    for turns in evenly_spaced(list(by_name.values()), NUM_DIALOGUES):
        voices = list(dict.fromkeys(verdict.voice for verdict in turns))
        players = [_spoken(f"Turn {i + 1}: {v.voice}", color, v, folder, THIS_RUN) for i, v in enumerate(turns)]
        players += _of_others(turns, {verdict.row: f"Turn {i + 1}" for i, verdict in enumerate(turns)}, others)
        cards.append(Card(f"A dialogue of {' and '.join(voices)}", voices[0], DIALOGUE, any(map(_num_faults, turns)), players))
    return cards


def _spoken(title: str, color: str, verdict: Verdict, folder: Path, run: str) -> Player:
    audio = soundfile.read(folder / verdict.wav, dtype="float32")[0] if verdict.wav else np.zeros(0, np.float32)
    return _player(title, color, _transcript(verdict), _notes(verdict), audio, run)


def _of_others(spoken: Sequence[Verdict], titles: Mapping[str, str], others: Sequence[EvaluatedRun]) -> list[Player]:
    """The same lines by the other runs."""
    players = []
    for index, other in enumerate(others):
        for verdict in spoken:
            same = other.verdicts.get((verdict.row, verdict.key)) if verdict.row.startswith(MODEL) else None
            if same is not None and same.text == verdict.text:
                players.append(
                    _spoken(f"{other.name}: {titles[verdict.row]}", f"var(--c-{(index + 2) % 4})", same, other.folder, other.name)
                )
    return players


def _choose(by_key: Mapping[str, list[Verdict]], count: int) -> list[str]:
    """The lines to show: the worst ones, and others spread evenly over voices and strings; in the suite's order."""
    keys = list(by_key)
    faults = {key: sum(_num_faults(verdict) for verdict in by_key[key]) for key in keys}
    worst = [key for key in sorted(keys, key=lambda key: (-faults[key], key)) if faults[key]][: round(count * _WORST_SHARE)]
    others = sorted((key for key in keys if key not in worst), key=lambda key: (by_key[key][0].voice, key))
    chosen = {*worst, *evenly_spaced(others, count - len(worst))}
    return [key for key in keys if key in chosen]


def _num_faults(verdict: Verdict) -> int:
    return verdict.word_errors.errors + (verdict.voice_guess != verdict.voice) + verdict.is_runaway


def _transcript(verdict: Verdict) -> str:
    """What was heard, as HTML, with every word that differs marked."""
    if not verdict.hypothesis:
        return "<em>nothing heard</em>"
    parts = []
    for kind, expected, heard in align_words(verdict.text, verdict.hypothesis):
        if kind == "equal":
            parts.append(escape(heard))
        elif kind == "insert":
            parts.append(f'<ins title="not in the text">{escape(heard)}</ins>')
        elif kind == "delete":
            parts.append(f'<del title="not heard">{escape(expected)}</del>')
        else:
            parts.append(f'<mark title="expected: {escape(expected)}">{escape(heard)}</mark>')
    return " ".join(parts)


def _notes(verdict: Verdict) -> list[str]:
    notes = []
    if verdict.voice_guess not in (None, verdict.voice):
        notes.append(f"sounds like {verdict.voice_guess}")
    if verdict.is_runaway:
        notes.append("ran away" if verdict.reached_eos else "no EOS")
    return notes


def _player(title: str, color: str, transcript: str, notes: list[str], audio: np.ndarray, run: str = "") -> Player:
    notes = [f"{len(audio) / SAMPLE_RATE_HZ:.1f} s", *notes]
    return Player(title, color, transcript, notes, audio_uri(audio), spectrogram_uri(audio), run)


def audio_uri(audio: np.ndarray) -> str:
    """24 kHz samples as an MP3 data URI, the one small format that every browser plays; "" for no samples."""
    if not len(audio):
        return ""
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(audio, -1, 1), SAMPLE_RATE_HZ, format="MP3", bitrate_mode="CONSTANT", compression_level=0.8)
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def spectrogram_uri(audio: np.ndarray) -> str:
    """An 80-mel spectrogram as a PNG data URI, 10 ms and one mel a pixel; "" for no samples."""
    if not len(audio):
        return ""
    level = log_mel_db(audio, hop=_SPECTROGRAM_HOP).T[::-1]  # [80, frames], low frequencies at the bottom
    shade = np.clip((level - level.max() + _SPECTROGRAM_RANGE_DB) / _SPECTROGRAM_RANGE_DB * 63, 0, 63).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(_palette_png(shade, _palette(64))).decode()


def _palette(num_colors: int) -> np.ndarray:
    """Colours between the anchors, uint8 [num_colors, 3]."""
    at = np.linspace(0, 1, num_colors)
    anchors_at = np.linspace(0, 1, len(_PALETTE_ANCHORS))
    return np.stack([np.interp(at, anchors_at, channel) for channel in np.array(_PALETTE_ANCHORS).T], axis=1).astype(np.uint8)


def _palette_png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG of palette indexes, uint8 [height, width]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)  # 8 bits, palette, not interlaced
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels], axis=1).tobytes()  # each line: filter 0, then its pixels
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", palette.tobytes()), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _charts(
    summary: Mapping, rows: Sequence[Row], verdicts: Sequence[Verdict], history: Path | None, colors: Mapping[str, str]
) -> list[tuple[str, str, list[tuple[str, str, bool]]]]:
    """(title, SVG, legend) of each chart; a legend entry is (name, color, whether dashed)."""
    charts = []
    curves = loss_curves(history) if history is not None else []
    if curves:
        legend = [(curve.name, curve.color, curve.is_dashed) for curve in curves]
        charts.append(("Loss while training", line_chart(curves, x_label="step", y_label="nats"), legend))
    splits = summary["codebook_nll"]
    if splits:
        bars = [Series(name, f"var(--c-{index})", list(enumerate(values))) for index, (name, values) in enumerate(splits.items())]
        categories = [str(index) for index in range(len(bars[0].points))]
        svg = bar_chart(categories, bars, x_label="codebook", y_label="nats")
        charts.append(("Loss by codebook, teacher-forced", svg, [(bar.name, bar.color, False) for bar in bars]))
    if curves_by_turn := summary["by_turn"]:
        names = {"voice_similarity": "similarity to the own voice", "voice_accuracy": "right voice", "wer": "word error rate"}
        lines = [
            Series(names[name], f"var(--c-{index})", [(turn + 1.0, value) for turn, value in enumerate(curves_by_turn[name])])
            for index, name in enumerate(names)
        ]
        svg = line_chart(lines, x_label="turn of a dialogue", y_label="share, cosine")
        charts.append(("Through a dialogue", svg, [(line.name, line.color, line.is_dashed) for line in lines]))
    legend = [(row.title, colors[row.name], False) for row in rows]
    for title, label, group_of in (
        ("Word error rate by voice", "voice", lambda verdict: verdict.voice),
        ("Word error rate by length", "words in the line", lambda verdict: verdict.word_errors.num_words),
    ):
        groups = sorted({group_of(verdict) for verdict in verdicts})
        series = [Series(row.title, colors[row.name], _wer_by_group(verdicts, row, group_of, groups)) for row in rows]
        svg = bar_chart([str(group) for group in groups], series, x_label=label, y_label="word error rate", percent=True)
        charts.append((title, svg, legend))
    return charts


def _wer_by_group(
    verdicts: Sequence[Verdict], row: Row, group_of: Callable[[Verdict], object], groups: Sequence[object]
) -> list[tuple[float, float]]:
    """(index of the group, word error rate) of the groups that a row has clips in."""
    points: list[tuple[float, float]] = []
    for index, group in enumerate(groups):
        counts = [verdict.word_errors for verdict in verdicts if verdict.row == row.name and group_of(verdict) == group]
        if counts:
            points.append((index, sum(count.errors for count in counts) / sum(count.num_words for count in counts)))
    return points


def loss_curves(path: Path) -> list[Series]:
    """Training and validation losses of a run's metrics.csv; cells may be empty, and a resumed run may repeat a step."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    curves = []
    for index, name in enumerate(("c0", "depth")):
        for prefix, is_dashed in (("train", False), ("val", True)):
            cells = {float(line["step"]): line.get(f"{prefix}/{name}") for line in lines}
            points = [(step, float(cell)) for step, cell in sorted(cells.items()) if cell]
            if points:
                label = f"{'codebook 0' if name == 'c0' else 'depth'}, {'training' if prefix == 'train' else 'validation'}"
                curves.append(Series(label, f"var(--c-{index})", points, is_dashed))
    return curves
