"""The watermarks: found in marked sound, whatever the chunks it came in and what was done to it, and not in other sound."""

from __future__ import annotations

import json

import pytest
import soundfile
import torch

from csm.generation import keyed_mark, perth_mark
from csm.generation.audio_files import read_audio
from csm.generation.keyed_mark import PUBLIC_KEY, KeyedWatermarker, key_from_environment
from csm.generation.perth_mark import PerthWatermarker
from csm.generation.watermark import JointWatermarker, load_watermarker

SECRET = "correct horse battery staple 7"


@pytest.fixture(scope="module")
def perth() -> PerthWatermarker:
    return PerthWatermarker()


@pytest.fixture(scope="module")
def keyed() -> KeyedWatermarker:
    return KeyedWatermarker(PUBLIC_KEY)


@pytest.fixture(params=["keyed", "perth", "keyed+perth"])
def watermarker(request, monkeypatch):
    monkeypatch.delenv("CSM_WATERMARK_KEY", raising=False)
    return load_watermarker(request.param)


@pytest.fixture(scope="module")
def speech() -> list[torch.Tensor]:
    """Five clips of synthetic speech, 1 to 3 s."""
    hibari = pytest.importorskip("hibari", reason="pip install -e '.[demo]'")
    synthesiser = hibari.Hibari()
    texts = ("seven four two", "nine one zero six", "the train leaves early tomorrow", "three eight", "please call me when you are home")
    return [torch.from_numpy(synthesiser(text, seed=0)).float() for text in texts]


@pytest.fixture(scope="module")
def resynthesised(demo_corpus_small) -> list[torch.Tensor]:
    """Eight turns as the offline model would sound them: codes of the demo corpus through its codec."""
    from csm.codec import SpectralCodec
    from csm.data.shards import iter_samples

    codec = SpectralCodec.load(demo_corpus_small / "codec")
    turns = [turn for sample in iter_samples(demo_corpus_small / "heldout") for turn in sample.turns]
    return [codec.decode(turn.codes) for turn in turns[:8] if turn.codes is not None]


def distance_db(clip: torch.Tensor, marked: torch.Tensor) -> float:
    return float(10 * torch.log10(clip.square().sum() / (marked - clip).square().sum()))


def test_marked_clips_are_found_and_clean_ones_are_not(watermarker, speech):
    for clip in speech:
        marked = watermarker.embed(clip)
        assert marked.shape == clip.shape and marked.dtype == torch.float32
        assert watermarker.detect(marked).is_marked and not watermarker.detect(clip).is_marked
        assert distance_db(clip, marked) > 12


def test_what_the_offline_codec_gives_is_not_taken_for_the_keyed_mark(keyed, resynthesised):
    assert len(resynthesised) == 8
    for clip in resynthesised:
        assert not keyed.detect(clip).is_marked and keyed.detect(keyed.embed(clip)).p_value < 1e-9


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


def test_the_keyed_mark_survives_gain_noise_cuts_speed_and_mp3(keyed, speech, generator, tmp_path):
    import soxr

    clip = speech[4]
    marked = keyed.embed(clip)
    noise = torch.randn(clip.shape, generator=generator) * clip.square().mean().sqrt() * 10 ** (-30 / 20)
    path = tmp_path / "clip.mp3"
    soundfile.write(path, marked.numpy(), 24_000, format="MP3", subtype="MPEG_LAYER_III")
    treated = {
        "-6 dB": marked * 0.5,
        "30 dB noise": marked + noise,
        "start cut off": marked[1237:],
        "one second": marked[12_001:36_001],
        "5% faster": torch.from_numpy(soxr.resample(marked.numpy(), 25_200, 24_000)),
        "mp3": read_audio(path)[0],
    }
    assert [name for name, sound in treated.items() if not keyed.detect(sound).is_marked] == []


def test_a_marked_part_of_a_long_clip_is_found(keyed, speech):
    clean = torch.cat(speech * 3)
    assert clean.shape[0] > 15 * 24_000
    assert not keyed.detect(clean).is_marked
    middle = 10 * 24_000
    part = clean[middle : middle + 4 * 24_000]
    mixed = torch.cat((clean[:middle], keyed.embed(part), clean[middle + part.shape[0] :]))
    assert keyed.detect(mixed).is_marked


def test_only_the_right_key_finds_the_mark(keyed, speech):
    secret = KeyedWatermarker(SECRET.encode())
    marked = secret.embed(speech[2])
    assert secret.detect(marked).is_marked and not keyed.detect(marked).is_marked
    assert torch.equal(marked, KeyedWatermarker(SECRET.encode()).embed(speech[2]))


