"""A summary as tables: for a terminal, and as Markdown to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

COLUMNS = (  # (heading, metric, how it is written)
    ("WER", "wer", "percent"),
    ("Right voice", "voice_accuracy", "percent"),
    ("EOS reached", "eos_rate", "percent"),
    ("Ran away", "runaway_rate", "percent"),
    ("Empty", "empty_rate", "percent"),
    ("Longest", "max_duration_ratio", "ratio"),
    ("Mel distance", "mel_distance", "decibel"),
    ("DNSMOS", "dnsmos", "score"),
    ("DistillMOS", "distillmos", "score"),
)
_MORE_COLUMNS = (
    ("CER", "cer", "percent"),
    ("Outliers", "outlier_rate", "percent"),
    ("Similarity", "voice_similarity", "nats"),
    ("Silent tail", "silence_tail_rate", "percent"),
    ("Words/s", "words_per_s", "score"),
    ("Pauses", "pause_share", "percent"),
    ("Emotion", "emotion_match", "percent"),
)
_TERMINAL_COLUMNS = (  # what fits 80 columns beside WER and its interval
    ("voice", "voice_accuracy", "percent"),
    ("EOS", "eos_rate", "percent"),
    ("ran away", "runaway_rate", "percent"),
    ("longest", "max_duration_ratio", "ratio"),
    ("mel", "mel_distance", "decibel"),
)
SPEECH_MEASURES = (  # of the model on real speech, teacher-forced: (what, metric, how it is written)
    ("Codebook 0, nats a code", "c0_nll", "nats"),
    ("Codebooks 1.., nats a code", "depth_nll", "nats"),
    ("Ends heard as ends", "eos_recall", "percent"),
    ("Frames heard as ends", "false_stop", "percent"),
    ("Ends promised for each real end", "eos_expected", "nats"),
    ("Calibration error of ends", "eos_ece", "nats"),
)
WORD_MEASURES = (
    ("Words of dialogues, by voice (cpWER)", "cpwer_dialogue", "percent"),
    ("Voice similarity, second half of a dialogue less first", "voice_drift_dialogue", "nats"),
    ("Homographs read right", "homograph_accuracy", "percent"),
    ("Words kept to one pronunciation", "pronunciation_consistency", "percent"),
)
CONTEXTS = ("context0", "context1", "context4", "context_max")


def shown(estimate: Mapping | None, style: str) -> str:
    """A value as people read it; a dash where the metric has no meaning."""
    if estimate is None:
        return "–"
    value = estimate["value"]
    return {
        "percent": f"{100 * value:.1f}%",
        "ratio": f"{value:.2f}×",
        "decibel": f"{value:.1f} dB",
        "nats": f"{value:.3f}",
        "score": f"{value:.2f}",
    }[style]


def interval(estimate: Mapping | None, style: str) -> str:
    if estimate is None or estimate["low"] is None:
        return ""
    if style == "percent":
        return f"{100 * estimate['low']:.1f}–{100 * estimate['high']:.1f}"
    places = 3 if style == "nats" else 2
    return f"{estimate['low']:.{places}f}–{estimate['high']:.{places}f}"


def context_rows(summary: Mapping) -> list[tuple[str, list[Mapping | None]]]:
    """(turns of context, [codebook 0, saved, depth, saved]) of what was measured."""
    metrics = summary["metrics"]
    rows = []
    for name in CONTEXTS:
        if f"c0_nll_{name}" in metrics:
            keys = [f"{part}_{what}_{name}" for part in ("c0", "depth") for what in ("nll", "gain")]
            rows.append(("all" if name == "context_max" else name.removeprefix("context"), [metrics.get(key) for key in keys]))
    return rows


def terminal_table(summary: Mapping) -> Table:
    """The rows for a terminal."""
    title = f"{summary['checkpoint']}, split {summary['split']}, seed {summary['seed']}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("WER", "95%", *(short for short, _, _ in _TERMINAL_COLUMNS), "clips"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summary["rows"]:
        wer = summary["metrics"]["wer" + row["suffix"]]
        cells = [shown(summary["metrics"].get(metric + row["suffix"]), style) for _, metric, style in _TERMINAL_COLUMNS]
        table.add_row(row["title"], shown(wer, "percent"), interval(wer, "percent"), *cells, str(wer["n"]))
    return table


def markdown_tables(summary: Mapping) -> str:
    """All of a summary: what was measured, by whom, and what could not be."""
    metrics = summary["metrics"]
    parts = [f"# {summary['checkpoint']}, split {summary['split']}, seed {summary['seed']}", ""]
    columns = [*COLUMNS, *_MORE_COLUMNS]
    body = []
    for row in summary["rows"]:
        cells = [_cell(metrics.get(metric + row["suffix"]), style) for _, metric, style in columns]
        body.append([row["title"], *cells, str(metrics["wer" + row["suffix"]]["n"])])
    parts += ["## Clips", "", *_markdown(["", *(heading for heading, _, _ in columns), "Clips"], body)]
    if "c0_nll" in metrics:
        lines = [
            [what, *(_cell(metrics.get(name + suffix), style) for suffix in ("", "_validation"))] for what, name, style in SPEECH_MEASURES
        ]
        parts += ["## Real speech, teacher-forced", "", *_markdown(["", summary["split"], "validation"], lines)]
    if rows := context_rows(summary):
        lines = [[name, *(_cell(estimate, "nats") for estimate in estimates)] for name, estimates in rows]
        parts += ["## What context is worth, nats a code", ""]
        parts += _markdown(["Turns of context", "Codebook 0", "saved", "Codebooks 1..", "saved"], lines)
    if lines := [[what, _cell(metrics[name], style)] for what, name, style in WORD_MEASURES if name in metrics]:
        parts += ["## Conversations and words", "", *_markdown(["", ""], lines)]
    if summary["by_turn"]:
        turns = len(next(iter(summary["by_turn"].values())))
        lines = [[name, *(f"{value:.3f}" for value in values)] for name, values in summary["by_turn"].items()]
        parts += ["## By turn of a dialogue", "", *_markdown(["", *(str(turn + 1) for turn in range(turns))], lines)]
    if summary["unavailable"]:
        parts += ["## Not measured here", "", *(f"- {name}: {reason}" for name, reason in summary["unavailable"].items()), ""]
    parts += ["## Measured by", ""]
    for name, evaluator in summary["evaluators"].items():
        what = evaluator if isinstance(evaluator, str) else ", ".join(str(value) for value in evaluator.values() if value)
        parts.append(f"- {name}: {what}")
    return "\n".join([*parts, ""])


def _cell(estimate: Mapping | None, style: str) -> str:
    between = interval(estimate, style)
    return shown(estimate, style) + (f" ({between})" if between else "")


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    kept = [i for i in range(len(header)) if i == 0 or any(line[i] != "–" for line in lines)]  # a column of dashes says nothing
    rows = [[line[i] for i in kept] for line in [header, *lines]]
    rule = "|" + "---|" * len(kept)
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return [first, rule, *others, ""]
