"""Spectrograms and distances on made-up sounds."""

from __future__ import annotations

import numpy as np
import pytest

from csm.listening.acoustics import _warped_mean, is_silent, log_mel_db, mel_distance_db, mel_spectrogram, silence_tail_s, trim_silence


def tone(frequency_hz: float, duration_s: float, rate_hz: int = 24_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency_hz * np.arange(round(duration_s * rate_hz)) / rate_hz)).astype(np.float32)


def test_a_clip_has_no_distance_to_itself_nor_to_itself_in_silence() -> None:
    clip = np.concatenate([tone(300, 0.4), tone(900, 0.4)])
    assert mel_distance_db(clip, clip) == 0
    silence = np.zeros(4_800, np.float32)
    assert mel_distance_db(np.concatenate([silence, clip, silence]), clip) < 1.0


def test_speed_matters_less_than_pitch() -> None:
    slow = np.concatenate([tone(300, 0.6), tone(900, 0.6)])
    fast = np.concatenate([tone(300, 0.4), tone(900, 0.4)])
    other = np.concatenate([tone(500, 0.4), tone(1500, 0.4)])
    assert mel_distance_db(slow, fast) < 0.2 * mel_distance_db(other, fast)


def test_warping_takes_the_cheapest_path() -> None:
    cost = np.array([[0.0, 9.0, 9.0], [0.0, 9.0, 9.0], [9.0, 0.0, 4.0]])  # down, then the diagonal, then right
    assert _warped_mean(cost) == pytest.approx((0 + 0 + 0 + 4) / 4)


def test_warped_mean_equals_plain_dynamic_programming() -> None:
    cost = np.random.default_rng(0).random((7, 11))
    total = np.full((8, 12), np.inf)
    total[0, 0] = 0
    length = np.zeros((8, 12))
    for i in range(7):
        for j in range(11):
            steps = [(total[i, j], length[i, j]), (total[i, j + 1], length[i, j + 1]), (total[i + 1, j], length[i + 1, j])]
            best = min(steps, key=lambda step: step[0])
            total[i + 1, j + 1], length[i + 1, j + 1] = best[0] + cost[i, j], best[1] + 1
    assert _warped_mean(cost) == pytest.approx(total[7, 11] / length[7, 11])


def test_mel_peak_sits_at_the_tone() -> None:
    power = mel_spectrogram(tone(1000, 0.5, 16_000), num_mels=40, fft_size=400, hop=160, rate_hz=16_000)
    assert power.shape == (1 + 8_000 // 160, 40)
    centres_hz = 1000 * np.exp((np.arange(1, 41) * (15 + 27 * np.log(8) / np.log(6.4)) / 41 - 15) * np.log(6.4) / 27)  # Slaney, above 1 kHz
    assert abs(np.argmax(power.sum(axis=0)) - np.argmin(np.abs(centres_hz - 1000))) <= 1


def test_silence_is_told_from_sound() -> None:
    assert is_silent(np.zeros(0, np.float32))
    assert is_silent(np.full(2_400, 1e-5, np.float32))
    assert not is_silent(tone(200, 0.1))


def test_trimming_keeps_the_sound() -> None:
    clip = tone(200, 0.5)
    padded = np.concatenate([np.zeros(24_000, np.float32), clip, np.zeros(12_000, np.float32)])
    assert abs(len(trim_silence(padded)) - len(clip)) <= 2 * 480
    assert len(trim_silence(np.zeros(100, np.float32))) == 100
    assert log_mel_db(np.zeros(2_400, np.float32)).max() == pytest.approx(-80)


def test_silence_at_the_end_is_measured_and_a_cut_clip_has_none():
    tone = 0.3 * np.sin(np.arange(24_000) * 0.1).astype(np.float32)
    assert silence_tail_s(np.concatenate([tone, np.zeros(18_000, np.float32)])) == pytest.approx(0.75, abs=0.03)
    assert silence_tail_s(tone) < 0.03
    assert silence_tail_s(np.zeros(0, np.float32)) == 0.0 and silence_tail_s(np.zeros(24_000, np.float32)) == 1.0
