"""Voice presets: kept with whose they are and on what terms, refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch

from csm.generation.voices import find_voices, load_voice, save_voice, voice_from_recording

TERMS = dict(text="one two", speaker_name="A. Speaker", licence="CC0-1.0", consent="recorded by the speaker for this test")


@pytest.fixture
def voice(small_codec):
    return voice_from_recording("warm", torch.sin(torch.arange(9000) / 20) * 0.3, small_codec, speaker=2, **TERMS)


def test_a_saved_voice_comes_back_whole(voice, small_codec, tmp_path):
    assert save_voice(voice, tmp_path) == tmp_path / "warm"
    again = load_voice("warm", [tmp_path / "elsewhere", tmp_path])
    assert torch.equal(again.codes, voice.codes) and again.codes.dtype == torch.int64
    assert {key: getattr(again, key) for key in TERMS} == TERMS
    turn = again.turn(small_codec)
    assert (turn.speaker, turn.text) == (2, "one two") and again.turn(small_codec, speaker=1).speaker == 1
    assert again.duration_s == 5 * 0.08
    with pytest.raises(FileExistsError, match="choose another name"):
        save_voice(voice, tmp_path)


def test_a_voice_of_another_codec_is_refused(voice, small_codec):
    voice.codec_digest = "0" * 64
    with pytest.raises(ValueError, match="was made with codec 000000000000"):
        voice.turn(small_codec)


def test_an_unknown_voice_is_answered_with_those_there_are(voice, tmp_path):
    save_voice(voice, tmp_path)
    assert find_voices([tmp_path, tmp_path / "missing"]) == {"warm": tmp_path / "warm"}
    with pytest.raises(FileNotFoundError, match="no voice 'cold' .* there are: warm"):
        load_voice("cold", [tmp_path])


@pytest.mark.parametrize("spoil", ["{", '{"name": "warm"}', '{"unknown": 1}'])
def test_a_spoilt_voice_is_named(voice, tmp_path, spoil):
    folder = save_voice(voice, tmp_path)
    (folder / "voice.json").write_text(spoil)
    with pytest.raises(ValueError, match="not a readable voice"):
        load_voice("warm", [tmp_path])


@pytest.mark.parametrize("change", [dict(consent=""), dict(licence=" "), dict(text=""), dict(speaker_name="")])
def test_terms_may_not_be_empty(small_codec, change):
    with pytest.raises(ValueError, match="is empty; a voice is kept with"):
        voice_from_recording("warm", torch.ones(4000), small_codec, **{**TERMS, **change})


@pytest.mark.parametrize("name", ["", "../up", "a b", "-", "x" * 65])
def test_names_stay_inside_the_folder(small_codec, name):
    with pytest.raises(ValueError, match="voice name"):
        voice_from_recording(name, torch.ones(4000), small_codec, **TERMS)


def test_recordings_that_cannot_be_used_are_refused(small_codec):
    with pytest.raises(ValueError, match="lasts 31.0 s, expected at most 30"):
        voice_from_recording("warm", torch.ones(31 * 24_000), small_codec, **TERMS)
    with pytest.raises(ValueError, match="no samples"):
        voice_from_recording("warm", torch.ones(0), small_codec, **TERMS)


def test_the_description_is_plain_json(voice, tmp_path):
    folder = save_voice(voice, tmp_path)
    assert json.loads((folder / "voice.json").read_text())["licence"] == "CC0-1.0"
    assert sorted(path.name for path in folder.iterdir()) == ["codes.safetensors", "voice.json"]
