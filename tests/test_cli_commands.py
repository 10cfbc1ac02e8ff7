"""The `csm` command as a user would run it: sound comes out, mistakes cost one line and status 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from csm.cli.commands import main
from csm.generation.audio_files import read_provenance

SHORT = ["--max-duration", "0.8", "--seed", "5"]


@pytest.fixture
def prompt_file(tmp_path) -> Path:
    path = tmp_path / "prompt.wav"
    soundfile.write(path, np.sin(np.arange(8000) / 20) * 0.3, 24_000)
    return path


@pytest.fixture
def conversation(tmp_path, prompt_file) -> Path:
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps([{"speaker": 0, "text": "one two", "audio": prompt_file.name}]))
    return path


def generate(checkpoint: Path, out: Path | str, *more: str) -> int:
    return main(["generate", "--checkpoint", str(checkpoint), "--out", str(out), *SHORT, *more])


def refused(capsys, arguments: list[str], message: str) -> None:
    """Status 2 and one line that holds the message."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines


@pytest.mark.parametrize("name", ["out.wav", "out.flac"])
def test_generate_writes_sound_with_its_provenance(speaking_checkpoint, tmp_path, capsys, name):
    out = tmp_path / "new" / name
    assert generate(speaking_checkpoint, out, "--text", "seven four", "--speaker", "1") == 0
    samples, sample_rate = soundfile.read(out)
    assert sample_rate == 24_000 and samples.shape == (19_200,) and soundfile.info(out).subtype == "PCM_16"
    noted = read_provenance(out)
    assert noted["synthetic"] is True and noted["watermark"] == "keyed+perth" and noted["seed"] == 5 and noted["speaker"] == 1
    report = capsys.readouterr().err
    assert "10 frames, 0.80 s of speech" in report and "RTF" in report and "watermark keyed+perth" in report
    assert [path.name for path in out.parent.iterdir()] == [name]


def test_streamed_raw_and_whole_files_hold_the_same_samples(speaking_checkpoint, tmp_path):
    assert generate(speaking_checkpoint, tmp_path / "whole.wav", "--text", "one") == 0
    assert generate(speaking_checkpoint, tmp_path / "streamed.wav", "--text", "one", "--stream") == 0
    arguments = ["--checkpoint", str(speaking_checkpoint), "--text", "one", *SHORT, "--threads", "1"]  # as the tests here
    command = [sys.executable, "-m", "csm.cli.commands", "generate", *arguments]
    raw = subprocess.run([*command, "--out", "-"], capture_output=True, check=True, timeout=120, cwd=Path(__file__).parents[1])
    whole = soundfile.read(tmp_path / "whole.wav", dtype="int16")[0]
    assert (whole == soundfile.read(tmp_path / "streamed.wav", dtype="int16")[0]).all()
    assert (whole == np.frombuffer(raw.stdout, dtype="<i2")).all()


def test_the_watermark_command_tells_by_its_status(speaking_checkpoint, prompt_file, tmp_path, capsys):
    out, bare = tmp_path / "out.wav", tmp_path / "bare.wav"
    options = ["--text", "one two three", "--max-duration", "3", "--temperature", "1.5"]
    assert generate(speaking_checkpoint, out, *options) == 0
    assert generate(speaking_checkpoint, bare, *options, "--watermark", "off") == 0
    assert read_provenance(bare)["watermark"] == "off"
    assert not np.array_equal(soundfile.read(out)[0], soundfile.read(bare)[0])
    capsys.readouterr()
    assert main(["watermark", str(out)]) == 0
    assert "marked (keyed, p <" in capsys.readouterr().out
    assert main(["watermark", "--json", str(out), str(prompt_file)]) == 1
    assert [entry["is_marked"] for entry in json.loads(capsys.readouterr().out)] == [True, False]


