"""Inputs nobody should give: each costs one clear error raised by our own code, or has a result that the docs state."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from csm import CSM, Turn
from csm.cli.commands import main
from csm.generation import Generator
from csm.text import ByteTokenizer
from tests.conftest import ROOT, tiny_config


@pytest.fixture(scope="module")
def speaker(speaking_model, small_codec, word_tokenizer) -> Generator:
    return Generator(speaking_model, small_codec, word_tokenizer, None)


@pytest.fixture(scope="module")
def byte_speaker(small_codec) -> Generator:
    """Reads any text, as CSM with Llama-3's tokenizer does."""
    return Generator(CSM(tiny_config(text_vocab_size=258), seed=1), small_codec, ByteTokenizer(), None)


def tone(num_samples: int = 4000) -> torch.Tensor:
    return torch.sin(torch.arange(num_samples) / 15) * 0.4


def heard(audio: torch.Tensor, text: str = "two", speaker: int = 0) -> dict:
    return dict(text="one", context=[Turn(speaker, text, audio=audio)])


def coded(codes: torch.Tensor) -> dict:
    return dict(text="one", context=[Turn(0, "two", codes=codes)])


REFUSED = [
    ("empty text", dict(text=""), "expected something to say"),
    ("blank text", dict(text=" \t\n"), "expected something to say"),
    ("no text", dict(text=None), "expected something to say"),
    ("text of another type", dict(text=b"one"), "expected something to say"),
    ("unknown word", dict(text="hello"), "never heard"),
    ("a time", dict(text="10:30"), "'10:30', which this model never heard"),
    ("emoji only", dict(text="😀🎉"), "never heard"),
    ("brackets", dict(text="one [laughs] two"), r"'\[', which this model never heard"),
    ("a speaker inside a text", dict(text="one [1]two"), r"'\[1\]', which this model never heard"),
    ("control markup", dict(text="<|begin_of_text|>"), "never heard"),
    ("10,000 characters", dict(text="one " * 2500), "exceed the window of 128"),
    ("10,000 unknown characters", dict(text="x" * 10_000), "never heard"),
    ("unknown speaker", dict(text="one", speaker=9), r"\[9\]"),
    ("negative speaker", dict(text="one", speaker=-1), "speaker -1"),
    ("longest reply over the window", dict(text="one", max_duration_s=1e6), "exceed the window"),
    ("no duration", dict(text="one", max_duration_s=0), "max_duration_s=0"),
    ("infinite duration", dict(text="one", max_duration_s=float("inf")), "max_duration_s=inf"),
    ("least over most", dict(text="one", min_duration_s=2.0, max_duration_s=1.0), "min_duration_s=2.0 is more than max_duration_s=1.0"),
    ("negative least", dict(text="one", min_duration_s=-1.0), "min_duration_s=-1.0"),
    ("temperature that is no number", dict(text="one", temperature=float("nan")), "temperature=nan"),
    ("negative top-k", dict(text="one", top_k=-1), "top_k=-1"),
    ("seed out of range", dict(text="one", seed=2**63), "seed=9223372036854775808"),
    ("seed of another type", dict(text="one", seed=1.5), "seed=1.5"),
    ("context without sound", dict(text="one", context=[Turn(0, "two")]), "context turn 0 has neither audio nor codes"),
    ("context without text", heard(tone(), ""), "context turn 0 has no text"),
    ("context of an unknown word", heard(tone(), "hello"), "never heard"),
    ("context of an unknown speaker", heard(tone(), speaker=7), r"\[7\]"),
    ("stereo", heard(torch.zeros(2, 4000)), "context turn 0: .*mono"),
    ("zero length", heard(torch.zeros(0)), "context turn 0: .*no samples"),
    ("NaN audio", heard(tone() * float("nan")), "context turn 0: .*not finite"),
    ("infinite audio", heard(tone() / 0.0), "context turn 0: .*not finite"),
    ("whole numbers as audio", heard(torch.ones(4000, dtype=torch.int16)), "context turn 0: .*float32"),
    ("codes of another codec", coded(torch.ones(8, 3, dtype=torch.int64)), r"expected int64 \[4, F\]"),
    ("codes over the table", coded(torch.full((4, 3), 33)), "codes from 33 to 33"),
    ("negative codes", coded(torch.full((4, 3), -1)), "codes from -1 to -1"),
    ("codes that mean EOS", coded(torch.zeros(4, 3, dtype=torch.int64)), "zero codes, which means EOS"),
    ("no codes", coded(torch.zeros(4, 0, dtype=torch.int64)), "context turn 0 has codes"),
    ("codes as floats", coded(torch.ones(4, 3)), "context turn 0 has codes torch.float32"),
]


