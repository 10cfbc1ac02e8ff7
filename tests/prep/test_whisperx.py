"""WhisperX itself on short sound: words, its aligner, the whole command, and clear words where weights cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

pytestmark = pytest.mark.prep

ROOT = Path(__file__).resolve().parents[2]
LINES = ["please say seven four two", "what is the number", "the number is three three one", "thank you"]


@pytest.fixture(scope="module")
def talk() -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Two voices taking turns, 24 kHz, and (start_s, end_s) of each turn."""
    from data_prep.script import VOICES
    from data_prep.synthesis import Synthesizer, random_for

    synthesizer, parts, truth, position_s = Synthesizer(), [], [], 0.0
    for index, line in enumerate(LINES):
        clip = synthesizer.speak(line, VOICES[(0, 3)[index % 2]], random_for(5, "talk", index)).astype(np.float32) / 32_768
        parts += [np.zeros(14_400, np.float32), clip]
        truth.append((position_s + 0.6, position_s + 0.6 + len(clip) / 24_000))
        position_s = truth[-1][1]
    audio = np.concatenate([*parts, np.zeros(24_000, np.float32)])
    return audio + np.random.default_rng(0).normal(0, 3e-4, len(audio)).astype(np.float32), truth


def heard(talk, **settings):
    from csm.config import TranscribeConfig
    from csm.listening.asr import find_packaged_whisper
    from data_prep.transcribe import Transcriber

    config = TranscribeConfig(reader="whisperx", model=str(find_packaged_whisper()), **settings)
    transcriber = Transcriber(config)
    return transcriber, transcriber.transcribe(soxr.resample(talk[0], 24_000, 16_000).astype(np.float32))


def test_words_are_whisperxs_and_near_their_times(talk, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transcriber, transcript = heard(talk, language="en")
    assert transcriber.settings["reader"].startswith("whisperx 3.8.6")
    text = " ".join(word.word.strip().lower() for word in transcript.words)
    assert "what is the number" in text and "thank you" in text
    at = next(word for word in transcript.words if "thank" in word.word.lower())
    assert abs(at.start_s - talk[1][3][0]) < 0.25
    assert transcript.language == "en"


def test_whisperx_writes_as_the_prompt_does(talk, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, transcript = heard(talk, language="en", prompt="Seven four two. Two three. Zero.")
    assert "three three one" in " ".join(word.word.strip().lower() for word in transcript.words)


def test_where_the_aligner_cannot_be_had_it_is_said_what_is_missing(talk, monkeypatch, tmp_path, capsys):
    from csm.reachable import can_reach
    from data_prep.whisperx_reader import load_aligner

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    can_reach.cache_clear()
    load_aligner.cache_clear()
    assert load_aligner("en", "auto", "cpu") is None
    told = capsys.readouterr().err
    assert "WAV2VEC2_ASR_BASE_960H" in told and "download.pytorch.org" in told and str(tmp_path) in told
    with pytest.raises(ValueError, match="transcribe.aligner=nobody/wav2vec2.*huggingface-cli download"):
        load_aligner("en", "nobody/wav2vec2", "cpu")


def test_an_aligner_given_as_a_folder_times_the_words(talk, tmp_path):
    """The real `whisperx.align` over a wav2vec2 of random weights: its times mean nothing, but lie in order inside of the windows."""
    import torch
    from transformers import Wav2Vec2Config, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC, Wav2Vec2Processor

    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (tmp_path / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), unk_token="<unk>", pad_token="<pad>", word_delimiter_token="|")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(tmp_path)
    torch.manual_seed(0)
    size = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[32] * 7)
    config = Wav2Vec2Config(vocab_size=len(letters), num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, **size)
    Wav2Vec2ForCTC(config).save_pretrained(tmp_path)

    from csm.config import TranscribeConfig
    from csm.listening.asr import find_packaged_whisper
    from data_prep.transcript import Span
    from data_prep.whisperx_reader import WhisperXReader

    whisper = str(find_packaged_whisper())
    reader = WhisperXReader(whisper, TranscribeConfig(language="en", aligner=str(tmp_path)), "cpu", 0.7)
    assert reader.settings["aligner"] == [str(tmp_path)]
    duration_s = len(talk[0]) / 24_000
    segments = reader.read(soxr.resample(talk[0], 24_000, 16_000).astype(np.float32), [Span(0.0, duration_s)], "en", None)
    words = [word for segment in segments for word in segment.words]
    assert len(words) >= 10 and all(0 <= word.start_s <= word.end_s <= duration_s for word in words)
    assert all(before.start_s <= after.start_s for before, after in zip(words, words[1:], strict=False))


def test_pyannotes_pipeline_is_replaced_by_ours_where_its_weights_cannot_be_had(monkeypatch, capsys):
    from csm.config import DiarizeConfig
    from csm.reachable import can_reach
    from data_prep.diarize import Diarizer, load_diarizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    can_reach.cache_clear()
    assert type(load_diarizer(DiarizeConfig(pipeline="pyannote"))) is Diarizer
    told = capsys.readouterr().err
    assert "speaker-diarization-community-1" in told and "HF_TOKEN" in told and "licence" in told


def test_the_whole_command_gives_shards_by_whisperx(talk, tmp_path):
    from csm.listening.asr import find_packaged_whisper

    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "talk.wav", talk[0], 24_000)
    settings = ["prep=conversations", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "codec=spectral", "text=bytes"]
    settings += [f"transcribe.model={find_packaged_whisper()}", "transcribe.language=en", "num_workers=1", "val_share=0"]
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", *settings], cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "WAV2VEC2_ASR_BASE_960H" in done.stderr and "HF_TOKEN" in done.stderr  # what is missing, and how to get it
    with tarfile.open(next((tmp_path / "out" / "train").glob("*.tar"))) as tar:
        metas = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    turns = [turn for meta in metas for turn in meta["turns"]]
    assert [turn["speaker"] for turn in turns] == [0, 1, 0, 1]
    assert "what is the number" in turns[1]["text"].lower() and all(turn["words"] for turn in turns)
