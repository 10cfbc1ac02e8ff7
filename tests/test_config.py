"""Configuration: the defaults fit together, and a wrong value is refused with its name and what was expected."""

from __future__ import annotations

import dataclasses
import typing
from enum import Enum
from typing import Any

import pytest

from csm import config
from csm.config import (
    CodecConfig,
    DataConfig,
    EmaConfig,
    EvaluateConfig,
    LoggerConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PrepConfig,
    SpikeConfig,
    TextConfig,
    TrainConfig,
    TrainerConfig,
    TransformerConfig,
)

CLASSES = [value for value in vars(config).values() if dataclasses.is_dataclass(value)]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_default_is_accepted(cls: type) -> None:
    cls()


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_hydra_can_hold_every_field(cls: type) -> None:
    """OmegaConf refuses frozen dataclasses, Literal and tuples, and unions other than with None."""

    def is_plain(hint: Any) -> bool:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is list:
            return is_plain(args[0])
        if args:
            return type(None) in args and all(is_plain(arg) for arg in args if arg is not type(None)) and len(args) == 2
        # Any: one value or a list of them, told apart in __post_init__
        return hint in (int, float, str, bool, Any) or dataclasses.is_dataclass(hint) or (isinstance(hint, type) and issubclass(hint, Enum))

    assert not cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    for name, hint in typing.get_type_hints(cls).items():
        assert is_plain(hint), f"{cls.__name__}.{name}: {hint}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_defaults_are_not_shared_between_configurations(cls: type) -> None:
    first, second = cls(), cls()
    assert first == second
    for field in dataclasses.fields(cls):
        value = getattr(first, field.name)
        if isinstance(value, list) or dataclasses.is_dataclass(value):
            assert value is not getattr(second, field.name)


@pytest.mark.parametrize(
    ("cls", "wrong", "message"),
    [
        (TransformerConfig, {"num_layers": 0}, "num_layers=0: expected a positive number"),
        (TransformerConfig, {"width": 250}, "width=250: expected a multiple of num_heads=4"),
        (TransformerConfig, {"width": 20, "num_heads": 4}, "an even head width"),
        (TransformerConfig, {"num_kv_heads": 3}, "num_heads=4: expected a multiple of num_kv_heads=3"),
        (ModelConfig, {"num_codebooks": 1}, "model.num_codebooks=1: expected at least 2"),
        (ModelConfig, {"audio_vocab_size": 0}, "model.audio_vocab_size=0: expected a positive number"),
        (LossConfig, {"amortization": 0.0}, r"loss.amortization=0.0: expected a share in \(0, 1\]"),
        (LossConfig, {"amortization": 1.5}, "loss.amortization=1.5"),
        (LossConfig, {"depth_frames_at_once": 0}, "loss.depth_frames_at_once=0: expected 1 or more, or null"),
        (LossConfig, {"frame_dropout": 1.0}, r"loss.frame_dropout=1.0: expected a share in \[0, 1\)"),
        (LossConfig, {"z_loss": -0.1}, "loss.z_loss=-0.1: expected 0 or more"),
        (LossConfig, {"codebook_weights": [0.0, 0.0]}, r"loss.codebook_weights=\[0.0, 0.0\]: expected weights of 0 or more, not all 0"),
        (EmaConfig, {"decay": 1.0}, r"ema.decay=1.0: expected a share in \[0, 1\)"),
        (EmaConfig, {"every": 0}, "ema.every=0: expected a positive number"),
        (EmaConfig, {"every": 10}, "ema.decay=0.0: expected more than 0 with ema.every or ema.start"),
        (SpikeConfig, {"action": "ignore"}, "spikes.action='ignore': expected one of off, warn, skip, stop"),
        (SpikeConfig, {"norm_ratio": 0.5}, "spikes.norm_ratio=0.5: expected more than 1, or 0"),
        (SpikeConfig, {"window": 1}, "spikes.window=1: expected 4 or more"),
        (OptimConfig, {"name": "adam"}, "optim.name='adam': expected one of adamw, "),
        (OptimConfig, {"schedule": "cos"}, "optim.schedule='cos': expected one of cosine, "),
        (OptimConfig, {"lr": 0.0}, "optim.lr=0.0: expected a positive rate"),
        (OptimConfig, {"betas": [0.9]}, r"optim.betas=\[0.9\]: expected two numbers"),
        (DataConfig, {"kind": "tar"}, "data.kind='tar': expected one of demo, shards, random"),
        (DataConfig, {"seq_len": 0}, "data.seq_len=0: expected a positive number"),
        (DataConfig, {"num_workers": -1}, "data.num_workers=-1: expected 0 or more"),
        (CodecConfig, {"name": "encodec"}, "codec.name='encodec': expected one of spectral, mimi"),
        (TextConfig, {"tokenizer": "bpe"}, "text.tokenizer='bpe': expected one of words, bytes, llama3"),
        (TrainerConfig, {"strategy": "fsdp"}, "trainer.strategy='fsdp': expected one of auto, ddp"),
        (TrainerConfig, {"precision": "fp16"}, "trainer.precision='fp16': expected one of auto, 32, bf16-mixed, bf16-true"),
        (TrainerConfig, {"accumulate": 0}, "trainer.accumulate=0: expected a positive number"),
        (TrainerConfig, {"checkpoint_every": -1}, "trainer.checkpoint_every=-1: expected 0 or more"),
        (LoggerConfig, {"name": "tensorboard"}, "logger.name='tensorboard': expected one of csv, wandb, none"),
        (PrepConfig, {"num_phases": 9}, "num_phases=9: expected 1 to 8"),
    ],
)
def test_a_wrong_value_is_refused_by_name(cls: type, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**wrong)


def test_a_precision_written_as_a_number_is_the_same() -> None:
    assert TrainerConfig(precision=32).precision == "32"  # type: ignore[arg-type]  # YAML reads 32 as a number


def test_codebook_weights_are_one_for_each_codebook_of_the_depth_decoder() -> None:
    TrainConfig(loss=LossConfig(codebook_weights=[1.0] * 7))
    with pytest.raises(ValueError, match=r"loss.codebook_weights=\[1.0\]: expected 7 weights, one for each of codebooks 1..7"):
        TrainConfig(loss=LossConfig(codebook_weights=[1.0]))


def test_rows_longer_than_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match="data.seq_len=4096: expected at most model.max_seq_len=2048"):
        TrainConfig(data=DataConfig(seq_len=4096))


def test_a_codec_of_another_depth_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="codec.num_codebooks=32: expected model.num_codebooks=8"):
        TrainConfig(codec=CodecConfig(num_codebooks=32))


def test_made_up_data_needs_no_matching_codec() -> None:
    TrainConfig(data=DataConfig(kind="random"), codec=CodecConfig(num_codebooks=32))


def test_head_width_is_derived() -> None:
    assert TransformerConfig(width=3072, num_heads=24, num_kv_heads=8).head_dim == 128


def test_evaluation_needs_a_run() -> None:
    assert EvaluateConfig().run == "???"  # OmegaConf's mark of a value that must be given