@pytest.mark.parametrize(("arguments", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_by_our_own_code_before_the_first_chunk(speaker, arguments, message):
    for way in (speaker.stream, speaker.generate_codes):
        with pytest.raises(ValueError, match=f"(?s){message}") as caught:
            way(**arguments)
        raised_in = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
        assert raised_in.is_relative_to(ROOT / "csm"), f"raised in {raised_in}"
        assert len(str(caught.value)) < 1_000, "a message to read, not the input again"


ANSWERED = [
    ("a time", dict(text="10:30")),
    ("brackets", dict(text="[laughs] well (yes)")),
    ("a speaker inside a text", dict(text="[1]two")),
    ("emoji only", dict(text="😀")),
    ("control markup", dict(text="<|begin_of_text|>")),
    ("a zero byte", dict(text="one\x00two")),
    ("a lone combining mark", dict(text="\u0301")),
    ("another script", dict(text="你好")),
    ("context longer than the window", dict(text="one", context=[Turn(0, "two", codes=torch.ones(4, 200, dtype=torch.int64))])),
    ("one sample of context", dict(text="one", context=[Turn(0, "two", audio=torch.ones(1))])),
    ("context louder than full scale", dict(text="one", context=[Turn(0, "two", audio=tone() * 100)])),
    ("silence as context", dict(text="one", context=[Turn(0, "two", audio=torch.zeros(4000))])),
    ("top-k over the vocabulary", dict(text="one", top_k=10**6)),
    ("temperature so small that logits overflow", dict(text="one", temperature=1e-30)),
    ("a reply shorter than a frame", dict(text="one", max_duration_s=1e-6)),
]


@pytest.mark.parametrize("arguments", [case[1] for case in ANSWERED], ids=[case[0] for case in ANSWERED])
def test_answered_with_sound_that_is_finite(byte_speaker, arguments):
    options = {"max_duration_s": 0.4, "seed": 1, **arguments}
    clip = byte_speaker.generate(**options)
    assert clip.shape[0] == byte_speaker.last.codes.shape[0] * 1920 and torch.isfinite(clip).all()
    if "longer" in str(arguments.get("context", "")) or any(turn.codes is not None for turn in arguments.get("context", ())):
        assert byte_speaker.last.num_dropped_turns == 1


def without_codec(folder: Path) -> None:
    shutil.rmtree(folder / "codec")


def with_another_codec(folder: Path) -> None:
    description = json.loads((folder / "codec" / "codec.json").read_text())
    (folder / "codec" / "codec.json").write_text(json.dumps({**description, "digest": "0" * 64}))


def torn(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    text = json.dumps(config).replace('"num_codebooks": 4', '"num_codebooks": 5')
    assert text != json.dumps(config)
    (folder / "config.json").write_text(text)


def config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def tokenizer_of_another_kind(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"kind": "phonemes"}))


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.bin")


WRONG_CHECKPOINTS = [
    (without_codec, "brings no codec"),
    (with_another_codec, "digest"),
    (torn, "model.safetensors"),
    (of_another_shape, ""),
    (config_that_is_no_json, "config.json"),
    (tokenizer_of_another_kind, "phonemes"),
    (pickled, "pickles only"),
    (shutil.rmtree, "no such"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG_CHECKPOINTS, ids=[case[0].__name__ for case in WRONG_CHECKPOINTS])
def test_wrong_checkpoints_cost_one_line(speaking_checkpoint, tmp_path, capsys, spoil: Callable[[Path], None], message: str):
    folder = Path(shutil.copytree(speaking_checkpoint, tmp_path / "checkpoint"))
    spoil(folder)
    assert main(["generate", "--checkpoint", str(folder), "--text", "one", "--out", str(tmp_path / "o.wav")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "o.wav").exists()


def test_conversation_files_of_any_rate_and_channels_are_heard(speaking_checkpoint, tmp_path):
    """Documented: resampled to 24 kHz, channels averaged; a stereo file of two equal channels is its mono."""
    samples = np.sin(np.arange(16_000) / 20).astype(np.float32) * 0.3
    heard_codes = []
    for name, shape, rate in (("mono", samples, 16_000), ("stereo", np.stack([samples] * 2, axis=1), 16_000), ("odd", samples, 11_025)):
        soundfile.write(tmp_path / f"{name}.wav", shape, rate)
        (tmp_path / "c.json").write_text(json.dumps([{"speaker": 0, "text": "one", "audio": f"{name}.wav"}]))
        command = ["generate", "--checkpoint", str(speaking_checkpoint), "--text", "two", "--context", str(tmp_path / "c.json")]
        assert main([*command, "--seed", "1", "--max-duration", "0.4", "--out", str(tmp_path / f"{name}.out.wav")]) == 0
        heard_codes.append(soundfile.read(tmp_path / f"{name}.out.wav")[0])
    assert np.array_equal(heard_codes[0], heard_codes[1]) and not np.array_equal(heard_codes[0], heard_codes[2])