def test_false_alarms_are_as_rare_as_stated(speech):
    """1,000 keys on one clean clip: scores reach p 0.1 at most in a tenth of them (the bound is not tight, so in fewer)."""
    readings = keyed_mark._readings(speech[2])
    watermarkers = [KeyedWatermarker(index.to_bytes(4, "big")) for index in range(1000)]
    scores = torch.stack([keyed_mark._scores(readings, watermarker._signs).flatten() for watermarker in watermarkers])
    assert 0.97 < float(scores.std()) < 1.03 and abs(float(scores.mean())) < 0.01  # standard deviations they are
    p_values = torch.tensor([watermarker._p_value(speech[2]) for watermarker in watermarkers[:200]])
    assert float((p_values < 0.1).float().mean()) < 0.1


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch, speech):
    monkeypatch.delenv("CSM_WATERMARK_KEY", raising=False)
    assert key_from_environment() == (PUBLIC_KEY, "public") and KeyedWatermarker().key_kind == "public"
    monkeypatch.setenv("CSM_WATERMARK_KEY", SECRET)
    assert key_from_environment() == (SECRET.encode(), "secret")
    assert KeyedWatermarker().detect(KeyedWatermarker(SECRET.encode()).embed(speech[0])).is_marked
    for short in ("", "  ", "fifteen letters"):
        monkeypatch.setenv("CSM_WATERMARK_KEY", short)
        with pytest.raises(ValueError, match="expected at least 16") as caught:
            load_watermarker()
        assert "fifteen" not in str(caught.value)


def test_holes_in_the_spectrum_are_not_taken_for_perth(perth, speech):
    """Perth's bare detector accepts clean sound with the lowest bins cut away."""
    for cut_hz in (50, 120):
        for clip in speech:
            spectrum = torch.fft.rfft(clip)
            spectrum[: int(cut_hz * clip.shape[0] / 24_000)] = 0
            assert not perth.detect(torch.fft.irfft(spectrum, n=clip.shape[0])).is_marked


def test_by_default_both_marks_are_there_and_keyed_decides(monkeypatch, perth, keyed, speech):
    monkeypatch.delenv("CSM_WATERMARK_KEY", raising=False)
    both = load_watermarker()
    assert isinstance(both, JointWatermarker) and both.name == "keyed+perth"
    marked = both.embed(speech[2])
    assert keyed.detect(marked).is_marked and perth.detect(marked).is_marked
    assert both.detect(marked).p_value == keyed.detect(marked).p_value
    assert not both.detect(perth.embed(speech[2])).is_marked


def test_off_must_be_named_and_other_names_are_refused():
    assert load_watermarker("off") is None
    for name in ("sonic", "", "keyed+", "keyed+keyed", "off+keyed"):
        with pytest.raises(ValueError, match="expected off, or one or several of keyed, perth"):
            load_watermarker(name)


@pytest.mark.parametrize("name", ["audioseal", "silentcipher"])
def test_marks_whose_package_or_weights_are_missing_say_what_to_do(name, monkeypatch, tmp_path):
    monkeypatch.setenv("CSM_AUDIOSEAL_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("CSM_SILENTCIPHER_WEIGHTS", str(tmp_path))
    with pytest.raises((ImportError, FileNotFoundError), match="pip install|no generator_base.pth in it|no hparams.yaml"):
        load_watermarker(name)


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
    with pytest.raises(ValueError, match="install resemble-perth==1.0.1"):
        perth_mark._load_weights(path)


def test_the_command_tells_by_its_status_which_marks_are_there(monkeypatch, capsys, tmp_path, speech, keyed):
    from csm.cli.commands import main

    monkeypatch.setenv("CSM_WATERMARK_KEY", SECRET)
    clips = {"clean": speech[2], "public": keyed.embed(speech[2]), "secret": KeyedWatermarker().embed(speech[2])}
    for name, clip in clips.items():
        soundfile.write(tmp_path / f"{name}.flac", clip.numpy(), 24_000)
    files = {name: str(tmp_path / f"{name}.flac") for name in clips}
    assert main(["watermark", files["secret"]]) == 0
    assert main(["watermark", files["public"]]) == 1
    told = capsys.readouterr().out
    assert "marked (keyed, p <" in told and "keyed with the public key found" in told
    assert main(["watermark", "--json", *files.values()]) == 1
    heard = {entry["file"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert [heard[files[name]]["is_marked"] for name in ("clean", "public", "secret")] == [False, False, True]
    assert all(SECRET not in json.dumps(entry) for entry in heard.values())
    assert main(["watermark", "--mark", "sonic", files["clean"]]) == 2
    assert "expected one of keyed" in capsys.readouterr().err