def test_context_and_voice_change_what_is_said(speaking_checkpoint, conversation, prompt_file, tmp_path, capsys):
    voices = ["--voices", str(tmp_path / "voices")]
    terms = ["--text", "one two", "--speaker-name", "A. Speaker", "--licence", "CC0-1.0", "--consent", "given for this test"]
    recording = ["--checkpoint", str(speaking_checkpoint), "--audio", str(prompt_file), "--speaker", "2"]
    add = ["voices", "add", "warm", *voices, *recording, *terms]
    assert main(add) == 0
    capsys.readouterr()
    assert main(["voices", "list", *voices]) == 0 and "warm" in capsys.readouterr().out
    assert main(["voices", "show", "warm", *voices]) == 0
    assert json.loads(capsys.readouterr().out)["consent"] == "given for this test"
    refused(capsys, add, "exists; choose another name")
    spoken = {}
    speaker = ["--speaker", "2"]
    extras = {"plain": speaker, "context": [*speaker, "--context", str(conversation)], "voice": [*voices, "--voice", "warm"]}
    for name, extra in extras.items():
        assert generate(speaking_checkpoint, tmp_path / f"{name}.wav", "--text", "six", *extra) == 0
        spoken[name] = soundfile.read(tmp_path / f"{name}.wav")[0].tobytes()
    assert len(set(spoken.values())) == 3
    assert read_provenance(tmp_path / "voice.wav")["speaker"] == 2


def test_jsonl_lines_equal_single_commands(speaking_checkpoint, conversation, tmp_path):
    turn = json.loads(conversation.read_text())
    lines = [{"text": "one", "out": "a.wav"}, {"text": "two three", "speaker": 1, "seed": 9, "context": turn}]
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    assert generate(speaking_checkpoint, tmp_path / "spoken", "--jsonl", str(tmp_path / "lines.jsonl")) == 0
    assert generate(speaking_checkpoint, tmp_path / "a.wav", "--text", "one") == 0
    again = ["--text", "two three", "--speaker", "1", "--seed", "9", "--context", str(conversation)]
    assert generate(speaking_checkpoint, tmp_path / "b.wav", *again) == 0
    for batched, single in (("a.wav", "a.wav"), ("00002.wav", "b.wav")):
        assert np.array_equal(soundfile.read(tmp_path / "spoken" / batched)[0], soundfile.read(tmp_path / single)[0])


def test_other_rates_and_stereo_prompts_are_converted(speaking_checkpoint, tmp_path):
    soundfile.write(tmp_path / "stereo.wav", np.ones((8000, 2)) * 0.1, 44_100)
    path = tmp_path / "c.json"
    path.write_text(json.dumps([{"speaker": 0, "text": "one", "audio": "stereo.wav"}]))
    assert generate(speaking_checkpoint, tmp_path / "out.wav", "--text", "two", "--context", str(path)) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text", ""], "--text is empty"),
        (["--text", "hello"], "'hello', which this model never heard"),
        (["--text", "😀"], "never heard"),
        (["--text", "one " * 2500], "exceed the window"),
        (["--text", "one", "--speaker", "9"], "[9]"),
        (["--text", "one", "--speaker", "-1"], "speaker -1"),
        (["--text", "one", "--temperature", "-1"], "temperature=-1.0"),
        (["--text", "one", "--temperature", "nan"], "temperature=nan"),
        (["--text", "one", "--top-k", "-1"], "top_k=-1"),
        (["--text", "one", "--max-duration", "0"], "max_duration_s=0.0"),
        (["--text", "one", "--max-duration", "1000"], "exceed the window"),
        (["--text", "one", "--seed", "-1"], "seed=-1"),
        (["--text", "one", "--out", "out.mp3"], "ends in .wav or .flac"),
        (["--text", "one", "--checkpoint", "nowhere"], "nowhere"),
        (["--text", "one", "--voice", "cold"], "no voice 'cold'"),
        (["--text", "one", "--device", "tpu9"], "not a device of this machine"),
        (["--text", "one", "--context", "missing.json"], "missing.json: no such file"),
        (["--jsonl", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--jsonl", "missing.jsonl", "--stream"], "--batch writes files"),
    ],
)
def test_hostile_options_of_generate_cost_one_line(speaking_checkpoint, tmp_path, monkeypatch, capsys, more, message):
    monkeypatch.chdir(tmp_path)
    refused(capsys, ["generate", "--checkpoint", str(speaking_checkpoint), "--out", "out.wav", *SHORT, *more], message)
    assert not list(tmp_path.glob("out*"))


