"""How three layouts name tensors and shapes: ours, Sesame's and transformers'. Pure functions, no files.

Ours has Sesame's tensor names, so those two differ in `config.json` only. transformers' has its own names, pairs RoPE lanes
in halves where Sesame interleaves them, and holds the audio table twice. Source: DESIGN.md section 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from torch import Tensor

from csm.config import ModelConfig, TransformerConfig

LAYOUTS = ("csm", "sesame", "transformers")
CODEC_PREFIX = "codec_model."  # of Mimi's tensors in transformers' layout
TIED_TABLE = "depth_decoder.model.embed_tokens.weight"  # transformers' second copy of the audio table
_FORMAT = {"format": "csm-lab", "format_version": 1}

_OUTSIDE_LAYERS = {
    "text_embeddings.weight": "embed_text_tokens.weight",
    "audio_embeddings.weight": "backbone_model.embed_tokens.embed_audio_tokens.weight",
    "projection.weight": "depth_decoder.model.inputs_embeds_projector.weight",
    "codebook0_head.weight": "lm_head.weight",
    "audio_head": "depth_decoder.codebooks_head.weight",
}
_TRANSFORMERS = {"backbone": "backbone_model", "decoder": "depth_decoder.model"}
_IN_LAYER = {
    "attn.q_proj.weight": "self_attn.q_proj.weight",
    "attn.k_proj.weight": "self_attn.k_proj.weight",
    "attn.v_proj.weight": "self_attn.v_proj.weight",
    "attn.output_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.gate_proj.weight",
    "mlp.w2.weight": "mlp.down_proj.weight",
    "mlp.w3.weight": "mlp.up_proj.weight",
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}
# Sesame's two published shapes. Source: DESIGN.md section 1, the row of csm_1b.
_FLAVORS = {
    "llama-1B": TransformerConfig(num_layers=16, width=2048, num_heads=32, num_kv_heads=8, ffn_width=8192),
    "llama-100M": TransformerConfig(num_layers=4, width=1024, num_heads=8, num_kv_heads=2, ffn_width=8192),
}
_SESAME_MAX_SEQ_LEN = 2048


def transformers_name(name: str) -> str:
    """transformers' name of one of our tensors."""
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    part, rest = name.split(".", 1)
    if rest == "norm.scale":
        return f"{_TRANSFORMERS[part]}.norm.weight"
    _, number, inner = rest.split(".", 2)
    return f"{_TRANSFORMERS[part]}.layers.{number}.{_IN_LAYER[inner]}"


def rotary_heads(name: str, config: ModelConfig) -> int | None:
    """Number of heads in one of our tensors whose rows RoPE pairs up; None for tensors it does not touch."""
    shape = {"backbone": config.backbone, "decoder": config.depth_decoder}.get(name.split(".", 1)[0])
    if shape is None or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return None
    return shape.num_heads if name.endswith("q_proj.weight") else shape.num_kv_heads


def halves_from_interleaved(weight: Tensor, num_heads: int) -> Tensor:
    """Sesame's order of a head's rows to transformers': [heads * head_dim, width] -> the same."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def interleaved_from_halves(weight: Tensor, num_heads: int) -> Tensor:
    """transformers' order of a head's rows to Sesame's."""
    return weight.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def csm_json(config: ModelConfig) -> dict[str, Any]:
    return {**_FORMAT, "model": asdict(config)}


def sesame_json(config: ModelConfig) -> dict[str, Any]:
    """Sesame's config; with the exact shapes under `csm` where its flavours do not say them all."""
    names = {_shape_key(shape): name for name, shape in _FLAVORS.items()}
    backbone, decoder = names.get(_shape_key(config.backbone)), names.get(_shape_key(config.depth_decoder))
    result: dict[str, Any] = {
        "audio_num_codebooks": config.num_codebooks,
        "audio_vocab_size": config.audio_vocab_size,
        "backbone_flavor": backbone,
        "decoder_flavor": decoder,
        "text_vocab_size": config.text_vocab_size,
    }
    if backbone is None or decoder is None or config.max_seq_len != _SESAME_MAX_SEQ_LEN:
        result["csm"] = asdict(config)
    return result


