"""Checkpoints on disk: what is written, what is found, and that anything that does not fit is refused in one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from csm import CSM, ModelConfig, TransformerConfig
from csm.model.layouts import halves_from_interleaved, transformers_name
from csm.model.pretrained import detect_layout, load_llama_backbone, read_config, resolve_checkpoint

LAYOUTS = ("csm", "sesame", "transformers")


@pytest.fixture
def model(tiny_model_config: ModelConfig) -> CSM:
    return CSM(tiny_model_config)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Writing


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back_the_same(model, tmp_path, layout):
    model.save_pretrained(tmp_path, layout=layout)
    again = CSM.from_pretrained(tmp_path)
    assert detect_layout(tmp_path) == layout and again.config == model.config == read_config(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    assert not list(tmp_path.glob("*.tmp"))


def test_dtype_is_kept_or_converted(model, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path, layout="transformers")
    assert {p.dtype for p in CSM.from_pretrained(tmp_path, dtype=None).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in CSM.from_pretrained(tmp_path).parameters()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_split_and_a_later_save_leaves_nothing_behind(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert index["metadata"]["total_size"] == 4 * model.num_parameters
    assert torch.equal(CSM.from_pretrained(tmp_path).audio_head, model.audio_head)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    assert not (tmp_path / "model.safetensors").exists()
    CSM.from_pretrained(tmp_path)


def test_gathered_state_dict_is_written_in_place_of_the_models(model, tmp_path):
    other = CSM(model.config, seed=5)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert torch.equal(CSM.from_pretrained(tmp_path).audio_head, other.audio_head)
    with pytest.raises(ValueError, match="1 missing .audio_head."):
        model.save_pretrained(tmp_path, state_dict={k: v for k, v in other.state_dict().items() if k != "audio_head"})


def test_unknown_layout_and_misplaced_codec_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="layout='onnx': expected one of csm, sesame, transformers"):
        model.save_pretrained(tmp_path, layout="onnx")
    from csm.model.pretrained import CodecWeights

    with pytest.raises(ValueError, match="layout=sesame holds no codec"):
        model.save_pretrained(tmp_path, layout="sesame", codec=CodecWeights({}, {}))
    assert not list(tmp_path.iterdir())


# Refusing


def _set(key: str, value: object) -> Callable[[dict], object]:
    return lambda values: values.__setitem__(key, value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(name for name in t if "layers.1" in name)), "1 missing"),
        (lambda t: t.__setitem__("surprise", torch.zeros(1)), r"1 unknown \(surprise\)"),
        (
            lambda t: t.__setitem__(k := next(n for n in t if "layers.0" in n and "k_proj" in n), t[k][:, :-1].contiguous()),
            r"k_proj.weight is \[16, 31\], expected \[16, 32\]",
        ),
    ],
    ids=["missing", "extra", "width"],
)
def test_tensors_that_are_not_the_configs_are_refused(model, tmp_path, layout, change, message):
    model.save_pretrained(tmp_path, layout=layout)
    edit_weights(tmp_path, change)
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: tensors are not those of the model.*{message}"):
        CSM.from_pretrained(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("key", ["K", "V"])
def test_config_of_another_k_or_v_is_refused(model, tmp_path, layout, key):
    model.save_pretrained(tmp_path, layout=layout)

    def change(values: dict) -> None:
        for part in (values, values.get("model"), values.get("csm"), values.get("depth_decoder_config")):
            for name in {"K": ("num_codebooks", "audio_num_codebooks"), "V": ("vocab_size", "audio_vocab_size")}[key]:
                if part is not None and name in part:
                    part[name] += 1

    edit_json(tmp_path / "config.json", change)
    with pytest.raises(ValueError, match="tensors are not those of the model"):
        CSM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("transformers", _set("attention_bias", True), "attention_bias=True, our model has False"),
        ("transformers", _set("head_dim", 16), "head_dim=16"),
        ("transformers", _set("tie_codebooks_embeddings", False), "shares one audio table"),
        ("transformers", _set("num_codebooks", 9), "num_codebooks=9, but depth_decoder_config"),
        ("transformers", lambda v: v["rope_parameters"].update(rope_type="yarn"), "rope_type='yarn'"),
        ("transformers", lambda v: v.pop("hidden_size"), "it lacks 'hidden_size'"),
        ("transformers", _set("model_type", "llama"), "not a CSM's config .llama."),
        ("sesame", lambda v: v.pop("csm"), "flavor None is unknown"),
        ("sesame", _set("audio_num_codebooks", 9), "audio_num_codebooks=9, but its csm object says 4"),
        ("csm", _set("format_version", 2), "format_version 2, this version of csm reads 1"),
        ("csm", lambda v: v["model"].update(new_thing=1), r"unknown keys \['new_thing'\]; written by a newer version"),
        ("csm", lambda v: v["model"]["backbone"].update(num_heads=5), "width=32: expected a multiple of num_heads=5"),
    ],
)
def test_configs_our_model_cannot_follow_are_refused(model, tmp_path, layout, change, message):
    model.save_pretrained(tmp_path, layout=layout)
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(ValueError, match=message) as caught:
        CSM.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_untied_audio_tables_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path, layout="transformers")
    edit_weights(tmp_path, lambda t: t["depth_decoder.model.embed_tokens.weight"].add_(1))
    with pytest.raises(ValueError, match="differ, our model shares one audio table"):
        CSM.from_pretrained(tmp_path)


def test_either_copy_of_the_audio_table_is_enough(model, tmp_path):
    for number, name in enumerate(["depth_decoder.model.embed_tokens.weight", transformers_name("audio_embeddings.weight")]):
        folder = tmp_path / str(number)
        model.save_pretrained(folder, layout="transformers")
        edit_weights(folder, lambda t, name=name: t.pop(name))
        assert torch.equal(CSM.from_pretrained(folder).audio_embeddings.weight, model.audio_embeddings.weight)


def test_pickles_are_refused_unopened(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "elsewhere")
    for name in ("ckpt.pt", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"holds pickles only \(ckpt.pt, pytorch_model.bin\)"):
        CSM.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="holds pickles only"):
        CSM.from_pretrained(tmp_path)


def test_torn_files_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{shard.name}: not a whole safetensors file"):
        CSM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 missing .{shard.name}."):
        CSM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: not JSON"):
        CSM.from_pretrained(tmp_path)


# Finding


def test_index_that_points_outside_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=40_000)
    edit_json(tmp_path / "model.safetensors.index.json", lambda v: v["weight_map"].update(audio_head="../elsewhere.safetensors"))
    with pytest.raises(ValueError, match="expected a weight_map of files beside it"):
        CSM.from_pretrained(tmp_path)


def test_sesames_hub_folder_is_read_by_the_weights_its_config_names(model, tmp_path):
    """It holds Sesame's tensors, transformers' under another name, transformers' config that points to them, and a pickle."""
    model.save_pretrained(tmp_path, layout="transformers", max_shard_bytes=60_000)
    for path in list(tmp_path.glob("model*")):
        path.rename(tmp_path / path.name.replace("model", "transformers", 1))
    index = tmp_path / "transformers.safetensors.index.json"
    edit_json(index, lambda v: v.update(weight_map={k: f.replace("model", "transformers", 1) for k, f in v["weight_map"].items()}))
    edit_json(tmp_path / "config.json", _set("transformers_weights", index.name))
    save_file(CSM(model.config, seed=8).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "ckpt.pt").write_bytes(b"never opened")
    assert detect_layout(tmp_path) == "transformers"
    assert torch.equal(CSM.from_pretrained(tmp_path).audio_head, model.audio_head)
    edit_json(tmp_path / "config.json", lambda v: v.pop("transformers_weights"))
    assert detect_layout(tmp_path) == "sesame"
    assert torch.equal(CSM.from_pretrained(tmp_path).audio_head, CSM(model.config, seed=8).audio_head)


