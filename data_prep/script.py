"""The script of the offline corpus: which strings, and who says what in which conversation, drawn from the seed alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from csm.config import PrepConfig
from data_prep.synthesis import Voice, random_for

# Speakers 0-3. Chosen by measurement: what a speaker encoder still tells apart after the codec, which keeps no harmonics of
# low voices (the synthesiser's own pitch, 1.0, is heard as a lower voice after it; 0.8 is not).
VOICES = (Voice("tenor", 0.8, 1.0), Voice("bass", 0.5, 0.83), Voice("piper", 1.4, 1.2), Voice("contralto", 1.45, 0.88))
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CARRIERS = ("please say {}", "what is the number", "the number is {}", "you said {}", "thank you")
LENGTH_SHARES = {1: 0.10, 2: 0.15, 3: 0.25, 4: 0.25, 5: 0.25}  # of training strings; held-out ones have 3 to 5 digits
FORM_SHARES = {"plain": 0.60, "series": 0.12, "asked": 0.10, "number": 0.06, "brief": 0.04, "echo": 0.08}
CLOSER_SHARE = 0.25  # of the asked forms, ended by a thank you
VOICES_PER_STRING = 3  # renditions of a training string; the voice left out rotates
VALIDATION_SHARE = 0.02  # strings of validation for one of training
SPLITS = ("train", "validation", "heldout")


@dataclass(frozen=True)
class PlannedTurn:
    speaker: int
    text: str


Conversation = tuple[PlannedTurn, ...]


@dataclass
class Plan:
    """Who says what, in order, by split; and the strings that training never has."""

    conversations: dict[str, list[Conversation]]
    heldout_strings: list[str]
    validation_strings: list[str]


def spoken(digits: str) -> str:
    """A digit string in words: "742" -> "seven four two"."""
    return " ".join(DIGITS[int(digit)] for digit in digits)


def vocabulary() -> list[str]:
    """Every word of the corpus."""
    return sorted({*DIGITS, *(word for carrier in CARRIERS for word in carrier.replace("{}", "").split())})


def make_plan(config: PrepConfig) -> Plan:
    """Draw strings and conversations from the seed.

    Held-out, validation and training strings are disjoint, and no held-out or validation string occurs inside another
    string of any split, so no training turn contains one.
    """
    if not 1 <= config.num_heldout_strings <= 200:
        raise ValueError(f"num_heldout_strings={config.num_heldout_strings}: expected 1 to 200, so that training strings can avoid them")
    if config.num_train_strings < 1:
        raise ValueError(f"num_train_strings={config.num_train_strings}: expected 1 or more")
    seed = config.seed
    num_validation = min(200, max(2, round(config.num_train_strings * VALIDATION_SHARE)))
    heldout = _draw_reserved(seed, "heldout", config.num_heldout_strings, [])
    validation = _draw_reserved(seed, "validation", num_validation, heldout)
    train = _draw_training(seed, config.num_train_strings, [*heldout, *validation])
    speakers = range(len(VOICES))
    pairs = {
        "train": [(s, v) for i, s in enumerate(train) for v in speakers if v != i % len(VOICES) or len(VOICES) == VOICES_PER_STRING],
        "validation": [(s, v) for s in validation for v in speakers],
    }
    conversations: dict[str, list[Conversation]] = {}
    for split, split_pairs in pairs.items():
        strings = [digits for digits, _ in split_pairs]
        conversations[split] = [
            _converse(random_for(seed, f"{split}-conversation", index), speaker, digits, strings)
            for index, (digits, speaker) in enumerate(split_pairs)
        ]
        order = random_for(seed, f"{split}-order").permutation(len(split_pairs))  # neighbours in a shard are strangers
        conversations[split] = [conversations[split][i] for i in order]
    alone = [(PlannedTurn(v, spoken(s)),) for s in heldout for v in speakers]
    conversations["heldout"] = alone + [_heldout_answer(i, v, s) for i, s in enumerate(heldout) for v in speakers]
    return Plan(conversations, heldout, validation)


def _draw_reserved(seed: int, purpose: str, count: int, taken: Sequence[str]) -> list[str]:
    """Strings of 3, 4 and 5 digits in turn, none inside another or inside one of `taken`."""
    generator = random_for(seed, f"{purpose}-strings")
    strings: list[str] = []
    while len(strings) < count:
        candidate = _digits(generator, 3 + len(strings) % 3)
        if not any(candidate in other or other in candidate for other in (*taken, *strings)):
            strings.append(candidate)
    return strings


def _draw_training(seed: int, count: int, reserved: Sequence[str]) -> list[str]:
    """Strings of 1 to 5 digits, repeats allowed, with none of `reserved` inside."""
    generator = random_for(seed, "train-strings")
    lengths, shares = list(LENGTH_SHARES), list(LENGTH_SHARES.values())
    strings: list[str] = []
    while len(strings) < count:
        candidate = _digits(generator, int(generator.choice(lengths, p=shares)))
        if not any(other in candidate for other in reserved):
            strings.append(candidate)
    return strings


def _digits(generator: np.random.Generator, length: int) -> str:
    return "".join(map(str, generator.integers(0, 10, length)))


def _converse(generator: np.random.Generator, speaker: int, digits: str, strings: Sequence[str]) -> Conversation:
    """A conversation in which `speaker` says `digits`, in a form drawn by FORM_SHARES; the other voice is drawn too."""
    form = str(generator.choice(list(FORM_SHARES), p=list(FORM_SHARES.values())))
    other = (speaker + int(generator.integers(1, len(VOICES)))) % len(VOICES)
    text = spoken(digits)
    if form == "plain":
        return (PlannedTurn(speaker, text),)
    if form == "series":
        others = [spoken(strings[int(i)]) for i in generator.integers(0, len(strings), int(generator.integers(1, 3)))]
        return (PlannedTurn(other, others[0]), PlannedTurn(speaker, text), *(PlannedTurn(other, t) for t in others[1:]))
    question, answer = {
        "asked": (f"please say {text}", text),
        "number": ("what is the number", f"the number is {text}"),
        "brief": ("what is the number", text),
        "echo": (text, f"you said {text}"),
    }[form]
    turns = (PlannedTurn(other, question), PlannedTurn(speaker, answer))
    is_thanked = form != "echo" and generator.random() < CLOSER_SHARE
    return (*turns, PlannedTurn(other, "thank you")) if is_thanked else turns


def _heldout_answer(string_index: int, speaker: int, digits: str) -> Conversation:
    """A held-out string as the answer to a question in another voice; the two questions and the three others take turns."""
    other = (speaker + 1 + string_index % (len(VOICES) - 1)) % len(VOICES)
    text = spoken(digits)
    if (string_index + speaker) % 2 == 0:
        return (PlannedTurn(other, f"please say {text}"), PlannedTurn(speaker, text))
    return (PlannedTurn(other, "what is the number"), PlannedTurn(speaker, f"the number is {text}"))
