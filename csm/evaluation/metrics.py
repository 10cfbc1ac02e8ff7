"""What is counted over spoken clips: word errors, durations, mel distance, and intervals by bootstrap.

Plain numbers in, plain numbers out; no model and no file is touched here. Random numbers come from a counter-based
generator keyed by (seed, metric), so a metric's interval does not depend on which others are computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jiwer
import numpy as np

from csm.listening.transcripts import normalise_transcript

NUM_RESAMPLES = 2000
OUTLIER_WER = 0.5  # a clip with a larger share of wrong words is an outlier: one failure, not many small errors
RUNAWAY_RATIO = 2.0  # a clip longer than this many times its reference ran away


@dataclass(frozen=True)
class WordErrors:
    """Word alignment of one transcript against its reference, in words."""

    hits: int
    substitutions: int
    deletions: int
    insertions: int

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def num_words(self) -> int:
        """Words of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def is_outlier(self) -> bool:
        return self.errors > OUTLIER_WER * self.num_words


def count_word_errors(reference: str, hypothesis: str) -> WordErrors:
    """Align a transcript with what should have been said; both are normalised first.

    Raises:
        ValueError: if the reference holds no word, for then a rate has no denominator.
    """
    output = jiwer.process_words(_reference_words(reference), normalise_transcript(hypothesis))
    return WordErrors(output.hits, output.substitutions, output.deletions, output.insertions)


def count_character_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """(errors, characters of the reference), spaces between words included; both are normalised first.

    Raises:
        ValueError: as `count_word_errors`.
    """
    output = jiwer.process_characters(_reference_words(reference), normalise_transcript(hypothesis))
    errors = output.substitutions + output.deletions + output.insertions
    return errors, output.hits + output.substitutions + output.deletions


def align_words(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """The alignment as (kind, reference words, hypothesis words), kind one of equal, substitute, delete, insert."""
    output = jiwer.process_words(_reference_words(reference), normalise_transcript(hypothesis))
    expected, heard = output.references[0], output.hypotheses[0]
    return [
        (
            chunk.type,
            " ".join(expected[chunk.ref_start_idx : chunk.ref_end_idx]),
            " ".join(heard[chunk.hyp_start_idx : chunk.hyp_end_idx]),
        )
        for chunk in output.alignments[0]
    ]


def _reference_words(reference: str) -> str:
    words = normalise_transcript(reference)
    if not words:
        raise ValueError(f"reference {reference!r} holds no word, so a word error rate has no meaning; leave the clip out of the suite")
    return words


def is_runaway(duration_s: float, reference_s: float, reached_eos: bool) -> bool:
    """Whether a clip failed to end: no EOS, or longer than twice its reference."""
    return not reached_eos or duration_s > RUNAWAY_RATIO * reference_s


@dataclass(frozen=True)
class Estimate:
    """A metric over a suite: its value, a 95% interval and how many clips stand behind it.

    `low` and `high` are None where resampling says nothing, as for a maximum.
    """

    value: float
    low: float | None
    high: float | None
    n: int

    def as_json(self) -> dict[str, float | int | None]:
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(self).items()}


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float], *, seed: int, name: str) -> Estimate:
    """sum(numerators) / sum(denominators), with the percentile bootstrap over clips.

    Args:
        numerators, denominators: one pair a clip; for a plain mean the denominators are ones.
        seed, name: key of the random numbers.
    Raises:
        ValueError: if there is no clip, or the denominators sum to zero.
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"{name}: {len(numerators)} numerators and {len(denominators)} denominators, expected one pair a clip")
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if bottom.sum() <= 0:
        raise ValueError(f"{name}: the denominators sum to {bottom.sum()}, expected more than 0")
    drawn = _generator(seed, name).integers(0, len(top), size=(NUM_RESAMPLES, len(top)))
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)
    low, high = np.percentile(resampled[np.isfinite(resampled)], [2.5, 97.5])
    return Estimate(float(top.sum() / bottom.sum()), float(low), float(high), len(top))


def mean_estimate(values: Sequence[float], *, seed: int, name: str) -> Estimate:
    """The mean over clips, with the bootstrap of `ratio_estimate`."""
    return ratio_estimate(values, [1.0] * len(values), seed=seed, name=name)


def seed_for(seed: int, *names: str) -> int:
    """A 63-bit seed for one purpose: the same names give the same seed on every machine and in every order of work."""
    digest = hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed_for(seed, "bootstrap", name)))
