"""Fixtures shared by the tests: tiny shapes, a tiny tokenizer, seeded generators, and one very small demo corpus."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch starts its threads: two that spin starve each other
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import hypothesis
import pytest
import torch
from filelock import FileLock
from torch import Tensor

from csm.config import ModelConfig, TransformerConfig
from csm.text import WordTokenizer

ROOT = Path(__file__).resolve().parents[1]
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "is", "the", "number")

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)  # the same examples on every machine
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew; the commit says why")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason in sight, what this machine or environment cannot run."""
    can_run = {
        "gpu": (torch.cuda.is_available(), "no CUDA device"),
        "network": (os.environ.get("CSM_TEST_NETWORK") == "1", "set CSM_TEST_NETWORK=1 to reach the hub"),
        "prep": (
            importlib.util.find_spec("moshi") is not None,
            "not the prep environment: make prep-env",
        ),  # whisperx's weights are in both
    }
    for item in items:
        for mark, (is_possible, reason) in can_run.items():
            if item.get_closest_marker(mark) and not is_possible:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def update_golden(pytestconfig: pytest.Config) -> bool:
    """Whether golden files are to be written instead of compared."""
    return bool(pytestconfig.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """Tests share the cores; one that raises the thread count does not change the next."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of its own for each test, always the same."""
    return torch.Generator().manual_seed(0)


def tiny_config(
    num_codebooks: int = 4, *, audio_vocab_size: int = 33, text_vocab_size: int = 32, is_rope_scaled: bool = True
) -> ModelConfig:
    """A CSM of some 30 thousand parameters; grouped-query attention in the backbone, D and E apart."""
    scaling = 32.0 if is_rope_scaled else None
    return ModelConfig(
        name="tiny",
        backbone=TransformerConfig(num_layers=2, width=32, num_heads=4, num_kv_heads=2, ffn_width=48, rope_scaling_factor=scaling),
        depth_decoder=TransformerConfig(num_layers=2, width=16, num_heads=2, num_kv_heads=1, ffn_width=24, rope_scaling_factor=scaling),
        num_codebooks=num_codebooks,
        audio_vocab_size=audio_vocab_size,
        text_vocab_size=text_vocab_size,
        max_seq_len=128,
    )


@pytest.fixture
def tiny_model_config() -> ModelConfig:
    """K 4, V 33, D 32, E 16."""
    return tiny_config()


@pytest.fixture(params=[(4, True), (8, False), (32, True)], ids=["k4", "k8_unscaled", "k32"])
def any_model_config(request: pytest.FixtureRequest) -> ModelConfig:
    """Three shapes in turn: K 4, 8 and 32, with and without RoPE scaling."""
    num_codebooks, is_rope_scaled = request.param
    return tiny_config(num_codebooks, is_rope_scaled=is_rope_scaled)


@pytest.fixture(scope="session")
def word_tokenizer() -> WordTokenizer:
    """The ten digits and three more words, speakers 0-3."""
    return WordTokenizer(WORDS, num_speakers=4)


@pytest.fixture
def make_codes(generator: torch.Generator) -> Callable[..., Tensor]:
    """`make_codes(num_codebooks, num_frames, vocab_size)`: random codes [K, F] in 1..V-1, never an all-zero frame."""

    def make(num_codebooks: int = 4, num_frames: int = 7, vocab_size: int = 33) -> Tensor:
        return torch.randint(1, vocab_size, (num_codebooks, num_frames), generator=generator)

    return make


@pytest.fixture(scope="session")
def demo_corpus_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo corpus of a few dozen conversations, made by the real command once for all test processes; read only."""
    shared = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder = shared / "demo_corpus_small"
    with FileLock(shared / "demo_corpus_small.fixture.lock"):
        if not (folder / "corpus.json").is_file():
            settings = ("prep=demo", f"output={folder}", "seed=0", "num_train_strings=24", "num_heldout_strings=3", "num_phases=2")
            command = [sys.executable, "-m", "data_prep", *settings, "num_workers=1"]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
            if done.returncode != 0:
                pytest.fail(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return folder


@pytest.fixture(scope="session")
def write_conversations() -> Callable[..., Path]:
    """`write_conversations(folder, [[(speaker, text, num_frames), ...], ...])`: shards of made-up codes, by the real writer.

    A turn can have a fourth part, a dict of what else its JSON holds.
    """
    import numpy as np

    from data_prep.shard import Sample, write_split

    def write(
        folder: Path,
        conversations: list,
        *,
        num_codebooks: int = 4,
        vocab_size: int = 33,
        digest: str = "d" * 64,
        audio: bool = False,
        max_shard_bytes: int = 20_000,
    ) -> Path:
        random = np.random.default_rng(0)
        samples = []
        for index, conversation in enumerate(conversations):
            turns, first = [], 0
            for speaker, text, num_frames, *more in conversation:
                turn = {"speaker": speaker, "text": text, "frames": [first, first + num_frames], "learn": {"c0": True, "depth": True}}
                turns.append({**turn, **(more[0] if more else {})})
                first += num_frames
            samples.append(
                Sample(
                    key=f"{index:016x}-0",
                    meta={"id": f"{index:016x}-0", "duration_s": first * 0.08, "turns": turns},
                    codes=random.integers(1, vocab_size, (num_codebooks, first)).astype(np.int16),
                    audio=np.sin(np.arange(first * 1920) / 20).astype(np.float32) / 2 if audio else None,
                )
            )
        codec = {"name": "spectral", "num_codebooks": num_codebooks, "frame_rate_hz": 12.5, "sample_rate_hz": 24_000, "digest": digest}
        write_split(samples, folder, codec, max_shard_bytes=max_shard_bytes)
        return folder

    return write


@pytest.fixture(scope="session")
def shipped_model_config() -> Callable[[str], ModelConfig]:
    """`shipped_model_config("csm_1b")`: configs/model/csm_1b.yaml over ModelConfig's defaults, read without Hydra."""
    from dataclasses import replace

    import yaml

    def read(name: str) -> ModelConfig:
        values = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text(encoding="utf-8")) or {}
        config = ModelConfig()
        parts = {part: replace(getattr(config, part), **values.pop(part, {})) for part in ("backbone", "depth_decoder")}
        return replace(config, **parts, **values)

    return read


@pytest.fixture(scope="session")
def small_codec():
    """A spectral codec of K 4 and V 33, the tiny model's, fitted on a few gliding tones."""
    from csm.codec import SpectralCodec

    random = torch.Generator().manual_seed(0)
    time_s = torch.arange(48_000) / 24_000
    clips = [torch.sin(6.28 * (100 + 40 * i) * time_s * (1 + 0.2 * torch.sin(3 * time_s))) * 0.3 for i in range(12)]
    clips = [clip + torch.randn(48_000, generator=random) * 0.02 for clip in clips]
    return SpectralCodec.fit(clips, num_codebooks=4, codebook_size=32)


@pytest.fixture(scope="session")
def speaking_model():
    """A random CSM with the small codec's shapes; weights of std 0.2, so that logits differ by more than rounding."""
    from csm import CSM

    model = CSM(tiny_config(), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10.0)
    return model


@pytest.fixture(scope="session")
def speaking_checkpoint(tmp_path_factory: pytest.TempPathFactory, speaking_model, small_codec, word_tokenizer) -> Path:
    """A checkpoint folder as training leaves it: weights, tokenizer, codec."""
    folder = tmp_path_factory.mktemp("speaking") / "step_000001"
    speaking_model.save_pretrained(folder)
    word_tokenizer.save(folder)
    small_codec.save(folder / "codec")
    return folder
