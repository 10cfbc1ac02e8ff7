"""The parity oracle: transformers' CSM with a small Mimi, and models whose weights are large enough for errors to show."""

from __future__ import annotations

import pytest
import torch

from csm import CSM, ModelConfig
from csm.frames import Batch, Rows, audio_rows, text_rows
from csm.model.pretrained import CodecWeights

SMALL_MIMI = {  # divides where Mimi wants it to; 32 codebooks
    "num_filters": 4,
    "hidden_size": 32,
    "upsample_groups": 32,
    "vector_quantization_hidden_dimension": 16,
    "codebook_dim": 16,
    "codebook_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
}


@pytest.fixture(scope="session")
def small_mimi() -> CodecWeights:
    """Mimi, much narrower, with random weights."""
    from transformers import MimiConfig, MimiModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MimiModel(MimiConfig(**SMALL_MIMI))
    return CodecWeights({**SMALL_MIMI, "model_type": "mimi"}, model.state_dict())


@pytest.fixture
def loud_model(any_model_config: ModelConfig, generator: torch.Generator) -> CSM:
    """A model with weights of std 0.2 and uneven norms: at 0.02 every logit is near 0 and nothing could be told apart."""
    model = CSM(any_model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + noise * 0.2)
    return model


@pytest.fixture
def batch(any_model_config: ModelConfig, generator: torch.Generator) -> Batch:
    """Two rows, each one document of text and frames, of unlike length."""
    config = any_model_config

    def document(num_frames: int) -> Rows:
        text = torch.randint(config.text_vocab_size, (4,), generator=generator).tolist()
        codes = torch.randint(1, config.audio_vocab_size, (config.num_codebooks, num_frames), generator=generator)
        return Rows.concatenate([text_rows(text, config.num_codebooks), audio_rows(codes)])

    return Batch.from_documents(
        [[document(19)], [document(12)]]
    )  # transformers 5.23 fails on exactly K frames: it takes K positions for rows
