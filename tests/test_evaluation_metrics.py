"""Metrics agree with known answers."""

from __future__ import annotations

import pytest

from csm.evaluation.metrics import (
    align_words,
    count_character_errors,
    count_word_errors,
    is_runaway,
    mean_estimate,
    normalise_transcript,
    ratio_estimate,
    seed_for,
)


@pytest.mark.parametrize("heard", ["742", "7 4 2", "7-4-2", "Seven, four, two.", " seven FOUR two ", "$7.42", "7:42", "seven 42"])
def test_every_way_of_writing_digits_reads_the_same(heard: str) -> None:
    assert normalise_transcript(heard) == "seven four two"
    assert count_word_errors("seven four two", heard).errors == 0


@pytest.mark.parametrize(
    ("heard", "hits", "substitutions", "deletions", "insertions"),
    [
        ("seven for two", 2, 1, 0, 0),  # a homophone is an error
        ("seven oh two", 2, 1, 0, 0),
        ("seven two", 2, 0, 1, 0),
        ("seven four four two", 3, 0, 0, 1),
        ("", 0, 0, 3, 0),
        ("you", 0, 1, 2, 0),
        ("7 4 2 2 2 2 2", 3, 0, 0, 4),  # a loop counts, the rate may pass 100%
    ],
)
def test_word_errors_by_hand(heard: str, hits: int, substitutions: int, deletions: int, insertions: int) -> None:
    errors = count_word_errors("seven four two", heard)
    assert (errors.hits, errors.substitutions, errors.deletions, errors.insertions) == (hits, substitutions, deletions, insertions)
    assert errors.num_words == 3


def test_a_reference_without_words_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no word"):
        count_word_errors("...", "seven")


def test_alignment_names_each_difference() -> None:
    assert align_words("seven four two", "seven for two too") == [
        ("equal", "seven", "seven"),
        ("substitute", "four", "for"),
        ("equal", "two", "two"),
        ("insert", "", "too"),
    ]


def test_corpus_rate_weighs_words_not_clips() -> None:
    estimate = ratio_estimate([1, 0], [2, 8], seed=0, name="wer")
    assert estimate.value == pytest.approx(0.1)
    assert estimate.n == 2


def test_interval_holds_the_value_and_depends_on_the_seed_and_name_only() -> None:
    errors, words = [0, 1, 0, 0, 2, 0, 0, 0, 1, 0] * 5, [3, 4, 5, 3, 5, 4, 3, 3, 4, 5] * 5
    estimate = ratio_estimate(errors, words, seed=0, name="wer")
    assert estimate.low is not None and estimate.high is not None
    assert 0 < estimate.low < estimate.value < estimate.high < 0.3
    mean_estimate([0.0, 1.0], seed=0, name="another metric in between")
    assert ratio_estimate(errors, words, seed=0, name="wer") == estimate
    assert ratio_estimate(errors, words, seed=1, name="wer") != estimate


def test_interval_of_a_known_share_is_the_binomial_one() -> None:
    estimate = mean_estimate([1.0] * 50 + [0.0] * 50, seed=3, name="share")  # standard error 0.05
    assert (estimate.low, estimate.high) == pytest.approx((0.402, 0.598), abs=0.02)


def test_no_clips_are_refused() -> None:
    with pytest.raises(ValueError, match="one pair a clip"):
        ratio_estimate([], [], seed=0, name="wer")


def test_runaway_is_no_end_or_more_than_twice_the_reference() -> None:
    assert not is_runaway(2.0, 1.0, reached_eos=True)
    assert is_runaway(2.01, 1.0, reached_eos=True)
    assert is_runaway(1.0, 1.0, reached_eos=False)


def test_seeds_are_fixed_numbers() -> None:
    assert seed_for(0, "speak", "a-0") == seed_for(0, "speak", "a-0") < 2**63
    assert len({seed_for(0, "speak", "a-0"), seed_for(1, "speak", "a-0"), seed_for(0, "speak", "a-1"), seed_for(0, "spea", "ka-0")}) == 4


def test_characters_and_outliers_by_hand():
    assert count_character_errors("seven two", "seven too") == (1, 9)
    assert count_character_errors("One, 2!", "one two") == (0, 7)
    assert not count_word_errors("one two three four", "one two").is_outlier  # half is not more than half
    assert count_word_errors("one two three four", "one").is_outlier
    assert count_word_errors("one two", "one two " + "four " * 20).is_outlier  # a loop is told by its insertions
