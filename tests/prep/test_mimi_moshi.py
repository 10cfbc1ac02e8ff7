"""Mimi by moshi, its authors' own, beside transformers': the same random weights, the same codes and sound.

Ours agrees with transformers' in the core environment (tests/test_codec_mimi.py); transformers 4, which is here, it refuses.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.prep

NUM_CODEBOOKS = 32
NUM_FRAMES = 25  # 2 s: below 10 s transformers 4 and moshi attend to the same positions


def names_of_transformers(key: str) -> list[str]:
    """Where transformers keeps a tensor of moshi's; three places for the joined projections of attention."""
    key = key.replace("encoder.model.", "encoder.layers.").replace("decoder.model.", "decoder.layers.")
    for theirs, ours in (
        (".conv.conv.conv.", ".conv."),
        (".convtr.convtr.convtr.", ".conv."),
        (".conv.conv.", ".conv."),
        (".convtr.convtr.", ".conv."),
        ("_transformer.transformer.layers", "_transformer.layers"),
        ("self_attn.out_projs.0.", "self_attn.o_proj."),
        (".linear1.", ".mlp.fc1."),
        (".linear2.", ".mlp.fc2."),
        (".norm1.", ".input_layernorm."),
        (".norm2.", ".post_attention_layernorm."),
        ("layer_scale_1.", "self_attn_layer_scale."),
        ("layer_scale_2.", "mlp_layer_scale."),
        ("quantizer.rvq_first.", "quantizer.semantic_residual_vector_quantizer."),
        ("quantizer.rvq_rest.", "quantizer.acoustic_residual_vector_quantizer."),
        (".vq.layers.", ".layers."),
        ("._codebook._initialized", ".codebook.initialized"),
        ("._codebook.embedding_sum", ".codebook.embed_sum"),
        ("._codebook.", ".codebook."),
    ):
        key = key.replace(theirs, ours)
    if "in_projs.0." in key:
        return [key.replace("in_projs.0.", f"{name}_proj.") for name in "qkv"]
    return [key]


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
