"""The watermark: found in marked sound, whatever the chunks it came in, and not in other sound."""

from __future__ import annotations

import pytest
import torch

from csm.generation import watermark
from csm.generation.watermark import PerthWatermarker, load_watermarker


@pytest.fixture(scope="module")
def watermarker() -> PerthWatermarker:
    return PerthWatermarker()


@pytest.fixture(scope="module")
def speech() -> list[torch.Tensor]:
    """Five clips of synthetic speech, 1 to 3 s."""
    hibari = pytest.importorskip("hibari", reason="pip install -e '.[demo]'")
    synthesiser = hibari.Hibari()
    texts = ("seven four two", "nine one zero six", "the train leaves early tomorrow", "three eight", "please call me when you are home")
    return [torch.from_numpy(synthesiser(text, seed=0)).float() for text in texts]


def test_marked_clips_are_found_and_clean_ones_are_not(watermarker, speech):
    for clip in speech:
        marked = watermarker.embed(clip)
        assert marked.shape == clip.shape and marked.dtype == torch.float32
        assert watermarker.detect(marked).is_marked and not watermarker.detect(clip).is_marked
        distance_db = 10 * torch.log10(clip.square().sum() / (marked - clip).square().sum())
        assert distance_db > 12  # Perth's own is about 16 dB below speech


def test_streamed_equals_whole_whatever_the_chunks(watermarker, generator, speech):
    clip = speech[0][:24_000]
    whole = watermarker.embed(clip)
    for sizes in ([1920] * 13, [100] * 240, torch.randint(1, 4000, (40,), generator=generator).tolist(), [24_000]):
        stream, parts, start = watermarker.stream(), [], 0
        for size in sizes:
            parts.append(stream.push(clip[start : start + size]))
            start += size
        assert torch.equal(torch.cat([*parts, stream.finish()]), whole)


def test_first_samples_come_before_one_frame_has_passed(watermarker, speech):
    stream = watermarker.stream()
    assert stream.push(speech[0][:1488]).shape[0] > 0
    stream.finish()
    with pytest.raises(ValueError, match="finished"):
        stream.push(torch.zeros(10))


@pytest.mark.parametrize("num_samples", [1, 239, 1488, 1920, 5000])
def test_clips_of_any_length_keep_it(watermarker, num_samples, generator):
    clip = 0.1 * torch.randn(num_samples, generator=generator)
    assert watermarker.embed(clip).shape == clip.shape
    assert 0 <= watermarker.detect(clip).confidence <= 1


def test_silence_stays_silent_and_is_not_marked(watermarker):
    silence = torch.zeros(24_000)
    assert torch.equal(watermarker.embed(silence), silence)
    assert not watermarker.detect(silence).is_marked


@pytest.mark.parametrize("sample_rate", [8_000, 16_000, 44_100])
def test_the_mark_survives_resampling(watermarker, sample_rate, speech):
    import soxr

    marked = watermarker.embed(speech[1]).numpy()
    resampled = torch.from_numpy(soxr.resample(marked, 24_000, sample_rate))
    assert watermarker.detect(resampled, sample_rate).is_marked


def test_holes_in_the_spectrum_are_not_taken_for_the_mark(watermarker, speech):
    """Perth's bare detector accepts clean sound with the lowest bins cut away, and what our offline codec gives."""
    for cut_hz in (50, 120):
        for clip in speech:
            spectrum = torch.fft.rfft(clip)
            spectrum[: int(cut_hz * clip.shape[0] / 24_000)] = 0
            assert not watermarker.detect(torch.fft.irfft(spectrum, n=clip.shape[0])).is_marked


def test_off_must_be_named_and_other_names_are_refused():
    assert load_watermarker("off") is None
    assert load_watermarker().name == "perth"
    with pytest.raises(ValueError, match="expected one of perth, off"):
        load_watermarker("silentcipher")


@pytest.mark.parametrize(
    ("waveform", "message"),
    [
        (torch.zeros(0), "no samples"),
        (torch.zeros(2, 100), "mono"),
        (torch.full((100,), float("nan")), "not finite"),
        (torch.zeros(100, dtype=torch.int16), "float32"),
    ],
)
def test_what_is_no_sound_is_refused(watermarker, waveform, message):
    for use in (watermarker.embed, watermarker.detect):
        with pytest.raises(ValueError, match=message):
            use(waveform)


def test_other_weights_than_perths_are_refused(tmp_path):
    path = tmp_path / "weights.pth.tar"
    path.write_bytes(b"not Perth's")
    with pytest.raises(ImportError, match="not the file that resemble-perth 1.0.1 ships"):
        watermark._load_weights(path)
