"""Sesame's two measures of reading in context: homographs told apart, and one way of saying a word kept to.

Source: Sesame, "Crossing the uncanny valley of conversational voice" (2025), homograph disambiguation and pronunciation
consistency; word lists, sentences and the judge are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from csm.evaluation.dialogue import Dialogue, speak_dialogues
from csm.evaluation.metrics import Estimate, mean_estimate
from csm.evaluation.suites import DIALOGUE, Utterance
from csm.generation.generator import GeneratedCodes, Generator
from csm.listening.phonemes import PhonemeRecogniser, nearest_pronunciation

HOMOGRAPHS, CONSISTENCY = "homographs", "pronunciation"
_MAX_DURATION_S = 8.0
_WORDS = Path(__file__).with_name("words.yaml")


@dataclass(frozen=True)
class Script:
    """A word in a few sentences.

    Attributes:
        expected: index of the right one of `candidates`; None where any will do that is kept to.
    """

    suite: str
    word: str
    texts: list[str]
    candidates: list[list[str]]
    expected: int | None


def read_scripts(suite: str) -> list[Script]:
    """The scripts of a suite, in the order of words.yaml."""
    words = yaml.safe_load(_WORDS.read_text(encoding="utf-8"))
    if suite == HOMOGRAPHS:
        return [Script(suite, w["word"], [w["text"]], [w["is"].split(), w["not"].split()], 0) for w in words["homographs"]]
    return [Script(suite, w["word"], w["texts"], [way.split() for way in w["says"]], None) for w in words["variants"]]


def why_not_speakable(generator: Generator, scripts: Sequence[Script]) -> str | None:
    """Why the checkpoint cannot say them, from its own tokenizer; None if it can."""
    for script in scripts:
        for text in script.texts:
            try:
                generator.tokenizer.encode_turn(0, text)
            except ValueError as error:
                return f"the checkpoint's tokenizer cannot say {text!r}: {error}"
    return None


def measure(
    generator: Generator,
    recogniser: PhonemeRecogniser,
    suite: str,
    *,
    temperature: float,
    top_k: int,
    batch_size: int,
    seed: int,
    keep: Callable[[str, np.ndarray], None],
) -> tuple[Estimate, list[dict[str, object]]]:
    """Speak a suite, sentence after sentence of a word in one conversation, and judge it.

    Args:
        keep: is given each clip by name.
    Returns:
        The share of right homographs, or of words kept to one way; and a record a word. A word of which no sentence could be told
        counts as wrong.
    """
    scripts = read_scripts(suite)
    empty = np.zeros(0, np.float32)
    dialogues = [_dialogue(f"{suite}-{index:02d}", script, empty) for index, script in enumerate(scripts)]
    heard: dict[str, list[tuple[list[str], int | None]]] = {dialogue.name: [] for dialogue in dialogues}
    by_name = {dialogue.name: script for dialogue, script in zip(dialogues, scripts, strict=True)}

    def on_turn(turn: Utterance, said: GeneratedCodes) -> None:
        name = turn.key.rsplit("-", 1)[0]
        audio = generator.audio_from_codes(said.codes).numpy()
        keep(turn.key, audio)
        phonemes = recogniser.transcribe(audio)
        heard[name].append((phonemes, nearest_pronunciation(phonemes, by_name[name].candidates)))

    settings = dict(temperature=temperature, top_k=top_k, batch_size=batch_size, seed=seed)
    speak_dialogues(generator, dialogues, max_duration_s=_MAX_DURATION_S, on_turn=on_turn, **settings)  # type: ignore[arg-type]
    records, right = [], []
    for name, script in by_name.items():
        ways = [way for _, way in heard[name]]
        is_right = None not in ways and len(set(ways)) == 1 and script.expected in (None, ways[0])
        right.append(float(is_right))
        records.append({"suite": suite, "word": script.word, "texts": script.texts, "right": is_right, "ways": ways,
                        "phonemes": [" ".join(phonemes) for phonemes, _ in heard[name]]})  # fmt: skip
    return mean_estimate(right, seed=seed, name=suite), records


def _dialogue(name: str, script: Script, empty: np.ndarray) -> Dialogue:
    import torch

    codes = torch.zeros(0, 0, dtype=torch.int64)
    turns = [Utterance(f"{name}-{i:02d}", DIALOGUE, 0, "0", text, codes, empty) for i, text in enumerate(script.texts)]
    return Dialogue(name, turns)
