"""Adapters: what they change and what they leave alone, switching, merging, files, and the same numbers in PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm.config import AdapterConfig
from csm.frames import Batch, Rows, audio_rows, text_rows
from csm.loss import csm_loss
from csm.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME, load_adapter, save_adapter
from csm.model.csm import CSM
from csm.model.lora import (
    adapted_maps,
    attach_adapter,
    base_state_dict,
    merge_adapter,
    merged_adapter,
    set_adapter,
    unmerge_adapter,
)
from csm.model.pretrained import CodecWeights
from tests.conftest import tiny_config
from tests.parity.conftest import SMALL_MIMI

KINDS = ("lora", "dora")


def make_batch(model: CSM, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    rows = [text_rows([1, 5, 2], config.num_codebooks)]
    rows.append(audio_rows(torch.randint(1, config.audio_vocab_size, (config.num_codebooks, 9), generator=generator)))
    return Batch.from_documents([[Rows.concatenate(rows)]])


def logits(model: CSM, batch: Batch) -> torch.Tensor:
    index = torch.tensor([[0, 5], [0, 7]])
    with torch.no_grad():
        out = model(batch.tokens, batch.mask, batch.document_ids, index)
    return torch.cat((out.c0_logits.flatten(), out.depth_logits.flatten()))


def shake(model: CSM, name: str = "default", seed: int = 1) -> None:
    """Give the adapter numbers as training would: away from zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapted in adapted_maps(model).values():
        low = adapted.adapters[name]
        low.b.data = torch.randn(low.b.shape, generator=generator) * 0.1
        if low.magnitude is not None:
            low.magnitude.data = low.magnitude.data * (1 + 0.2 * torch.rand(low.magnitude.shape, generator=generator))


@pytest.fixture
def model() -> CSM:
    return CSM(tiny_config(), seed=3).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(model: CSM, kind: str) -> None:
    batch = make_batch(model)
    before = logits(model, batch)
    attach_adapter(model, AdapterConfig(kind=kind, rank=4))
    assert torch.allclose(logits(model, batch), before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_adapter_learns_and_the_base_keeps_its_bytes(model: CSM, kind: str) -> None:
    base = copy.deepcopy(model.state_dict())
    attach_adapter(model, AdapterConfig(kind=kind, rank=4))
    shake(model)  # while B is zero A has no gradient
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    csm_loss(model, make_batch(model), amortization=1.0).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before) and all(".adapters.default." in name for name in moved)
    assert all(torch.equal(tensor, base[name]) for name, tensor in base_state_dict(model).items())
    assert set(base_state_dict(model)) == set(base), "a model with adapters saves as the base it is"


