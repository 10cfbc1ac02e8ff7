"""Any audio file in: 24 kHz at one loudness out, or one word why not. Files here are written by real encoders, then damaged."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from csm.config import IngestConfig
from data_prep.decode import read_header
from data_prep.failures import Rejected
from data_prep.ingest import ingest, loudness_lufs, true_peak

CONFIG = IngestConfig()


def speechlike(duration_s: float = 1.0, rate_hz: int = 24_000, level: float = 0.2, seed: int = 0) -> np.ndarray:
    """A gliding tone with a syllable's rhythm and some noise, float32 [S]."""
    time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
    tone = np.sin(2 * np.pi * (180 + 60 * seed) * time_s * (1 + 0.1 * np.sin(5 * time_s)))
    noise = np.random.default_rng(seed).standard_normal(len(time_s)) * 0.05
    return ((tone * (0.6 + 0.4 * np.sin(25 * time_s)) + noise) * level).astype(np.float32)


def write_with_av(path: Path, codec: str, audio: np.ndarray, rate_hz: int = 24_000, container: str | None = None) -> None:
    """Encode mono audio by FFmpeg."""
    import av

    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate_hz)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(audio[None], format="fltp", layout="mono")
        frame.sample_rate = rate_hz
        resampler = av.AudioResampler(stream.format, "mono", rate_hz, frame_size=stream.codec_context.frame_size or 1024)
        for converted in [*resampler.resample(frame), *resampler.resample(None)]:
            output.mux(stream.encode(converted))
        output.mux(stream.encode(None))


def _wav(path: Path, audio: np.ndarray | None = None, rate_hz: int = 24_000, **options: str) -> None:
    soundfile.write(path, speechlike() if audio is None else audio, rate_hz, format="WAV", **options)


