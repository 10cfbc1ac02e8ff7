"""Measures of turns, and which turns leave for them: each threshold by its reason, nothing without one."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile

from csm.config import FilterConfig
from csm.frames import SAMPLE_RATE_HZ
from data_prep import quality
from data_prep.channels import channels_differ
from data_prep.filter import apart, refused_recording, refused_turn
from data_prep.manifest import ManifestTurn
from data_prep.script import VOICES
from data_prep.synthesis import Synthesizer, random_for
from data_prep.transcript import Span


def turn(**changed: object) -> ManifestTurn:
    quality = {
        "snr_db": 20.0,
        "bandwidth_hz": 8000.0,
        "clipping": 0.0,
        "speech_share": 0.9,
        "asr_log_probability": -0.2,
        "asr_compression": 1.0,
        "background_db": -30.0,
        "dnsmos": 3.0,
        "words_per_s": 2.0,
        "characters_per_s": 12.0,
        "unique_share": 1.0,
        "overlap_share": 0.0,
    }
    values: dict = dict(text="one two three", speaker=0, start_s=0.0, end_s=1.5, quality=quality)
    quality |= {key: value for key, value in changed.items() if key in quality}
    return ManifestTurn(**(values | {key: value for key, value in changed.items() if key not in quality}))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"snr_db": -3.0}, "snr_db"),
        ({"bandwidth_hz": 3000.0}, "bandwidth_hz"),
        ({"clipping": 0.02}, "clipping"),
        ({"speech_share": 0.1}, "speech_share"),
        ({"asr_log_probability": -1.5}, "log_probability"),
        ({"asr_compression": 3.0}, "compression"),
        ({"words_per_s": 12.0}, "words_per_s"),
        ({"words_per_s": 0.1}, "words_per_s"),
        ({"characters_per_s": 41.0}, "characters_per_s"),
        ({"unique_share": 0.3, "words": [{"word": "no"}] * 10}, "unique_share"),
        ({"unique_share": 0.3, "words": [{"word": "no"}] * 9}, None),
        ({"background_db": 2.0}, "background_db"),
        ({"dnsmos": 1.8}, "dnsmos"),
        ({"words_per_s": 0.1, "asr_log_probability": -1.5, "backchannel": True}, None),
        ({"snr_db": -3.0, "backchannel": True}, "snr_db"),
    ],
)
def test_each_threshold_takes_out_what_it_is_for_and_says_so(changed, reason):
    why = refused_turn(turn(**changed), FilterConfig())
    assert (why and why.reason) == reason


@pytest.mark.parametrize(
    ("language", "probability", "dnsmos", "reason"),
    [
        ("en", 0.9, 3.0, None),
        ("fr", 0.9, 3.0, "language"),
        ("en", 0.3, 3.0, "language"),
        ("en", 0.9, 1.5, "dnsmos"),
        ("en", 0.9, None, None),
    ],
)
def test_recordings_of_other_languages_or_bad_sound_are_left_out_whole(language, probability, dnsmos, reason):
    why = refused_recording(language, probability, dnsmos, FilterConfig(languages=["en"]))
    assert (why and why.reason) == reason


def test_a_turn_may_be_asked_to_last_and_a_listeners_noise_never_is():
    config = FilterConfig(min_duration_s=2.0)
    assert [refused_turn(turn(backchannel=noise), config) is None for noise in (False, True)] == [False, True]


def test_what_was_not_measured_decides_nothing():
    assert refused_turn(ManifestTurn("one two", start_s=0.0, end_s=1.0), FilterConfig()) is None


def test_what_is_talked_over_in_one_channel_is_context_and_not_learnt():
    turns = [turn(overlap_share=0.3), turn(speaker=1, overlap_share=1.0), turn(overlap_share=0.1)]
    assert [kept.learn for _, kept, _ in apart(turns, FilterConfig())] == [False, False, True]
    by_channel = [turn(channel=0, overlap_share=0.9), turn(channel=1, speaker=1, overlap_share=0.9)]
    assert all(kept.learn for _, kept, _ in apart(by_channel, FilterConfig()))


def test_what_follows_a_turn_that_leaves_begins_anew_unless_it_was_a_listeners_noise():
    turns = [turn(), turn(snr_db=-3.0), turn(), turn(), turn(snr_db=-3.0, backchannel=True), turn()]
    kept = [(index, kept.follows_gap) for index, kept, why in apart(turns, FilterConfig()) if why is None]
    assert kept == [(0, False), (2, True), (3, False), (5, False)]


@pytest.fixture(scope="module")
def voice() -> np.ndarray:
    """Three seconds of speech at 24 kHz, a second and a half of nothing before and after."""
    clip = Synthesizer().speak("the number is three three one please say it", VOICES[0], random_for(1, "filter", 0))
    clip = clip.astype(np.float32)[: 3 * SAMPLE_RATE_HZ] / 32_768
    pause = np.zeros(36_000, np.float32)
    return np.concatenate([pause, clip, pause]) + np.random.default_rng(0).normal(0, 3e-4, len(clip) + 72_000).astype(np.float32)


def test_music_and_noise_around_a_turn_are_measured_as_background(voice):
    end_s = len(voice) / SAMPLE_RATE_HZ - 1.5
    time_s = np.arange(len(voice)) / SAMPLE_RATE_HZ
    level = float(np.sqrt(np.mean(np.square(voice[36_000:-36_000]))))
    chord = sum(np.sin(2 * np.pi * hz * time_s) for hz in (220, 277.2, 329.6)) / np.sqrt(1.5)  # of power 1
    noise = np.random.default_rng(1).normal(0, 1, len(voice))
    speech = [Span(1.5, end_s)]
    assert quality.background_db(voice, 1.5, end_s, speech) < -30
    for sound in (chord, noise):
        for db in (-20.0, -10.0):
            mixed = (voice + sound * level * 10 ** (db / 20)).astype(np.float32)
            assert quality.background_db(mixed, 1.5, end_s, speech) == pytest.approx(db - 10 * np.log10(1 + 10 ** (db / 10)), abs=0.7)
    assert quality.background_db(voice[36_000:-36_000], 0.0, end_s - 1.5, [Span(0.0, end_s)]) is None  # speech all around


def test_words_are_counted_and_compared():
    words = [{"word": f" {word}"} for word in "yes yes no maybe".split()]
    told = quality.text_quality(ManifestTurn("yes yes no maybe", start_s=1.0, end_s=3.0, words=words))
    assert told == {"words_per_s": 2.0, "characters_per_s": 8.0, "unique_share": 0.75}


@pytest.mark.parametrize(
    ("make", "differ"),
    [
        (lambda a, b, hiss: np.stack([a + 0.02 * b, b + 0.02 * a], axis=1), True),  # a call, a little of the other in each
        (lambda a, b, hiss: np.stack([a + b, a + b], axis=1), False),
        (lambda a, b, hiss: np.stack([a + b, np.zeros_like(a)], axis=1), False),
        (lambda a, b, hiss: np.stack([a + b, np.roll(a + b, 130)], axis=1), False),  # two microphones of a room, some way apart
        (lambda a, b, hiss: np.stack([a + hiss, b + np.roll(hiss, 99)], axis=1), True),
        (lambda a, b, hiss: np.full((len(a), 2), np.nan), False),  # ingest says what is wrong
    ],
    ids=["call", "same", "one_empty", "delayed", "noisy_call", "nan"],
)
def test_two_channels_are_speakers_when_they_take_turns(make, differ, voice, tmp_path):
    pause = np.zeros_like(voice)
    a, b = np.concatenate([voice, pause, voice, pause]), np.concatenate([pause, voice, pause, voice])
    hiss = np.random.default_rng(2).normal(0, 3e-3, len(a))
    soundfile.write(tmp_path / "x.wav", make(a, b, hiss).astype(np.float32), SAMPLE_RATE_HZ, subtype="FLOAT")
    assert channels_differ(tmp_path / "x.wav") is differ