def test_learning_lowers_the_loss_through_the_adapter_alone(model: CSM) -> None:
    attach_adapter(model, AdapterConfig(kind="lora", rank=4))
    model.train()
    batch = make_batch(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(30):
        loss = csm_loss(model, batch, amortization=1.0).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2, "frozen random heads allow no more than about 0.3 nats"


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged_and_unmerging_gives_back_the_same_bytes(model: CSM, kind: str) -> None:
    attach_adapter(model, AdapterConfig(kind=kind, rank=4))
    shake(model)
    batch = make_batch(model)
    apart, weights = logits(model, batch), {name: tensor.clone() for name, tensor in base_state_dict(model).items()}
    merge_adapter(model)
    merge_adapter(model)  # again changes nothing
    assert torch.allclose(logits(model, batch), apart, atol=1e-5)
    assert not torch.equal(base_state_dict(model)["backbone.layers.0.attn.q_proj.weight"], weights["backbone.layers.0.attn.q_proj.weight"])
    unmerge_adapter(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base_state_dict(model).items())
    assert torch.equal(logits(model, batch), apart)


def test_a_merged_model_is_a_plain_model_of_the_same_logits(model: CSM, tmp_path: Path) -> None:
    attach_adapter(model, AdapterConfig(kind="lora", rank=4))
    shake(model)
    plain = CSM(model.config, seed=9).eval()
    with merged_adapter(model):
        plain.load_state_dict(base_state_dict(model))
    batch = make_batch(model)
    assert torch.allclose(logits(plain, batch), logits(model, batch), atol=1e-5)


def test_adapters_are_switched_and_do_not_see_each_other(model: CSM) -> None:
    batch = make_batch(model)
    base = logits(model, batch)
    results = {}
    for number, name in enumerate(("anna", "ben")):
        also = ["text_embeddings"] if name == "ben" else []
        attach_adapter(model, AdapterConfig(kind="lora", rank=2, also_train=also), name=name, seed=number)
        shake(model, name, seed=number)
        if also:
            model.text_embeddings.weight.data += 0.1
        results[name] = logits(model, batch)
    for name in ("anna", "ben", "anna"):
        set_adapter(model, name)
        assert torch.equal(logits(model, batch), results[name])
        merge_adapter(model)  # switching away from a merged one unmerges it
    set_adapter(model, None)
    assert torch.equal(logits(model, batch), base)
    assert not torch.allclose(results["anna"], results["ben"], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_comes_back_from_its_files(model: CSM, kind: str, tmp_path: Path) -> None:
    config = AdapterConfig(kind=kind, rank=3, alpha=6.0, targets=["q_proj", "w2"], parts=["backbone"], also_train=["codebook0_head"])
    attach_adapter(model, config)
    shake(model)
    model.codebook0_head.weight.data += 0.05
    save_adapter(model, tmp_path, config, base="sesame/csm-1b")
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["base_model_name_or_path"] == "sesame/csm-1b"
    other = CSM(model.config, seed=3).eval()
    assert load_adapter(other, tmp_path) == config
    batch = make_batch(model)
    assert torch.equal(logits(other, batch), logits(model, batch))


def test_a_dropped_adapter_input_is_dropped_in_training_only(model: CSM) -> None:
    attach_adapter(model, AdapterConfig(kind="lora", rank=4, dropout=0.5))
    shake(model)
    batch = make_batch(model)
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()
    assert not torch.equal(logits(model, batch), logits(model, batch))


def test_the_depth_decoder_has_its_own_rank_and_the_scale_of_the_rest(model: CSM, tmp_path: Path) -> None:
    config = AdapterConfig(kind="lora", rank=2, alpha=6.0, decoder_rank=5)
    attach_adapter(model, config)
    shake(model)
    got = {(name.split(".")[0], low.a.shape[0], low.scaling) for name, at in adapted_maps(model).items() for low in at.adapters.values()}
    assert got == {("backbone", 2, 3.0), ("decoder", 5, 3.0)}
    save_adapter(model, tmp_path, config)
    other = CSM(model.config, seed=3).eval()
    assert load_adapter(other, tmp_path) == config
    batch = make_batch(model)
    assert torch.equal(logits(other, batch), logits(model, batch))


@pytest.mark.parametrize("decoder_rank", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_our_adapter_on_our_export_and_gives_our_logits(kind: str, decoder_rank: int | None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is in the extra dev")
    from transformers import CsmForConditionalGeneration, MimiConfig, MimiModel

    ours = CSM(tiny_config(), seed=3).eval()
    codec = CodecWeights({**SMALL_MIMI, "model_type": "mimi"}, MimiModel(MimiConfig(**SMALL_MIMI)).state_dict())
    ours.save_pretrained(tmp_path / "base", layout="transformers", codec=codec)
    config = AdapterConfig(kind=kind, rank=4, also_train=["text_embeddings", "projection"], decoder_rank=decoder_rank)
    attach_adapter(ours, config)
    shake(ours)
    ours.text_embeddings.weight.data += 0.05
    ours.projection.weight.data *= 1.1
    save_adapter(ours, tmp_path / "adapter", config, base=str(tmp_path / "base"))

    base = CsmForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    batch = make_batch(ours)
    codes = batch.tokens[..., :-1]
    inner = theirs.base_model.model
    audio = inner.backbone_model.embed_tokens(codes)
    embeds = torch.where(batch.mask[..., :1], audio, inner.embed_text_tokens(batch.tokens[..., -1]))
    labels = codes.masked_fill(~batch.mask[..., :-1], -100)
    with torch.no_grad():
        out = theirs(inputs_embeds=embeds, labels=labels, use_cache=False)
        losses = csm_loss(ours, batch, amortization=1.0)
        expected = ours(batch.tokens, batch.mask, batch.document_ids).c0_logits
    assert torch.allclose(out.logits, expected, atol=2e-4)
    assert abs(float(out.depth_decoder_loss) - float(losses.depth)) < 1e-4

    theirs.save_pretrained(tmp_path / "theirs")  # and the other way round
    again = CSM(tiny_config(), seed=3).eval()
    read = load_adapter(again, tmp_path / "theirs")
    assert (read.kind, read.decoder_rank) == (kind, decoder_rank)
    assert torch.allclose(logits(again, batch), logits(ours, batch), atol=1e-6)


def damage(folder: Path, how: str) -> None:
    tensors, config = load_file(folder / WEIGHTS_NAME), json.loads((folder / CONFIG_NAME).read_text())
    if how == "another width":
        tensors = {name: torch.cat((tensor, tensor)) if "lora_B" in name else tensor for name, tensor in tensors.items()}
    elif how == "a tensor less":
        tensors.pop(min(tensors))
    elif how == "a tensor more":
        tensors["base_model.model.head.lora_A.weight"] = torch.zeros(2)
    elif how == "of something else":
        tensors = {"base_model.model.encoder.lora_A.weight": torch.zeros(2)}
    elif how == "not LoRA":
        config["peft_type"] = "IA3"
    elif how == "no rank":
        config.pop("r")
    elif how == "strange targets":
        config["target_modules"] = ["conv1"]
    elif how == "rank-stabilised":
        config["use_rslora"] = True
    elif how == "a rank for a layer":
        config["rank_pattern"] = config["alpha_pattern"] = {"backbone_model.layers.0.mlp.up_proj": 2}
    elif how == "another scale":
        decoder = r"depth_decoder\.model\.layers\.\d+\.(self_attn|mlp)\.\w+"
        config["rank_pattern"], config["alpha_pattern"] = {decoder: 2}, {decoder: 5.0}
    elif how == "a rank alone":
        config["rank_pattern"] = {"q_proj": "4"}
    elif how == "unknown whole":
        config["modules_to_save"] = ["codec_model"]
    save_file(tensors, folder / WEIGHTS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    if how == "truncated":
        (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:100])
    elif how == "no config":
        (folder / CONFIG_NAME).unlink()
    elif how == "not JSON":
        (folder / CONFIG_NAME).write_text("{")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("another width", "lora_B"),
        ("a tensor less", "is missing"),
        ("a tensor more", "no place"),
        ("of something else", "belongs to a CSM"),
        ("not LoRA", "IA3"),
        ("no rank", "'r'"),
        ("strange targets", "conv1"),
        ("rank-stabilised", "use_rslora"),
        ("a rank for a layer", "rank_pattern"),
        ("another scale", "alpha / r"),
        ("a rank alone", "rank_pattern"),
        ("unknown whole", "codec_model"),
        ("truncated", "cannot be read"),
        ("no config", CONFIG_NAME),
        ("not JSON", "not a LoRA configuration"),
    ],
)
def test_a_bad_adapter_is_refused_by_name(model: CSM, tmp_path: Path, how: str, named: str) -> None:
    config = AdapterConfig(kind="lora", rank=2)
    attach_adapter(model, config)
    save_adapter(model, tmp_path, config)
    damage(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        load_adapter(CSM(model.config), tmp_path)


def test_what_cannot_be_attached_is_refused(model: CSM) -> None:
    with pytest.raises(ValueError, match="no linear map"):
        attach_adapter(model, AdapterConfig(kind="lora", parts=[]))
    attach_adapter(model, AdapterConfig(kind="lora", rank=2))
    with pytest.raises(ValueError, match="already"):
        attach_adapter(model, AdapterConfig(kind="lora", rank=2))
    with pytest.raises(ValueError, match="carla"):
        set_adapter(model, "carla")
    merge_adapter(model)
    with pytest.raises(ValueError, match="merged"):
        attach_adapter(model, AdapterConfig(kind="lora", rank=2), name="second")