def _cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _encoded_then_cut(**options: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        soundfile.write(path, speechlike(4.0), 24_000, **options)
        _cut(path, 0.5)

    return make


def _cut_wav(path: Path) -> None:
    _wav(path)
    _cut(path, 0.5)


def _cut_m4a(path: Path) -> None:
    write_with_av(path, "aac", speechlike(4.0), container="mp4")
    _cut(path, 0.7)


def _wav_without_data(path: Path) -> None:
    path.write_bytes(b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0" + struct.pack("<HHIIHH", 1, 1, 24_000, 48_000, 2, 16))


def _wav_of_no_samples(path: Path) -> None:
    _wav(path, np.zeros(0, np.float32))


def _not_finite(path: Path) -> None:
    audio = speechlike()
    audio[1000] = np.nan
    _wav(path, audio, subtype="FLOAT")


def _clipped(path: Path) -> None:
    _wav(path, np.clip(speechlike(level=8.0), -1, 1))


def _damaged_flac(path: Path) -> None:
    soundfile.write(path, speechlike(4.0), 24_000, format="FLAC")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 20_000] = os.urandom(20_000)
    path.write_bytes(content)


def _playlist(path: Path) -> None:
    _wav(path.with_name("secret.wav"))
    path.write_text("ffconcat version 1.0\nfile secret.wav\n")


def _hls(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:9,\nhttp://127.0.0.1:9/segment.ts\n#EXT-X-ENDLIST\n")


def _rate(rate_hz: int) -> Callable[[Path], None]:
    return lambda path: _wav(path, speechlike(1.0, rate_hz), rate_hz)


HOSTILE: dict[str, tuple[str, Callable[[Path], object], set[str]]] = {
    "zero_bytes": ("a.wav", lambda path: path.write_bytes(b""), {"empty"}),
    "text_named_wav": ("a.wav", lambda path: path.write_text("these are not samples\n" * 50), {"not_audio"}),
    "text_named_mp3": ("a.mp3", lambda path: path.write_text("these are not samples\n" * 50), {"not_audio", "empty"}),
    "random_bytes": ("a.m4a", lambda path: path.write_bytes(np.random.default_rng(0).bytes(5_000)), {"not_audio", "empty", "corrupt"}),
    "truncated_wav": ("a.wav", _cut_wav, {"truncated"}),
    "truncated_aiff": ("a.aiff", _encoded_then_cut(format="AIFF"), {"truncated"}),
    "truncated_flac": ("a.flac", _encoded_then_cut(format="FLAC"), {"truncated", "corrupt"}),
    "truncated_ogg": ("a.ogg", _encoded_then_cut(format="OGG", subtype="VORBIS"), {"truncated"}),
    "truncated_opus": ("a.opus", _encoded_then_cut(format="OGG", subtype="OPUS"), {"truncated"}),
    "truncated_mp3": ("a.mp3", _encoded_then_cut(format="MP3"), {"truncated"}),
    "truncated_m4a": ("a.m4a", _cut_m4a, {"truncated", "not_audio", "corrupt"}),
    "flac_with_a_hole": ("a.flac", _damaged_flac, {"truncated", "corrupt", "not_audio"}),
    "wav_header_only": ("a.wav", _wav_without_data, {"truncated"}),
    "wav_of_no_samples": ("a.wav", _wav_of_no_samples, {"empty"}),
    "not_finite": ("a.wav", _not_finite, {"not_finite"}),
    "clipped": ("a.wav", _clipped, {"clipped"}),
    "silence": ("a.flac", lambda path: soundfile.write(path, np.zeros(48_000), 24_000), {"silent"}),
    "whispered_noise": ("a.wav", lambda path: _wav(path, speechlike(level=3e-4)), {"silent"}),
    "opposite_channels": ("a.wav", lambda path: _wav(path, np.stack([speechlike(), -speechlike()], axis=1)), {"silent"}),
    "four_kilohertz": ("a.wav", _rate(4_000), {"bad_format"}),
    "too_long": ("a.wav", lambda path: _wav(path, speechlike(8.0)), {"too_long"}),
    "folder_named_wav": ("a.wav", lambda path: path.mkdir(), {"not_a_file"}),
    "named_pipe": ("a.wav", lambda path: os.mkfifo(path), {"not_a_file"}),
    "broken_link": ("a.wav", lambda path: path.symlink_to("nowhere.wav"), {"unreadable"}),
    "link_to_itself": ("a.wav", lambda path: path.symlink_to(path.name), {"unreadable"}),
    "list_of_other_files": ("a.mka", _playlist, {"not_audio"}),
    "list_of_addresses": ("a.aac", _hls, {"not_audio", "corrupt", "empty"}),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_file_is_rejected_with_its_reason(name: str, tmp_path: Path) -> None:
    file_name, make, reasons = HOSTILE[name]
    path = tmp_path / file_name
    make(path)
    with pytest.raises(Rejected) as rejected:
        ingest(path, IngestConfig(max_recording_min=0.1))
    assert rejected.value.reason in reasons, rejected.value
    assert rejected.value.detail and "\n" not in rejected.value.detail


KINDS: dict[str, Callable[[Path], object]] = {
    "a.wav": _wav,
    "8bit.wav": lambda path: _wav(path, subtype="PCM_U8"),
    "float.wav": lambda path: _wav(path, subtype="FLOAT"),
    "192k.wav": _rate(192_000),
    "8k.wav": _rate(8_000),
    "44k.flac": lambda path: soundfile.write(path, speechlike(1.0, 44_100), 44_100),
    "eight_channels.wav": lambda path: _wav(path, np.stack([speechlike()] * 8, axis=1)),
    "a.mp3": lambda path: soundfile.write(path, speechlike(), 24_000),
    "a.ogg": lambda path: soundfile.write(path, speechlike(), 24_000),
    "a.opus": lambda path: soundfile.write(path, speechlike(), 24_000, format="OGG", subtype="OPUS"),
    "a.m4a": lambda path: write_with_av(path, "aac", speechlike(), container="mp4"),
    "a.aac": lambda path: write_with_av(path, "aac", speechlike(), container="adts"),
    "a.webm": lambda path: write_with_av(path, "libopus", speechlike(1.0, 48_000), 48_000, container="webm"),
    "av.mp3": lambda path: write_with_av(path, "libmp3lame", speechlike(), container="mp3"),
    "with space\nand newline.wav": _wav,
}


@pytest.mark.parametrize("name", sorted(KINDS))
def test_readable_file_becomes_a_second_at_the_loudness_asked_for(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    got = ingest(tmp_path / name, CONFIG)
    assert got.audio.shape[0] == 1 and got.audio.dtype == np.float32
    assert got.duration_s == pytest.approx(1.0, abs=0.13)  # lossy codecs pad by up to two of their frames
    assert loudness_lufs(got.audio[0]) == pytest.approx(-23.0, abs=0.05)


def test_resampling_in_blocks_equals_resampling_at_once(tmp_path: Path) -> None:
    """To rounding: the stream and the whole give the same samples."""
    import soxr

    audio = speechlike(20.0, 44_100)  # four blocks
    _wav(tmp_path / "a.wav", audio, 44_100, subtype="FLOAT")
    got = ingest(tmp_path / "a.wav", CONFIG)
    whole = soxr.resample(audio, 44_100, 24_000, quality="HQ")
    assert got.audio.shape[1] == pytest.approx(len(whole), abs=1)
    length = min(len(whole), got.audio.shape[1])
    np.testing.assert_allclose(got.audio[0, :length], whole[:length] * 10 ** (got.gain_db[0] / 20), atol=1e-5)


def test_peaks_hold_loudness_back(tmp_path: Path) -> None:
    audio = speechlike(3.0, level=0.01)
    audio[30_000:30_030] = 0.9  # one click
    _wav(tmp_path / "a.wav", audio, subtype="FLOAT")
    got = ingest(tmp_path / "a.wav", CONFIG)
    assert 20 * np.log10(true_peak(got.audio[0])) <= CONFIG.peak_dbtp + 0.01
    assert loudness_lufs(got.audio[0]) < -24


def test_true_peak_sees_between_samples() -> None:
    wave = np.sin(np.pi / 2 * np.arange(4_800) + np.pi / 4).astype(np.float32)  # every sample at 0.707, its crest at 1
    assert np.abs(wave).max() == pytest.approx(0.7071, abs=1e-3)
    assert true_peak(wave) == pytest.approx(1.0, abs=0.05)


def test_channels_are_kept_apart_and_levelled_apart(tmp_path: Path) -> None:
    _wav(tmp_path / "call.wav", np.stack([speechlike(2.0, level=0.3), speechlike(2.0, level=0.01, seed=3)], axis=1), subtype="FLOAT")
    got = ingest(tmp_path / "call.wav", CONFIG, by_channel=True)
    assert got.audio.shape[0] == 2
    assert [loudness_lufs(row) for row in got.audio] == pytest.approx([-23.0, -23.0], abs=0.05)


def test_a_silent_channel_stays_silent(tmp_path: Path) -> None:
    _wav(tmp_path / "call.wav", np.stack([speechlike(), np.zeros(24_000, np.float32)], axis=1))
    got = ingest(tmp_path / "call.wav", CONFIG, by_channel=True)
    assert got.gain_db[1] == 0.0 and not got.audio[1].any()


@pytest.mark.parametrize("rate_hz", [24_000, 44_100])
def test_one_channel_by_itself_is_that_channel_of_both(tmp_path: Path, rate_hz: int) -> None:
    rows = [speechlike(2.0, level=0.3), speechlike(2.0, level=0.0, seed=3)]
    soundfile.write(tmp_path / "call.wav", np.stack(rows, axis=1), rate_hz, subtype="FLOAT")
    both = ingest(tmp_path / "call.wav", CONFIG, by_channel=True)
    for channel in range(2):  # the second is silent, which is no reason to refuse it
        one = ingest(tmp_path / "call.wav", CONFIG, by_channel=True, channel=channel)
        assert np.array_equal(one.audio, both.audio[channel : channel + 1])
        assert one.gain_db == both.gain_db[channel : channel + 1] and one.clipping == both.clipping


def test_ten_milliseconds_are_levelled_too(tmp_path: Path) -> None:
    _wav(tmp_path / "a.wav", speechlike(0.01))
    assert ingest(tmp_path / "a.wav", CONFIG).audio.shape == (1, 240)


def test_a_wav_of_unknown_length_is_read_to_its_end(tmp_path: Path) -> None:
    """What FFmpeg writes into a pipe: sizes of all ones."""
    path = tmp_path / "a.wav"
    _wav(path, speechlike(2.0))
    content = bytearray(path.read_bytes())
    place = content.find(b"data")
    content[place + 4 : place + 8] = b"\xff" * 4
    path.write_bytes(content)
    assert read_header(path).duration_s == pytest.approx(2.0, abs=0.01)
    assert ingest(path, CONFIG).duration_s == pytest.approx(2.0, abs=0.01)