def broken_audio(folder: Path) -> None:
    soundfile.write(folder / "empty.wav", np.zeros(0), 24_000)
    soundfile.write(folder / "nan.wav", np.full(4000, np.nan, dtype=np.float32), 24_000, subtype="FLOAT")
    (folder / "text.wav").write_text("no sound")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("{}", "a dict, expected a list"),
        ("[1]", "turn 0 is int"),
        ('[{"speaker": 0, "text": "one"}]', "turn 0 is ['speaker', 'text']"),
        ('[{"speaker": "0", "text": "one", "audio": "x.wav"}]', "speaker must be a whole number"),
        ('[{"speaker": 0, "text": "one", "audio": "x.wav"}]', "x.wav: no such file"),
        ('[{"speaker": 0, "text": "one", "audio": "empty.wav"}]', "no samples in it"),
        ('[{"speaker": 0, "text": "one", "audio": "nan.wav"}]', "not finite"),
        ('[{"speaker": 0, "text": "one", "audio": "text.wav"}]', "not a sound file"),
        ('[{"speaker": 0, "text": "one", "audio": "."}]', "no such file"),
        ('[{"speaker": 7, "text": "one", "audio": "good.wav"}]', "[7]"),
        ('[{"speaker": 0, "text": "", "audio": "good.wav"}]', "context turn 0 has no text"),
    ],
)
def test_hostile_conversations_cost_one_line(speaking_checkpoint, tmp_path, capsys, content, message):
    broken_audio(tmp_path)
    soundfile.write(tmp_path / "good.wav", np.ones(4000) * 0.1, 24_000)
    (tmp_path / "c.json").write_text(content)
    arguments = ["generate", "--checkpoint", str(speaking_checkpoint), "--text", "one", "--out", str(tmp_path / "o.wav"), *SHORT]
    refused(capsys, [*arguments, "--context", str(tmp_path / "c.json")], message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 1 is not JSON"),
        ("[]", "line 1 is a list"),
        ("\n", "no requests in it"),
        ('{"text": 5}', "line 1: text is 5"),
        ('{"text": "one", "tempo": 1}', "key 'tempo' is not known"),
        ('{"text": "one", "out": "../a.wav"}', "leaves the folder"),
        ('{"text": "one", "out": "a.txt"}', "ends in .wav or .flac"),
        ('{"text": "one", "seed": "x"}', "line 1"),
        ('{"text": "one", "out": "a.wav"}\n{"text": "two", "out": "a.wav"}', "same out"),
    ],
)
def test_hostile_lines_cost_one_line(speaking_checkpoint, tmp_path, capsys, line, message):
    (tmp_path / "l.jsonl").write_text(line)
    arguments = ["generate", "--checkpoint", str(speaking_checkpoint), "--out", str(tmp_path / "o"), *SHORT]
    refused(capsys, [*arguments, "--jsonl", str(tmp_path / "l.jsonl")], message)


def test_hostile_checkpoints_cost_one_line(speaking_checkpoint, tmp_path, capsys):
    import shutil

    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(speaking_checkpoint, tmp_path / name))

    no_codec, no_tokenizer, torn = spoilt("no_codec"), spoilt("no_tokenizer"), spoilt("torn")
    shutil.rmtree(no_codec / "codec")
    (no_tokenizer / "tokenizer.json").unlink()
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for folder, message in ((no_codec, "brings no codec"), (no_tokenizer, "brings no tokenizer.json"), (torn, "model.safetensors")):
        refused(capsys, ["generate", "--checkpoint", str(folder), "--text", "one", "--out", str(tmp_path / "o.wav")], message)


