"""Teacher-forced losses of a split do not depend on how conversations are batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from csm import CSM
from csm.data.shards import iter_samples
from csm.evaluation.likelihood import score_samples
from csm.frames import Batch, rows_from_turns
from csm.loss import csm_loss


def test_scores_equal_the_loss_of_one_packed_batch(tmp_path: Path, write_conversations, word_tokenizer, tiny_model_config) -> None:
    talks = [[(0, "one two", 5)], [(1, "four", 9), (2, "five six", 3)], [(3, "nine", 2)]]
    samples = list(iter_samples(write_conversations(tmp_path / "heldout", talks)))
    model = CSM(tiny_model_config, seed=1)
    scores = score_samples(model, word_tokenizer, samples, seed=0, name="heldout")
    packed = Batch.from_documents([[rows_from_turns(sample.turns, word_tokenizer, 4) for sample in samples]])
    model.eval()
    losses = csm_loss(model, packed, amortization=1.0)
    assert scores.c0.value == pytest.approx(float(losses.c0), abs=1e-5)
    assert scores.depth.value == pytest.approx(float(losses.depth), abs=1e-5)
    assert torch.tensor(scores.per_codebook) == pytest.approx(losses.per_codebook, abs=1e-5)
    assert scores.c0.n == 3
    assert losses.eos_recall is not None and losses.false_stop is not None
    assert scores.eos_recall.value == pytest.approx(float(losses.eos_recall))
    assert scores.false_stop.value == pytest.approx(float(losses.false_stop))
    assert model.training is False
