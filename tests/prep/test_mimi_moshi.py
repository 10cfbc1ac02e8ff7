"""Mimi by moshi, its authors' own, beside transformers': the same random weights, the same codes and sound.

Ours agrees with transformers' in the core environment (tests/test_codec_mimi.py); transformers 4, which is here, it refuses.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from csm.codec.moshi_mimi import MoshiMimiCodec, names_of_transformers

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.prep

NUM_CODEBOOKS = 32
NUM_FRAMES = 25  # 2 s: below 10 s transformers 4 and moshi attend to the same positions


@pytest.fixture(scope="module")
def audio() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    time_s = torch.arange(NUM_FRAMES * 1920) / 24_000
    tone = 0.2 * torch.sin(2 * torch.pi * (200 + 150 * torch.sin(2 * torch.pi * 1.5 * time_s)) * time_s)
    return tone + 0.05 * torch.randn(len(time_s), generator=generator)


@pytest.fixture(scope="module")
def pair(audio):
    """(moshi's Mimi, transformers' Mimi) of the same random weights."""
    from moshi.models.loaders import get_mimi
    from transformers import MimiConfig, MimiModel

    torch.manual_seed(0)
    theirs = get_mimi(None, num_codebooks=NUM_CODEBOOKS)
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(("_initialized", "cluster_usage")):
                tensor.fill_(1.0)
            elif name.endswith(".scale"):
                tensor.fill_(0.1)  # 0.01 would hide what attention does
        # Centroids where the latents are, which random filters keep close together: so codes vary.
        latent = theirs.encode_to_latent(audio[None, None], quantize=False)
        for part in (theirs.quantizer.rvq_first, theirs.quantizer.rvq_rest):
            places = part.input_proj(latent)[0]  # [256, F]
            spread, middle = places.std(dim=1), places.mean(dim=1)
            for layer in part.vq.layers:
                layer._codebook.embedding_sum.copy_(middle + spread * torch.randn_like(layer._codebook.embedding_sum))
                middle, spread = torch.zeros_like(middle), 0.9 * spread
    theirs.load_state_dict(theirs.state_dict())  # moshi reckons centroids when it loads
    ours = MimiModel(MimiConfig(num_quantizers=NUM_CODEBOOKS)).eval()
    state = ours.state_dict()
    copied = set()
    for name, tensor in theirs.state_dict().items():
        places = names_of_transformers(name)
        for place, part in zip(places, tensor.chunk(len(places)), strict=True):
            assert state[place].shape == part.shape, (name, place)
            if place.endswith(("q_proj.weight", "k_proj.weight")):  # moshi turns neighbouring lanes, transformers halves
                part = part.view(8, -1, 2, part.shape[1]).transpose(1, 2).reshape(part.shape)
            state[place].copy_(part)
            copied.add(place)
    assert copied == set(state)
    ours.load_state_dict(state)
    return theirs.eval(), ours


def test_moshi_and_transformers_give_the_same_codes(pair, audio):
    theirs, ours = pair
    with torch.inference_mode():
        expected = theirs.encode(audio[None, None])[0]
        found = ours.encode(audio[None, None], num_quantizers=NUM_CODEBOOKS).audio_codes[0]
    assert found.shape == expected.shape == (NUM_CODEBOOKS, NUM_FRAMES)
    assert expected[0].unique().numel() > 3  # it says something
    assert (found == expected).float().mean() > 0.99  # a tie between two centroids may fall either way in float32


def test_moshis_stream_and_transformers_give_the_same_sound(pair):
    """moshi a frame at a time, and both as a whole; differences are float32 rounding."""
    theirs, ours = pair
    codes = torch.randint(0, 2048, (NUM_CODEBOOKS, NUM_FRAMES), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = theirs.decode(codes[None])[0, 0]
        with theirs.streaming(1):
            streamed = torch.cat([theirs.decode(codes[None, :, index : index + 1])[0, 0] for index in range(NUM_FRAMES)])
        found = ours.decode(codes[None]).audio_values[0, 0]
    assert len(found) == len(streamed) == len(whole) == NUM_FRAMES * 1920
    scale = float(whole.abs().max())
    torch.testing.assert_close(found / scale, whole / scale, atol=1e-4, rtol=0)
    torch.testing.assert_close(found / scale, streamed / scale, atol=1e-4, rtol=0)


def test_ours_refuses_the_transformers_that_gives_other_codes(pair):
    from csm.codec.mimi import MimiCodec

    with pytest.raises(ValueError, match="transformers 5.*stages=\\[encode,merge\\]"):
        MimiCodec(pair[1])


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory) -> Path:
    """transformers' files of the pair's weights."""
    folder = tmp_path_factory.mktemp("mimi")
    pair[1].save_pretrained(folder)
    return folder


def clips() -> list[torch.Tensor]:
    """Below and beyond ten seconds, where attention's window begins to matter."""
    generator = torch.Generator().manual_seed(3)
    return [0.1 * torch.randn(length, generator=generator) for length in (30_000, 1_920, 11 * 24_000, 5)]


def test_the_codec_by_moshi_gives_moshis_codes_alone_and_in_batches(pair, folder):
    codec = MoshiMimiCodec.load(folder)
    together = codec.encode(clips())
    assert [codes.shape for codes in together] == [(32, 16), (32, 1), (32, 138), (32, 1)]
    for clip, codes in zip(clips(), together, strict=True):
        padded = torch.nn.functional.pad(clip, (0, -len(clip) % 1920))
        with torch.inference_mode():
            assert (pair[0].encode(padded[None, None])[0] == codes).float().mean() > 0.99
    codes = together[0]
    stream = codec.stream()
    parts = [stream.push(codes[:, :5]), stream.push(codes[:, 5:]), stream.finish()]
    assert torch.equal(torch.cat(parts), codec.decode(codes))
    few = MoshiMimiCodec.load(folder, num_codebooks=8)
    assert few.digest != codec.digest and torch.equal(few.encode(clips()[:1])[0], codes[:8])


def test_both_environments_agree_on_digest_and_codes(folder, tmp_path):
    """The core environment's transformers, in a process of its own, on the same files: a data folder may be made by either."""
    core = ROOT / ".venv" / "bin" / "python"
    if not core.exists():
        pytest.skip("no core environment beside this one (make .venv)")
    script = (
        "import json, sys, torch\n"
        "from csm.codec import load_codec\n"
        "generator = torch.Generator().manual_seed(3)\n"
        "clips = [0.1 * torch.randn(length, generator=generator) for length in (30_000, 1_920, 11 * 24_000, 5)]\n"
        "codec = load_codec('mimi', sys.argv[1])\n"
        "print(json.dumps([codec.digest, [codes.tolist() for codes in codec.encode(clips)]]))\n"
    )
    done = subprocess.run([core, "-c", script, str(folder)], capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    digest, expected = json.loads(done.stdout.splitlines()[-1])
    codec = MoshiMimiCodec.load(folder)
    assert codec.digest == digest
    for theirs, ours in zip(expected, codec.encode(clips()), strict=True):
        assert (torch.tensor(theirs) == ours).float().mean() > 0.99


def test_another_shape_and_missing_tensors_are_refused(folder, tmp_path):
    from transformers import MimiConfig, MimiModel

    small = dict(hidden_size=32, num_filters=4, upsample_groups=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4)
    MimiModel(MimiConfig(**small)).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="no tensor|moshi's Mimi has"):
        MoshiMimiCodec.load(tmp_path / "small")
    with pytest.raises(ValueError, match="2 to 32 codebooks"):
        MoshiMimiCodec.load(folder, num_codebooks=64)
