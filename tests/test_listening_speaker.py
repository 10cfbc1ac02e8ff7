"""The speaker encoder and the nearest voice, on the corpus's own voices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from csm.listening.speaker import SpeakerEncoder, VoiceBook, window_starts

TEXTS = ("one six zero", "four nine two", "three eight seven five", "zero five one", "two two nine six", "seven four eight one six")


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return SpeakerEncoder()


@pytest.fixture(scope="module")
def clips() -> list[tuple[str, str, np.ndarray]]:
    """(voice, text, 24 kHz samples): every voice of the offline corpus says every text."""
    from data_prep.script import VOICES
    from data_prep.synthesis import Synthesizer, random_for

    synthesizer = Synthesizer()
    return [
        (voice.name, text, synthesizer.speak(text, voice, random_for(0, "test", voice.name, text)).astype(np.float32) / 32768)
        for voice in VOICES
        for text in TEXTS
    ]


@pytest.fixture(scope="module")
def references(encoder: SpeakerEncoder, clips: list[tuple[str, str, np.ndarray]]) -> list[tuple[str, str, np.ndarray]]:
    embedded = [(voice, text, encoder.embed(audio)) for voice, text, audio in clips]
    return [(voice, text, embedding) for voice, text, embedding in embedded if embedding is not None]


def accuracy(book: VoiceBook, references: list[tuple[str, str, np.ndarray]]) -> float:
    right = 0
    for voice, text, embedding in references:
        similarities = book.similarities(embedding, text)
        right += max(similarities, key=lambda name: similarities[name]) == voice
    return right / len(references)


def test_the_same_clip_has_similarity_one(encoder: SpeakerEncoder, clips: list) -> None:
    audio = clips[0][2]
    one, other = encoder.embed(audio), encoder.embed(audio.copy())
    assert one is not None and other is not None
    assert float(one @ other) == pytest.approx(1, abs=1e-6)
    quiet = encoder.embed(audio * 0.1)
    assert quiet is not None and float(one @ quiet) > 0.999  # the level says nothing about a voice


def test_the_corpus_voices_are_told_apart(references: list) -> None:
    assert accuracy(VoiceBook(references), references) >= 23 / 24


def test_swapped_voices_score_low(references: list) -> None:
    names = list(dict.fromkeys(voice for voice, _, _ in references))
    swapped = [(names[(names.index(voice) + 1) % len(names)], text, vector) for voice, text, vector in references]
    assert accuracy(VoiceBook(swapped), references) <= 0.1


def test_a_clip_is_not_judged_by_its_own_text() -> None:
    axes = np.eye(3, dtype=np.float32)
    book = VoiceBook([("a", "one", axes[0]), ("a", "two", axes[1]), ("b", "one", axes[2]), ("b", "two", axes[2])])
    assert book.similarities(axes[0], "one")["a"] == 0  # what matches is the reference that says the same
    assert book.similarities(axes[0], "two")["a"] == 1


def test_voices_need_two_names_and_two_texts() -> None:
    vector = np.ones(2, np.float32)
    with pytest.raises(ValueError, match="at least two"):
        VoiceBook([("a", "one", vector)])
    with pytest.raises(ValueError, match="two texts"):
        VoiceBook([("a", "one", vector), ("b", "one", vector)]).similarities(vector, "one")


def test_nothing_to_hear_has_no_voice(encoder: SpeakerEncoder) -> None:
    assert encoder.embed(np.zeros(24_000, np.float32)) is None
    assert encoder.embed(np.zeros(0, np.float32)) is None


def test_windows_are_those_of_resemblyzer() -> None:
    # Its VoiceEncoder.compute_partial_slices(n, rate=1.3, min_coverage=0.75): the first frame of each slice.
    assert window_starts(16_000) == [0]
    assert window_starts(38_400) == [0, 77]
    assert window_starts(64_000) == [0, 77, 154, 231]


def test_other_weights_are_refused(tmp_path: Path) -> None:
    fake = tmp_path / "pretrained.pt"
    fake.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="install Resemblyzer==0.1.4"):
        SpeakerEncoder(fake)