def transformers_json(config: ModelConfig, codec_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """CsmConfig of transformers 5.x.

    Args:
        codec_config: Mimi's; None leaves transformers' default of 32 codebooks.
    """
    shared = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "use_cache": True}
    depth_positions = config.num_codebooks + 1
    return {
        "architectures": ["CsmForConditionalGeneration"],
        "model_type": "csm",
        "_name_or_path": config.name,
        **shared,
        **_transformers_shape(config.backbone, config.max_seq_len, rope_context=1024),
        "num_codebooks": config.num_codebooks,
        "vocab_size": config.audio_vocab_size,
        "text_vocab_size": config.text_vocab_size,
        "codebook_eos_token_id": 0,
        "codebook_pad_token_id": config.audio_vocab_size - 1,
        "bos_token_id": 128000,
        "eos_token_id": None,
        "pad_token_id": 128002,
        "audio_token_id": 128002,
        "audio_eos_token_id": 128003,
        "tie_codebooks_embeddings": True,
        "initializer_range": 0.02,
        "depth_decoder_config": {
            "model_type": "csm_depth_decoder_model",
            **shared,
            **_transformers_shape(config.depth_decoder, depth_positions, rope_context=16),
            "num_codebooks": config.num_codebooks,
            "vocab_size": config.audio_vocab_size,
            "backbone_hidden_size": config.backbone.width,
            "initializer_range": 0.02,
        },
        "codec_config": dict(codec_config) if codec_config is not None else {"model_type": "mimi"},
    }


def generation_json(config: ModelConfig) -> dict[str, Any]:
    """transformers' generation_config.json: temperature 0.9 and top-k 50 for both models, as Sesame samples."""
    sampling = {"do_sample": True, "temperature": 0.9, "top_k": 50}
    fixed_length = {"min_new_tokens": config.num_codebooks - 1, "max_new_tokens": config.num_codebooks - 1}
    return {
        "bos_token_id": 128000,
        "pad_token_id": 128002,
        "max_new_tokens": 125,
        **sampling,
        **{f"depth_decoder_{key}": value for key, value in {**sampling, **fixed_length}.items()},
    }


def layout_of_config(config: Mapping[str, Any]) -> str | None:
    """Which layout a config.json speaks; None when it is none of them."""
    if config.get("format") == _FORMAT["format"]:
        return "csm"
    if config.get("model_type") == "csm":
        return "transformers"
    if "backbone_flavor" in config or ("csm" in config and "audio_num_codebooks" in config):
        return "sesame"
    return None


