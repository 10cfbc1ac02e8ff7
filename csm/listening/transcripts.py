"""What a recogniser writes, as the words that were said."""

from __future__ import annotations

import re

_DIGITS = "zero one two three four five six seven eight nine".split()


def normalise_transcript(text: str) -> str:
    """Lower-case words, single spaces, no punctuation, each digit spelt as its own word ("742" -> "seven four two").

    Apostrophes are dropped ("it's" -> "its"). Homophones are not mended: "to" for "two" stays an error.
    """
    text = re.sub(r"['\u2019]", "", text.lower())
    text = re.sub(r"[0-9]", lambda match: f" {_DIGITS[int(match.group())]} ", text)
    return " ".join(re.findall(r"[^\W_]+", text))
