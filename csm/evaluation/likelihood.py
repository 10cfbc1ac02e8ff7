"""How well a model predicts real speech, teacher-forced: nats for each codebook, every frame, conversation by conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from csm.data.shards import Sample
from csm.evaluation.metrics import Estimate, ratio_estimate
from csm.frames import Batch, TextEncoder, is_eos_row, rows_from_turns
from csm.loss import csm_loss
from csm.model.csm import CSM


@dataclass(frozen=True)
class Likelihood:
    """Losses of a split.

    Attributes:
        c0, depth: nats a target, with intervals over conversations.
        per_codebook: [K] nats.
        eos_recall: share of EOS rows whose most likely codebook 0 is EOS's; `false_stop` the share of frames.
        eos_expected: ends that the probabilities promise for each real end, 1 when calibrated; `eos_ece` the expected calibration
            error of those probabilities in ten bins (Guo et al. 2017).
    """

    c0: Estimate
    depth: Estimate
    per_codebook: list[float]
    eos_recall: Estimate
    false_stop: Estimate
    eos_expected: Estimate
    eos_ece: Estimate


@torch.no_grad()
def score_samples(model: CSM, tokenizer: TextEncoder, samples: Sequence[Sample], *, seed: int, name: str) -> Likelihood:
    """Score conversations one by one, so that no number depends on a batch; every frame of every turn counts.

    Args:
        seed, name: key of the bootstrap.
    """
    num_codebooks = model.config.num_codebooks
    c0_sums, c0_counts, depth_sums, depth_counts = [], [], [], []
    codebook_sums = torch.zeros(num_codebooks, dtype=torch.float64)
    stops = []
    promised, ended = [], []
    was_training = model.training
    model.eval()
    for sample in samples:
        rows = rows_from_turns(sample.turns, tokenizer, num_codebooks)
        batch = Batch.from_documents([[rows]])
        losses = csm_loss(model, batch, amortization=1.0)
        c0_count, depth_count = int(losses.c0_count), int(losses.depth_count)
        c0_sums.append(float(losses.c0) * c0_count)
        depth_sums.append(float(losses.depth) * depth_count)
        c0_counts.append(c0_count)
        depth_counts.append(depth_count)
        weights = torch.tensor([c0_count] + [depth_count / (num_codebooks - 1)] * (num_codebooks - 1), dtype=torch.float64)
        codebook_sums += losses.per_codebook.double() * weights
        assert losses.stop_counts is not None
        stops.append(losses.stop_counts.tolist())
        is_audio = batch.mask[0, 1:, 0]
        promised.append(model(batch.tokens, batch.mask).c0_logits[0, :-1].float().softmax(dim=-1)[is_audio, 0].double())
        ended.append(is_eos_row(batch.tokens, batch.mask)[0, 1:][is_audio].double())
    model.train(was_training)
    totals = torch.tensor([sum(c0_counts)] + [sum(depth_counts) / (num_codebooks - 1)] * (num_codebooks - 1), dtype=torch.float64)
    heard, ends, false, frames = zip(*stops, strict=True)
    return Likelihood(
        c0=ratio_estimate(c0_sums, c0_counts, seed=seed, name=f"{name}/c0"),
        depth=ratio_estimate(depth_sums, depth_counts, seed=seed, name=f"{name}/depth"),
        per_codebook=[round(value, 6) for value in (codebook_sums / totals).tolist()],
        eos_recall=ratio_estimate(heard, ends, seed=seed, name=f"{name}/eos_recall"),
        false_stop=ratio_estimate(false, frames, seed=seed, name=f"{name}/false_stop"),
        eos_expected=ratio_estimate(
            [float(p.sum()) for p in promised], [float(e.sum()) for e in ended], seed=seed, name=f"{name}/eos_expected"
        ),
        eos_ece=Estimate(calibration_error(torch.cat(promised), torch.cat(ended)), None, None, len(samples)),
    )


def calibration_error(probabilities: torch.Tensor, happened: torch.Tensor, num_bins: int = 10) -> float:
    """Mean distance of what was promised from what happened, over bins of equal width, weighted by how many fall into each.

    Args:
        probabilities, happened: [N]; happened is 0 or 1.
    """
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, (probabilities - happened).double())
    return float(gaps.abs().sum() / len(probabilities))
