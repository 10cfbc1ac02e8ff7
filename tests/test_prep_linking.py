"""What needs no models: speakers of windows are linked by voice, words are moved by what a model is early, a host is asked with a bound."""

from __future__ import annotations

import numpy as np

from csm import reachable
from csm.config import DiarizeConfig
from data_prep import pyannote_diarizer
from data_prep.pyannote_diarizer import PyannoteDiarizer
from data_prep.transcribe import snapped
from data_prep.transcript import Segment, Span, Word


def windows_of_voices(windows: list[dict[str, list[float]]]):
    """A stand-in for pyannote's pipeline, whose weights are gated: each window has these voices, a second each."""
    left = iter(windows)

    def pipeline(audio, **_):
        voices = next(left)
        starts = [float(index) for index in range(len(voices))]
        return {"start": starts, "end": [start + 1 for start in starts], "speaker": list(voices)}, voices

    return pipeline


def test_speakers_of_windows_are_linked_by_their_voices(monkeypatch):
    monkeypatch.setattr(pyannote_diarizer, "WINDOW_S", 3)
    anna, bo, cleo = [1.0, 0.1, 0.0], [0.0, 1.0, 0.1], [0.1, 0.0, 1.0]
    windows = [
        {"SPEAKER_00": anna, "SPEAKER_01": bo},
        {"SPEAKER_00": bo, "SPEAKER_01": cleo},  # named anew in every window
        {"SPEAKER_00": cleo, "SPEAKER_01": anna, "SPEAKER_02": [float("nan")] * 3},
    ]
    diarizer = PyannoteDiarizer(DiarizeConfig(), windows_of_voices(windows), "stand-in")
    spans = diarizer.diarize(np.zeros(9 * 16_000, np.float32))
    assert [(span.speaker, span.start_s) for span in spans] == [(0, 0.0), (1, 1.0), (1, 3.0), (2, 4.0), (2, 6.0), (0, 7.0), (3, 8.0)]


def test_no_more_speakers_than_allowed_are_linked(monkeypatch):
    monkeypatch.setattr(pyannote_diarizer, "WINDOW_S", 3)
    diarizer = PyannoteDiarizer(
        DiarizeConfig(max_speakers=1), windows_of_voices([{"SPEAKER_00": [1.0, 0.0]}, {"SPEAKER_00": [0.0, 1.0]}]), "stand-in"
    )
    assert {span.speaker for span in diarizer.diarize(np.zeros(6 * 16_000, np.float32))} == {0}


def test_words_are_moved_by_what_the_model_is_early_and_never_past_their_end():
    words = [Word(" well", 1.0, 1.4, 0.9), Word(" a", 1.4, 1.45, 0.9)]
    moved = snapped(Segment(words, 0.0), [Span(0.5, 3.0)], 5.0, early_s=0.09).words
    assert [(round(word.start_s, 2), word.end_s) for word in moved] == [(1.09, 1.4), (1.41, 1.45)]
    assert snapped(Segment(words, 0.0), [Span(0.5, 3.0)], 5.0).words == words


def test_an_offline_hub_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(reachable.urllib.request, "urlopen", lambda *_, **__: (_ for _ in ()).throw(AssertionError("asked")))
    reachable.can_reach.cache_clear()
    assert not reachable.can_reach("huggingface.co")
    reachable.can_reach.cache_clear()
