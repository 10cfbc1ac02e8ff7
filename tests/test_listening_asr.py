"""The recogniser is a real Whisper; it reads the offline corpus's voices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from csm.config import EvaluateConfig
from csm.evaluation.metrics import count_word_errors
from csm.listening.asr import Recogniser

TEXTS = ("seven four two", "nine one zero", "three eight six five")


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    from data_prep.script import VOICES
    from data_prep.synthesis import Synthesizer, random_for

    synthesizer = Synthesizer()
    return [
        synthesizer.speak(text, VOICES[index], random_for(0, "asr-test", text)).astype(np.float32) / 32768
        for index, text in enumerate(TEXTS)
    ]


def test_whisper_reads_digits_and_two_workers_read_the_same(clips: list[np.ndarray]) -> None:
    recogniser = Recogniser(prompt=EvaluateConfig(run="-").asr_prompt, num_workers=2)
    alone = [recogniser.transcribe(clip) for clip in clips]
    assert [count_word_errors(text, heard).errors for text, heard in zip(TEXTS, alone, strict=True)] == [0, 0, 0]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(recogniser.transcribe, clips)) == alone
    described = recogniser.describe()
    assert described["sha256"] and len(described["sha256"]) == 64
    assert "/" not in str(described["name"])  # no path of this machine