def test_watermark_refuses_what_is_no_sound(tmp_path, capsys):
    broken_audio(tmp_path)
    for name, message in (("empty.wav", "no samples"), ("nan.wav", "not finite"), ("text.wav", "not a sound file"), ("x", "no such file")):
        refused(capsys, ["watermark", str(tmp_path / name)], message)


@pytest.mark.parametrize("layout", ["csm", "sesame", "transformers"])
def test_exported_checkpoints_load_again(speaking_checkpoint, speaking_model, tmp_path, layout, capsys):
    from csm import CSM

    target = tmp_path / layout
    assert main(["export", str(speaking_checkpoint), str(target), "--layout", layout]) == 0
    again = CSM.from_pretrained(target).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in speaking_model.state_dict().items())
    if layout == "csm":
        assert generate(target, tmp_path / "out.wav", "--text", "one") == 0
    capsys.readouterr()
    refused(capsys, ["export", str(speaking_checkpoint), str(target), "--layout", layout], "not an empty folder")


def test_mimi_travels_from_transformers_through_ours_and_back(tmp_path, capsys):
    """The codec and the weights are the same bytes, and transformers misses nothing."""
    from transformers import CsmForConditionalGeneration, MimiConfig, MimiModel

    from csm import CSM
    from csm.codec import codec_from_folder
    from csm.model.pretrained import CodecWeights, load_codec_weights
    from tests.conftest import tiny_config

    settings = {
        "num_filters": 4, "hidden_size": 32, "upsample_groups": 32, "vector_quantization_hidden_dimension": 16, "codebook_dim": 16,
        "codebook_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
        "intermediate_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    codec = MimiModel(MimiConfig(**settings)).state_dict()
    model = CSM(tiny_config(num_codebooks=4))
    model.save_pretrained(tmp_path / "first", layout="transformers", codec=CodecWeights({**settings, "model_type": "mimi"}, codec))
    assert main(["export", str(tmp_path / "first"), str(tmp_path / "ours"), "--layout", "csm"]) == 0
    assert codec_from_folder(tmp_path / "ours" / "codec").num_codebooks == 4
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "second"), "--layout", "transformers"]) == 0
    assert "no Mimi" not in capsys.readouterr().out
    carried = load_codec_weights(tmp_path / "second")
    assert carried is not None and carried.tensors.keys() == codec.keys()
    assert all(torch.equal(carried.tensors[name], tensor) for name, tensor in codec.items())
    theirs, info = CsmForConditionalGeneration.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(theirs.depth_decoder.codebooks_head.weight, model.audio_head)


def test_export_without_mimi_or_llama3_says_what_is_left_out(speaking_checkpoint, tmp_path, capsys):
    assert main(["export", str(speaking_checkpoint), str(tmp_path / "out"), "--layout", "transformers"]) == 0
    said = capsys.readouterr().out
    assert "no Mimi" in said and "no Llama-3 tokenizer" in said


def test_llama3_tokenizer_becomes_the_processor(tmp_path, monkeypatch):
    from csm.cli.export import _llama3_files_of

    monkeypatch.setattr("csm.text.packaged_llama3", lambda: tmp_path)
    assert _llama3_files_of(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "words"}))
    assert _llama3_files_of(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps({"kind": "llama3", "source": None}))
    assert _llama3_files_of(tmp_path) == tmp_path


@pytest.mark.parametrize("arguments", [[], ["generate"], ["nonsense"], ["export", "a", "b", "--layout", "other"], ["voices"]])
def test_incomplete_command_lines_leave_with_status_2(arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2


@pytest.mark.parametrize(
    "command", [[], ["generate"], ["watermark"], ["export"], ["voices"], ["voices", "add"], ["plan"], ["listen"], ["listen", "page"]]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0 and "usage: csm" in capsys.readouterr().out
