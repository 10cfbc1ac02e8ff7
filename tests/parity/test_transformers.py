"""transformers' CSM and ours are the same model: same weights and rows in, same logits and losses out, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from csm import CSM, csm_loss
from csm.frames import Batch
from csm.model.pretrained import CodecWeights, detect_layout, load_codec_weights
from csm.model.transformer import rope_frequencies

LOGITS_TOLERANCE = 2e-4  # float32, other order of sums; logits here are up to about 10
LOSS_TOLERANCE = 1e-5  # float32 means over a few hundred targets


@pytest.fixture
def exported(loud_model: CSM, small_mimi: CodecWeights, tmp_path: Path) -> Path:
    loud_model.save_pretrained(tmp_path / "exported", layout="transformers", codec=small_mimi)
    return tmp_path / "exported"


def load_theirs(folder: Path):
    from transformers import CsmForConditionalGeneration

    model, info = CsmForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


def run_theirs(model, batch: Batch):
    """The reference call: summed embeddings and three-dimensional labels, no cache."""
    tokens, mask = batch.tokens, batch.mask
    offsets = torch.arange(tokens.shape[-1] - 1) * model.config.vocab_size
    table = model.backbone_model.embed_tokens.embed_audio_tokens
    embeds = model.embed_text_tokens(tokens[..., -1]) * mask[..., -1:]
    embeds = embeds + (table(tokens[..., :-1] + offsets) * mask[..., :-1, None]).sum(dim=2)
    labels = tokens[..., :-1].masked_fill(~mask[..., :-1], -100)
    return model(inputs_embeds=embeds, labels=labels, use_cache=False)


def run_ours(model: CSM, batch: Batch) -> tuple[Tensor, Tensor]:
    frames = batch.mask[..., 0].nonzero()
    out = model(batch.tokens, batch.mask, document_ids=batch.document_ids, depth_index=frames)
    return out.c0_logits, out.depth_logits


def test_export_loads_without_missing_or_unexpected_keys(exported):
    _, info = load_theirs(exported)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@torch.no_grad()
def test_logits_equal_transformers(loud_model, exported, batch):
    theirs, _ = load_theirs(exported)
    reference = run_theirs(theirs, batch)
    c0_logits, depth_logits = run_ours(loud_model, batch)
    is_real = batch.document_ids >= 0
    torch.testing.assert_close(c0_logits[is_real], reference.logits[is_real], atol=LOGITS_TOLERANCE, rtol=0)
    torch.testing.assert_close(depth_logits, reference.depth_decoder_logits, atol=LOGITS_TOLERANCE, rtol=0)
    assert c0_logits.std() > 0.5 and depth_logits.std() > 0.1  # loud enough for the tolerance to mean something


@torch.no_grad()
def test_losses_equal_transformers(loud_model, exported, batch):
    theirs, _ = load_theirs(exported)
    reference = run_theirs(theirs, batch)
    losses = csm_loss(loud_model, batch, amortization=1.0)
    assert abs(losses.c0 - reference.backbone_loss) < LOSS_TOLERANCE
    assert abs(losses.depth - reference.depth_decoder_loss) < LOSS_TOLERANCE
    assert abs(losses.loss - reference.loss) < 2 * LOSS_TOLERANCE


def test_gradients_equal_transformers(loud_model, exported, batch):
    theirs, _ = load_theirs(exported)
    run_theirs(theirs, batch).loss.backward()
    csm_loss(loud_model, batch, amortization=1.0).loss.backward()
    pairs = {
        "codebook0_head.weight": theirs.lm_head.weight,
        "audio_embeddings.weight": theirs.depth_decoder.model.embed_tokens.weight,
        "text_embeddings.weight": theirs.embed_text_tokens.weight,
        "audio_head": theirs.depth_decoder.codebooks_head.weight,
        "projection.weight": theirs.depth_decoder.model.inputs_embeds_projector.weight,
        "backbone.layers.0.mlp.w1.weight": theirs.backbone_model.layers[0].mlp.gate_proj.weight,
        "backbone.layers.0.attn.v_proj.weight": theirs.backbone_model.layers[0].self_attn.v_proj.weight,
        "backbone.layers.1.sa_norm.scale": theirs.backbone_model.layers[1].input_layernorm.weight,
        "decoder.norm.scale": theirs.depth_decoder.model.norm.weight,
    }
    ours = dict(loud_model.named_parameters())
    for name, parameter in pairs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_rope_frequencies_equal_transformers(loud_model, exported):
    theirs, _ = load_theirs(exported)
    for ours, reference in (
        (loud_model.config.backbone, theirs.backbone_model.rotary_emb),
        (loud_model.config.depth_decoder, theirs.depth_decoder.model.rotary_emb),
    ):
        torch.testing.assert_close(rope_frequencies(ours), reference.inv_freq, atol=0, rtol=1e-6)


def test_what_transformers_saves_loads_here(loud_model, exported, tmp_path):
    theirs, _ = load_theirs(exported)
    theirs.save_pretrained(tmp_path / "theirs")
    again = CSM.from_pretrained(tmp_path / "theirs")
    for name, tensor in loud_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000], ids=["one_file", "shards"])
def test_round_trip_is_bit_identical(loud_model, small_mimi, tmp_path, max_shard_bytes):
    model = loud_model
    for number, layout in enumerate(["sesame", "csm", "transformers", "csm"]):
        folder = tmp_path / f"{number}_{layout}"
        model.save_pretrained(folder, layout=layout, max_shard_bytes=max_shard_bytes)
        assert detect_layout(folder) == layout
        assert (folder / "model.safetensors").is_file() == (layout == "sesame" or max_shard_bytes > 20_000)
        model = CSM.from_pretrained(folder, dtype=None)
    assert model.config == loud_model.config
    for name, tensor in loud_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_codec_inside_an_export_comes_back_unchanged(exported, small_mimi):
    carried = load_codec_weights(exported)
    assert carried is not None and carried.config["hidden_size"] == small_mimi.config["hidden_size"]
    assert carried.tensors.keys() == small_mimi.tensors.keys()
    assert all(torch.equal(carried.tensors[name], tensor) for name, tensor in small_mimi.tensors.items())


def test_both_copies_of_the_audio_table_are_written(exported):
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", framework="pt") as tensors:
        backbone = tensors.get_tensor("backbone_model.embed_tokens.embed_audio_tokens.weight")
        assert torch.equal(backbone, tensors.get_tensor("depth_decoder.model.embed_tokens.weight"))


def test_generation_config_is_read_by_transformers(exported):
    theirs, _ = load_theirs(exported)
    depth = theirs.depth_decoder.generation_config
    assert theirs.generation_config.temperature == 0.9 and theirs.generation_config.top_k == 50 and theirs.generation_config.do_sample
    assert depth.max_new_tokens == depth.min_new_tokens == theirs.config.num_codebooks - 1
    assert depth.temperature == 0.9 and depth.top_k == 50 and depth.do_sample
    ids = torch.tensor([[1, 2, 3]])
    frames = theirs.generate(input_ids=ids, max_new_tokens=3, attention_mask=torch.ones_like(ids))
    assert frames.shape[-1] == theirs.config.num_codebooks


def test_config_of_csm_1b_says_what_sesame_published(shipped_model_config):
    """Source of the expected numbers: DESIGN.md section 1."""
    from csm.model.layouts import config_from_json, sesame_json, transformers_json

    config = shipped_model_config("csm_1b")
    written = transformers_json(config, None)
    rope = {key: written["rope_parameters"][key] for key in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}
    assert rope == {"original_max_position_embeddings": 1024, "low_freq_factor": 0.125, "high_freq_factor": 0.5}
    depth = written["depth_decoder_config"]["rope_parameters"]
    assert (depth["original_max_position_embeddings"], depth["low_freq_factor"], depth["high_freq_factor"]) == (16, 0.001953125, 0.0078125)
    assert written["codebook_pad_token_id"] == 2050 and written["depth_decoder_config"]["max_position_embeddings"] == 33
    assert sesame_json(config) == {
        "audio_num_codebooks": 32,
        "audio_vocab_size": 2051,
        "backbone_flavor": "llama-1B",
        "decoder_flavor": "llama-100M",
        "text_vocab_size": 128256,
    }
    for values in (written, sesame_json(config)):
        assert config_from_json(json.loads(json.dumps(values)), "here") == config


def test_config_of_transformers_4_is_read(any_model_config):
    from csm.model.layouts import config_from_json, transformers_json

    values = transformers_json(any_model_config, None)
    for part in (values, values["depth_decoder_config"]):
        rope = part.pop("rope_parameters")
        part["rope_theta"] = rope.pop("rope_theta")
        part["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    assert config_from_json(values, "here") == any_model_config


def test_exported_processor_writes_turns_as_our_tokenizer_does(tiny_model_config, tmp_path):
    """Needs Llama-3's tokenizer from the llama-models package."""
    from dataclasses import replace
    from importlib.metadata import files

    import numpy as np
    from transformers import AutoProcessor

    from csm.text import Llama3Tokenizer

    packaged = [entry for entry in files("llama-models") or [] if entry.match("llama3/tokenizer.model")]
    ours = Llama3Tokenizer()
    model = CSM(replace(tiny_model_config, text_vocab_size=128256))
    model.save_pretrained(tmp_path, layout="transformers", tokenizer=str(packaged[0].locate()))
    processor = AutoProcessor.from_pretrained(tmp_path)
    texts = ["Hello, isn't it 12345 o'clock?", " naïve   spaces\n", "<|end_of_text|>"[2:]]
    for speaker, text in enumerate(texts):
        turn = ours.encode_turn(speaker, text)
        assert processor(f"[{speaker}]{text}", add_special_tokens=True)["input_ids"][0].tolist() == turn
    turn = [{"role": "3", "content": [{"type": "text", "text": "hi"}, {"type": "audio", "path": np.zeros(1920 * 2 + 1, dtype=np.float32)}]}]
    ids = processor.apply_chat_template(turn, tokenize=True, return_dict=True)["input_ids"][0].tolist()
    assert ids == [*ours.encode_turn(3, "hi"), 128002, 128002, 128002, 128003]
    with pytest.raises(ValueError, match="128256 ids, the model reads 32"):
        CSM(tiny_model_config).save_pretrained(tmp_path / "small", layout="transformers", tokenizer=tmp_path)
