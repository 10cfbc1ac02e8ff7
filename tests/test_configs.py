"""Every YAML composes, names no unknown key and repeats no default; mistakes are answered in one line."""

from __future__ import annotations

from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from csm.cli.hydra_entry import CONFIG_DIR, UsageError, compose, help_text
from csm.config import EvaluateConfig, FinetuneConfig, PlanConfig, PrepConfig, PrepPlanConfig, TrainConfig

PRIMARIES = {
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "evaluate": EvaluateConfig,
    "prep": PrepConfig,
    "plan": PlanConfig,
    "plan_prep": PrepPlanConfig,
}
GROUP_FILES = sorted(path for path in CONFIG_DIR.glob("*/*.yaml"))
REQUIRED = {"evaluate": ["run=runs/demo/x"], "finetune": ["base=runs/demo/x", "data.path=recordings"]}
REPEATS = ("codec", "text")  # these say their names even when default, to win over what a model is paired with


def _primary(path: Path) -> str:
    if path.stem.startswith("finetune_"):
        return "finetune"
    return {"prep": "prep", "suites": "evaluate"}.get(path.parent.name, "train")


def _overrides(path: Path) -> list[str]:
    if path.parent.name == "pairing":
        return [f"model={path.stem}"]
    if path.stem.startswith("finetune_"):
        return [f"experiment={path.stem}", *REQUIRED["finetune"]]
    fitting = ["model=csm_small"] if path.stem == "mimi" else []  # 32 codebooks
    if path.parent.name == "adapter":
        fitting = ["base=runs/demo/x"]
    if path.parent.name == "suites":
        fitting = REQUIRED["evaluate"]
    return [f"{path.parent.name}={path.stem}", *fitting]


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix[:-1]: node}
    return {key: value for name, child in node.items() for key, value in _leaves(child, f"{prefix}{name}.").items()}


def _settings(path: Path) -> dict[str, Any]:
    """The dotted keys that a file sets, in the schema's terms."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    content.pop("defaults", None)
    content.pop("hydra", None)
    prefix = "" if "@package _global_" in text or path.parent == CONFIG_DIR else f"{path.parent.name}."
    return _leaves(content, prefix) if content else {}


@pytest.mark.parametrize("name", sorted(PRIMARIES))
def test_primary_composes_to_its_dataclass_and_equals_its_defaults(name: str) -> None:
    config = compose(name, REQUIRED.get(name, []), PRIMARIES[name])
    if name == "finetune":  # without a recipe it would be nobody's: the one for little data
        recipe = compose(name, [*REQUIRED[name], "experiment=finetune_voice_5min", "adapter=lora"], FinetuneConfig)
        assert config == recipe and config.adapter.kind == "lora"
        return
    if name == "plan":  # of no use for the demo model: it plans the published one
        config.model = PRIMARIES[name]().model
    if name == "train":  # without arguments it is the demo: the recipe paired with its model, the lines said of its data
        recipe = _settings(CONFIG_DIR / "pairing/demo.yaml") | _settings(CONFIG_DIR / "data/demo.yaml")
        for key, value in recipe.items():
            section, field = key.split(".")
            assert getattr(getattr(config, section), field) == value
            setattr(getattr(config, section), field, getattr(getattr(TrainConfig(), section), field))
    assert config == (PRIMARIES[name](run="runs/demo/x") if name == "evaluate" else PRIMARIES[name]())


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_group_file_composes_and_sets_what_it_says(path: Path) -> None:
    primary = _primary(path)
    config = compose(primary, _overrides(path), PRIMARIES[primary])
    for key, value in _settings(path).items():
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        assert node == value, f"{path} sets {key}={value}, composed {node}"


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_group_file_repeats_no_default(path: Path) -> None:
    schema = OmegaConf.structured(PRIMARIES[_primary(path)])
    defaults = _leaves(OmegaConf.to_container(schema))
    for key, value in _settings(path).items():
        assert key in defaults, f"{path}: unknown key {key}"
        if path.parent.name not in REPEATS:
            assert value != defaults[key], f"{path}: {key}={value} repeats the default in csm/config.py; delete the line"


def test_model_alone_brings_its_codec_and_tokenizer() -> None:
    for name in ("csm_1b", "csm_3b", "csm_8b"):
        config = compose("train", [f"model={name}", "data=random"], TrainConfig)
        assert (config.codec.name, config.codec.num_codebooks, config.text.tokenizer) == ("mimi", 32, "llama3")
        assert (config.model.num_codebooks, config.model.audio_vocab_size, config.model.text_vocab_size) == (32, 2051, 128_256)


def test_every_model_is_paired() -> None:
    models = {path.stem for path in CONFIG_DIR.glob("model/*.yaml")}
    assert models == {path.stem for path in CONFIG_DIR.glob("pairing/*.yaml")}


def test_command_line_wins_over_the_choice_a_model_brings() -> None:
    with pytest.raises(UsageError, match=r"codec\.num_codebooks=8: expected model\.num_codebooks=32"):
        compose("train", ["model=csm_1b", "codec=spectral"], TrainConfig)
    assert compose("train", ["model=csm_1b", "text=words"], TrainConfig).text.tokenizer == "words"
    assert compose("train", ["model=csm_1b", "text=bytes"], TrainConfig).text.tokenizer == "bytes"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "optim.lrr: no such key (did you mean optim.lr"),
        ("lr=1", "lr: no such key (did you mean optim.lr"),
        ("dat=random", "dat: no such key (did you mean data"),
        ("data=randm", "data=randm: no such choice (did you mean random?); there are: demo, random, shards"),
        ("optim.lr=abc", "optim.lr: Value 'abc'"),
        ("trainer.max_steps=1.5", "trainer.max_steps: Value '1.5'"),
        ("optim.lr=-1", "optim.lr=-1.0: expected a positive rate"),
        ("optim.lr=null", "field 'optim.lr' is not Optional"),
        ("trainer.strategy=zero9", "trainer.strategy='zero9': expected one of"),
        ("+optim.momentum=1", "optim.momentum: no such key"),
        ("trainer.max_steps", "missing EQUAL"),
    ],
)
def test_mistake_is_answered_in_one_line_that_names_the_key(override: str, expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        compose("train", [override], TrainConfig)
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_required_value_is_named() -> None:
    with pytest.raises(UsageError, match="run is required"):
        compose("evaluate", [], EvaluateConfig)


def test_help_shows_every_key_with_its_value_and_comment() -> None:
    text = help_text("train", TrainConfig, ["optim.lr=0.5"], about="About.", examples=["train.py"])

    def keys(config: Any, prefix: str = "") -> list[str]:
        nested = [(f"{prefix}{name}", getattr(config, name)) for name in vars(config)]
        return [key for path, value in nested for key in (keys(value, path + ".") if is_dataclass(value) else [path])]

    for key in keys(TrainConfig()):
        assert f"  {key}=" in text, key
    assert "optim.lr=0.5" in text and "# peak" in text
    assert "model=" in text and "csm_1b" in text