def config_from_json(config: Mapping[str, Any], where: str) -> ModelConfig:
    """The shapes that a config.json of any layout states.

    Args:
        where: named in messages.
    Raises:
        ValueError: if it is not a CSM's, or asks for something our model does not have.
    """
    layout = layout_of_config(config)
    try:
        if layout == "csm":
            if config["format_version"] != _FORMAT["format_version"]:
                raise ValueError(f"format_version {config['format_version']}, this version of csm reads {_FORMAT['format_version']}")
            return _config_from_dict(config["model"])
        if layout == "sesame":
            return _config_from_sesame(config)
        if layout == "transformers":
            return _config_from_transformers(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: cannot be read as a {layout} config: {what}") from error
    found = config.get("model_type") or config.get("architectures") or f"keys {sorted(config)[:5]}"
    raise ValueError(f"{where}: not a CSM's config ({found}); expected our layout, Sesame's or transformers'")


def _config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown keys {unknown}; written by a newer version of csm")
    shapes = {name: TransformerConfig(**values[name]) for name in ("backbone", "depth_decoder")}
    return ModelConfig(**{**values, **shapes, "warm_start": None})


def _config_from_sesame(values: Mapping[str, Any]) -> ModelConfig:
    if "csm" in values:
        config = _config_from_dict(values["csm"])
    else:
        unknown = [name for name in (values["backbone_flavor"], values["decoder_flavor"]) if name not in _FLAVORS]
        if unknown:
            raise ValueError(f"flavor {unknown[0]!r} is unknown; expected one of {', '.join(_FLAVORS)}, or a csm object with the shapes")
        config = ModelConfig(
            name="csm_1b",
            backbone=TransformerConfig(**asdict(_FLAVORS[values["backbone_flavor"]])),
            depth_decoder=TransformerConfig(**asdict(_FLAVORS[values["decoder_flavor"]])),
            num_codebooks=values["audio_num_codebooks"],
            audio_vocab_size=values["audio_vocab_size"],
            text_vocab_size=values["text_vocab_size"],
            max_seq_len=_SESAME_MAX_SEQ_LEN,
        )
    for key, got in (
        ("audio_num_codebooks", config.num_codebooks),
        ("audio_vocab_size", config.audio_vocab_size),
        ("text_vocab_size", config.text_vocab_size),
    ):
        if values.get(key, got) != got:
            raise ValueError(f"{key}={values[key]}, but its csm object says {got}")
    return config


def _config_from_transformers(values: Mapping[str, Any]) -> ModelConfig:
    depth = values["depth_decoder_config"]
    for part in (values, depth):
        for key, expected in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
            if part.get(key, expected) != expected:
                raise ValueError(f"{key}={part[key]!r}, our model has {expected!r}")
    if not values.get("tie_codebooks_embeddings", True):
        raise ValueError("tie_codebooks_embeddings=false, our model shares one audio table")
    pairs = {"num_codebooks": "num_codebooks", "vocab_size": "vocab_size", "hidden_size": "backbone_hidden_size"}
    for key, depth_key in pairs.items():
        if depth.get(depth_key, values[key]) != values[key]:
            raise ValueError(f"{key}={values[key]}, but depth_decoder_config.{depth_key}={depth[depth_key]}")
    return ModelConfig(
        name=values.get("_name_or_path") or "csm",
        backbone=_shape_from_transformers(values),
        depth_decoder=_shape_from_transformers(depth),
        num_codebooks=values["num_codebooks"],
        audio_vocab_size=values["vocab_size"],
        text_vocab_size=values["text_vocab_size"],
        max_seq_len=values["max_position_embeddings"],
    )


def _transformers_shape(shape: TransformerConfig, max_positions: int, rope_context: int) -> dict[str, Any]:
    """The keys that the backbone and the depth decoder share in transformers' config.

    transformers wants the scaling's old context smaller than the window, so all three numbers are divided alike; the
    frequencies stay the same.
    """
    rope: dict[str, Any] = {"rope_theta": shape.rope_base, "rope_type": "default"}
    if shape.rope_scaling_factor is not None:
        while rope_context >= max_positions:
            rope_context //= 2
        share = rope_context / shape.rope_original_context
        rope |= {
            "rope_type": "llama3",
            "factor": shape.rope_scaling_factor,
            "low_freq_factor": shape.rope_low_freq_factor * share,
            "high_freq_factor": shape.rope_high_freq_factor * share,
            "original_max_position_embeddings": rope_context,
        }
    return {
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": rope,
    }


def _shape_from_transformers(values: Mapping[str, Any]) -> TransformerConfig:
    """Shapes and RoPE from a Llama-like config of transformers 4.x (`rope_scaling`) or 5.x (`rope_parameters`)."""
    rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    base = rope.get("rope_theta", values.get("rope_theta", 500_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type={kind!r}, our model has default and llama3")
    scaling: dict[str, Any] = {"rope_scaling_factor": None}
    if kind == "llama3":
        share = rope["low_freq_factor"]  # written back so that the low factor is 1, as Llama 3 states it
        scaling = {
            "rope_scaling_factor": float(rope["factor"]),
            "rope_low_freq_factor": 1.0,
            "rope_high_freq_factor": rope["high_freq_factor"] / share,
            "rope_original_context": round(rope["original_max_position_embeddings"] / share),
        }
    heads = values["num_attention_heads"]
    shape = TransformerConfig(
        num_layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        ffn_width=values["intermediate_size"],
        rope_base=float(base),
        norm_eps=values.get("rms_norm_eps", 1e-5),
        **scaling,
    )
    if values.get("head_dim") not in (None, shape.head_dim):
        raise ValueError(f"head_dim={values['head_dim']}, our model has hidden_size / num_attention_heads = {shape.head_dim}")
    return shape


def shape_from_llama(values: Mapping[str, Any]) -> TransformerConfig:
    """The transformer of a Llama config (transformers)."""
    return _shape_from_transformers(values)


def _shape_key(shape: TransformerConfig) -> tuple[Any, ...]:
    return tuple(asdict(shape).values())
