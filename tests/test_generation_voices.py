"""Voice presets: kept with whose they are and on what terms, refused where they do not fit."""

from __future__ import annotations

import json

import pytest
import torch

from csm.codec.voices import VOICES_FOLDER, save_voice
from csm.generation.voices import find_voices, load_voice, voice_from_recording

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


@pytest.fixture(scope="module")
def demo_voices(demo_corpus_small):
    """The presets that come with the demo corpus, by name."""
    folders = [demo_corpus_small / VOICES_FOLDER]
    return {name: load_voice(name, folders) for name in find_voices(folders)}


def test_the_demo_corpus_ships_a_preset_of_each_of_its_voices(demo_voices, demo_corpus_small):
    from csm.codec import SpectralCodec

    codec = SpectralCodec.load(demo_corpus_small / "codec")
    assert {name: voice.speaker for name, voice in demo_voices.items()} == {"tenor": 0, "bass": 1, "piper": 2, "contralto": 3}
    for voice in demo_voices.values():
        assert voice.turn(codec).speaker == voice.speaker  # of this very codec
        assert 1.0 <= voice.duration_s <= 2.4 and voice.licence == "Apache-2.0" and "nobody was recorded" in voice.consent


def test_each_demo_preset_sounds_like_its_speaker(demo_voices, demo_corpus_small):
    """A speaker encoder, taught on turns of other texts that went through the same codec, names the voice of every preset's sound.

    On the 46 or more turns a voice of train: heldout's nine leave a contralto's sound between two voices on some machines.
    """
    from csm.codec import SpectralCodec
    from csm.data.shards import iter_samples
    from csm.listening.speaker import SpeakerEncoder, VoiceBook

    try:
        encoder = SpeakerEncoder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    codec = SpectralCodec.load(demo_corpus_small / "codec")
    turns = [turn for sample in iter_samples(demo_corpus_small / "train") for turn in sample.turns if turn.codes is not None]
    references = [(turn.speaker, turn.text, encoder.embed(codec.decode(turn.codes).numpy())) for turn in turns]
    names = {voice.speaker: name for name, voice in demo_voices.items()}
    book = VoiceBook([(names[speaker], text, embedding) for speaker, text, embedding in references if embedding is not None])
    for name, voice in demo_voices.items():
        similarities = book.similarities(encoder.embed(codec.decode(voice.codes).numpy()), voice.text)
        assert max(similarities, key=lambda each: similarities[each]) == name, similarities


def test_presets_travel_from_the_corpus_into_checkpoints_and_exports(demo_voices, demo_corpus_small, speaking_model, tmp_path):
    """`--voice NAME` needs nothing but the checkpoint."""
    from csm.cli.commands import main
    from csm.text import tokenizer_from_folder
    from csm.training.checkpoint import FolderCheckpointIO

    tokenizer = tokenizer_from_folder(demo_corpus_small)
    part = tmp_path / "step_000001"
    part.mkdir()
    speaking_model.save_pretrained(part)
    FolderCheckpointIO(speaking_model, tokenizer, demo_corpus_small / "codec").write_companions(part, {"optimizer_states": []})
    exported = tmp_path / "exported"
    assert main(["export", str(part), str(exported), "--layout", "csm"]) == 0
    for folder in (part, exported):
        voices = find_voices([folder / VOICES_FOLDER])
        assert set(voices) == set(demo_voices)
        assert torch.equal(load_voice("bass", [folder / VOICES_FOLDER]).codes, demo_voices["bass"].codes)


def test_a_generator_speaks_after_a_preset_that_came_with_its_checkpoint(voice, speaking_checkpoint, tmp_path):
    import shutil

    from csm import Generator

    folder = tmp_path / "checkpoint"
    shutil.copytree(speaking_checkpoint, folder)
    save_voice(voice, folder / VOICES_FOLDER)
    generator = Generator.from_pretrained(folder)
    alone = generator.generate_codes("six", 2, seed=1, max_duration_s=0.8)
    after = generator.generate_codes("six", 2, seed=1, max_duration_s=0.8, context=[generator.voice("warm")])
    assert generator.voice("warm").speaker == 2 and not torch.equal(alone, after)
    with pytest.raises(FileNotFoundError, match="there are: warm"):
        generator.voice("cold")


def test_an_older_corpus_gets_its_presets_and_keeps_its_bytes(demo_voices, demo_corpus_small, tmp_path):
    import shutil

    from data_prep.voices import add_voices

    folder = tmp_path / "corpus"
    shutil.copytree(demo_corpus_small, folder, ignore=shutil.ignore_patterns(VOICES_FOLDER))
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert add_voices(folder, json.loads((folder / "corpus.json").read_text())) == folder / VOICES_FOLDER
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.parts[0] != VOICES_FOLDER} == before
    for path in (folder / VOICES_FOLDER).rglob("*.*"):
        assert path.read_bytes() == (demo_corpus_small / path.relative_to(folder)).read_bytes()


@pytest.mark.parametrize("missing", ["--licence", "--consent"])
def test_the_command_refuses_a_voice_without_terms(speaking_checkpoint, tmp_path, capsys, missing):
    from csm.cli.commands import main

    terms = {"--text": "one two", "--speaker-name": "A. Speaker", "--licence": "CC0-1.0", "--consent": "given for this test"}
    arguments = ["voices", "add", "warm", "--voices", str(tmp_path), "--checkpoint", str(speaking_checkpoint), "--audio", "a.wav"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(part for name, value in terms.items() if name != missing for part in (name, value))])
    assert ended.value.code == 2 and missing in capsys.readouterr().err and not list(tmp_path.iterdir())
