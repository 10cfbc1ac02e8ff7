"""The page is whole in itself, marks what was misheard, and charts cope with gaps."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.evaluation.judging import Verdict, plan_rows
from csm.evaluation.plots import Series, bar_chart, line_chart, nice_ticks
from csm.evaluation.report import _choose, _transcript, audio_uri, loss_curves, spectrogram_uri


def verdict(hypothesis: str = "seven four two", *, key: str = "a-0", substitutions: int = 0, voice: str = "bass") -> Verdict:
    return Verdict(
        key=key,
        row="model",
        suite="single",
        temperature=0.0,
        seed=1,
        num_dropped_turns=0,
        speaker=0,
        voice=voice,
        text="seven four two",
        hypothesis=hypothesis,
        hits=3 - substitutions,
        substitutions=substitutions,
        deletions=0,
        insertions=0,
        voice_guess=voice,
        voice_similarity=0.9,
        duration_s=1.0,
        reference_s=1.0,
        duration_ratio=1.0,
        reached_eos=True,
        is_runaway=False,
        is_empty=False,
        silence_tail_s=0.0,
        mel_distance=3.0,
        wav="",
    )


def test_rows_start_with_the_ceiling_and_name_the_first_temperature_plainly() -> None:
    rows = plan_rows([0.0, 0.5], context=True, has_audio=True)
    assert [row.suffix for row in rows] == ["_ground_truth", "_resynthesis", "", "_t0.5", "_context", "_context_t0.5"]
    assert [row.name for row in rows[2:]] == ["model", "model_t0.5", "model_context", "model_context_t0.5"]
    assert [row.suffix for row in plan_rows([0.9], context=False, has_audio=False)] == ["_resynthesis", ""]


def test_misheard_words_are_marked_and_escaped() -> None:
    assert _transcript(verdict()) == "seven four two"
    assert _transcript(verdict("seven for two")) == 'seven <mark title="expected: four">for</mark> two'
    assert _transcript(verdict("seven four two you")) == 'seven four two <ins title="not in the text">you</ins>'
    assert _transcript(verdict("seven two")) == 'seven <del title="not heard">four</del> two'
    assert "<script>" not in _transcript(verdict("<script>alert(1)</script>"))
    assert "nothing heard" in _transcript(verdict(""))


def test_the_worst_lines_are_among_those_shown() -> None:
    by_key = {f"{i:02d}-0": [verdict(key=f"{i:02d}-0", substitutions=3 if i == 17 else 0, voice="ab"[i % 2])] for i in range(40)}
    chosen = _choose(by_key, 8)
    assert len(chosen) == 8 and "17-0" in chosen
    assert chosen == sorted(chosen)
    assert {by_key[key][0].voice for key in chosen} == {"a", "b"}


def test_clips_become_sound_and_pictures_that_open() -> None:
    audio = (0.3 * np.sin(np.arange(24_000) / 10)).astype(np.float32)
    sound, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(audio_uri(audio).split(",")[1])))
    assert rate_hz == 24_000 and abs(len(sound) - 24_000) < 4_000
    picture = base64.b64decode(spectrogram_uri(audio).split(",")[1])
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture[16:24] == (101).to_bytes(4, "big") + (80).to_bytes(4, "big")
    assert len(picture) < 10_000
    assert audio_uri(audio[:0]) == spectrogram_uri(audio[:0]) == ""


def test_loss_curves_skip_empty_cells_and_keep_the_last_of_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,train/loss,train/c0,train/depth,val/c0,val/depth\n10,9,5,4,,\n20,8,4,4,,\n20,8,3,4,4.5,\n", encoding="utf-8")
    curves = {curve.name: list(curve.points) for curve in loss_curves(path)}
    assert curves["codebook 0, training"] == [(10, 5), (20, 3)]
    assert curves["codebook 0, validation"] == [(20, 4.5)]
    assert "depth, validation" not in curves


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.013), (0.7, 5.9), (0.0, 12_345.0), (3.0, 3.0)])
def test_ticks_are_round_and_span_the_values(low: float, high: float) -> None:
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 8


def test_charts_draw_one_mark_a_value_and_escape_names() -> None:
    bars = bar_chart(["a", "b"], [Series("<x>", "red", [(0, 0.0), (1, 0.5)])], x_label="x", y_label="y", percent=True)
    assert bars.count("<rect") == 2 and "<x>" not in bars and "50.0%" in bars
    lines = line_chart([Series("one point", "red", [(5.0, 1.0)], is_dashed=True)], x_label="step", y_label="nats")
    assert lines.count("<circle") == 1 and "nan" not in lines