def test_runs_and_pointers_lead_to_their_checkpoint(model, tmp_path):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    for name in ("step_000010", "step_000020"):
        model.save_pretrained(checkpoints / name)
    (checkpoints / "last.txt").write_text("step_000020\n")
    assert resolve_checkpoint(run) == checkpoints / "step_000020"  # no best yet
    (checkpoints / "best.txt").write_text("step_000010")
    expected = {
        run: "step_000010",
        checkpoints: "step_000010",
        checkpoints / "last": "step_000020",
        checkpoints / "best": "step_000010",
        checkpoints / "step_000020": "step_000020",
    }
    for path, name in expected.items():
        assert resolve_checkpoint(str(path)) == checkpoints / name
    assert resolve_checkpoint(run, name="last").name == "step_000020"
    assert resolve_checkpoint(run, name="step_000020").name == "step_000020"
    CSM.from_pretrained(run)
    (checkpoints / "best.txt").write_text("step_000099")
    with pytest.raises(FileNotFoundError, match="best.txt names 'step_000099', which is no checkpoint there"):
        resolve_checkpoint(run)


def test_nothing_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint there; expected config.json"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder; give a run, a checkpoint folder, or a hub id"):
        resolve_checkpoint(tmp_path / "nowhere" / "at" / "all")


def test_hub_out_of_reach_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE is set.*hf download nobody/nothing --local-dir nothing"):
        CSM.from_pretrained("nobody/nothing")


# Warm start


@pytest.fixture
def llama_folder(tmp_path: Path, tiny_model_config: ModelConfig) -> Path:
    """A random Llama of the backbone's shape, written by transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = tiny_model_config.backbone
    config = LlamaConfig(
        hidden_size=shape.width, intermediate_size=shape.ffn_width, num_hidden_layers=shape.num_layers, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, vocab_size=tiny_model_config.text_vocab_size, rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    llama.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@torch.no_grad()
def test_warm_started_backbone_computes_what_the_llama_does(model, llama_folder):
    from transformers import LlamaForCausalLM

    llama = LlamaForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    before = model.decoder.state_dict()["norm.scale"].clone(), model.audio_head.clone()
    load_llama_backbone(model, llama_folder)
    ids = torch.randint(model.config.text_vocab_size, (2, 15), generator=torch.Generator().manual_seed(1))
    expected = llama.model(ids).last_hidden_state
    got = model.backbone(model.text_embeddings(ids))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.equal(model.audio_head, before[1]) and torch.equal(model.decoder.norm.scale, before[0])


def test_llama_of_another_shape_is_refused(llama_folder, tiny_model_config):
    other = CSM(ModelConfig(backbone=TransformerConfig(width=64, num_layers=1), num_codebooks=4, audio_vocab_size=33))
    with pytest.raises(ValueError, match="does not fit the backbone"):
        load_llama_backbone(other, llama_folder)
    edit_weights(llama_folder, lambda t: t.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="not those of its Llama: 1 missing .model.norm.weight."):
        load_llama_backbone(CSM(tiny_model_config), llama_folder)
    edit_json(llama_folder / "config.json", _set("model_type", "mistral"))
    with pytest.raises(ValueError, match="model_type='mistral', model.warm_start wants a Llama"):
        load_llama_backbone(CSM(tiny_model_config), llama_folder)


def test_halves_and_interleaved_are_a_permutation_of_rows():
    rows = torch.arange(12.0)[:, None]
    assert halves_from_interleaved(rows, 2).flatten().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
