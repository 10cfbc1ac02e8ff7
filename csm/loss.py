"""The loss: codebook 0 of every frame, codebooks 1..K-1 of a picked share of them, and what is measured beside it.

The hidden state at t-1 predicts the frame at t, so a row is a target only when the position before it is of the same
document. EOS rows are targets like any other. Means divide by the counts of the whole step when those are given, so that
splitting a batch over ranks and micro-batches changes neither the loss nor the gradient. Every random choice is keyed by
(seed, step, rank, micro-batch): the same after a resume, and no global random state is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.frames import PADDING_DOCUMENT, Batch, is_eos_row
from csm.model.depth_nats import DepthTargets, nats_by_codebook
from csm.model.functions import cross_entropy

_IGNORED = -1  # target of a row that is not learnt


@dataclass
class Losses:
    """The loss of a batch and its parts. All but `loss` are detached.

    Attributes:
        loss: scalar float32; `c0_weight * c0 + depth_weight * depth`, and the z-loss where it is on.
        c0, depth: mean cross-entropy in nats; 0 when there is no target.
        per_codebook: [K] float32, nats of each codebook.
        c0_count, depth_count: int64 scalars, targets in this batch: rows, and picked rows * (K-1).
        stop_counts: int64 [4], only in eval mode: EOS rows heard as EOS, EOS rows, frames heard as EOS, frames. "Heard as
            EOS" looks at codebook 0 alone (its most likely code is 0): exact for codecs that keep 0 for EOS, an upper
            bound for Mimi, where 0 is also a code.
    """

    loss: Tensor
    c0: Tensor
    depth: Tensor
    per_codebook: Tensor
    c0_count: Tensor
    depth_count: Tensor
    stop_counts: Tensor | None = None

    @property
    def eos_recall(self) -> Tensor | None:
        """Share of EOS rows heard as EOS; nan without any; None in training mode."""
        return None if self.stop_counts is None else self.stop_counts[0] / self.stop_counts[1]

    @property
    def false_stop(self) -> Tensor | None:
        """Share of audio frames heard as EOS; nan without any; None in training mode."""
        return None if self.stop_counts is None else self.stop_counts[2] / self.stop_counts[3]


def csm_loss(
    model: nn.Module,
    batch: Batch,
    amortization: float = 1 / 16,
    seed: int = 0,
    step: int = 0,
    *,
    rank: int = 0,
    micro_batch: int = 0,
    c0_weight: float = 1.0,
    depth_weight: float = 1.0,
    codebook_weights: Sequence[float] | None = None,
    z_loss: float = 0.0,
    frame_dropout: float = 0.0,
    num_c0_targets: int | Tensor | None = None,
    num_depth_targets: int | Tensor | None = None,
    static_shapes: bool = False,
    depth_frames_at_once: int | None = None,
) -> Losses:
    """Run the model on a batch and sum up its loss.

    Args:
        model: a CSM, or a wrapper called like one.
        amortization: share of the frames that the depth decoder learns from; 1 takes every one (validation).
        seed, step, rank, micro_batch: key of the random choices.
        codebook_weights: [K-1], relative weights of codebooks 1..K-1; None weighs them alike.
        z_loss: weight of the mean of logsumexp(c0 logits)^2.
        frame_dropout: each row hides a share of its input audio frames from the backbone, drawn uniformly from
            [0, frame_dropout]; EOS rows, text, targets and the depth decoder's input stay. Only in training mode.
        num_c0_targets, num_depth_targets: counts of the whole step (all ranks and micro-batches), see `count_targets`;
            then the losses of its parts add up to the step's. None: this batch's own.
        static_shapes: pad the picked rows to a number that depends on the batch's shape only, for torch.compile.
        depth_frames_at_once: picked rows that the depth decoder takes at a time, gradient included, before it takes the next: less
            memory, the same loss. Not for parameters that are cut over processes (ZeRO 3), nor to be compiled. None: all at once.
    Returns:
        A batch without targets gives a zero loss that is still attached to every parameter, and counts of 0.
    Raises:
        ValueError: if `amortization`, `codebook_weights` or `depth_frames_at_once` do not fit.
    """
    if not 0 < amortization <= 1:
        raise ValueError(f"amortization={amortization}: expected a share in (0, 1]")
    if depth_frames_at_once is not None and depth_frames_at_once < 1:
        raise ValueError(f"depth_frames_at_once={depth_frames_at_once}: expected 1 or more, or None")
    tokens, mask = batch.tokens, batch.mask
    follows = _follows_in_document(batch.document_ids) & mask[..., 0]
    is_c0_target, is_depth_target = batch.learn_c0 & follows, batch.learn_depth & follows
    key = (seed, step, rank, micro_batch)
    depth_index, num_picked = pick_depth_rows(is_depth_target, amortization, key, static_shapes=static_shapes)
    if frame_dropout > 0 and model.training:
        mask = _hide_frames(tokens, mask, frame_dropout, key)
    row, position = depth_index.unbind(1)
    num_depth_codebooks = tokens.shape[-1] - 2
    depth_codes = tokens[row, position, 1:-1]  # [N, K-1]
    if num_picked < depth_index.shape[0]:
        is_filler = torch.arange(depth_index.shape[0], device=tokens.device) >= num_picked
        depth_codes = depth_codes.masked_fill(is_filler[:, None], _IGNORED)
    depth_count = torch.tensor(num_picked * num_depth_codebooks, device=tokens.device)
    c0_count = is_c0_target.sum()
    c0_total = _at_least_one(c0_count if num_c0_targets is None else num_c0_targets)
    depth_total = _at_least_one(depth_count if num_depth_targets is None else num_depth_targets)
    weights = _codebook_weights(codebook_weights, num_depth_codebooks, tokens.device) / depth_total

    if depth_frames_at_once is None:
        out = model(tokens, mask, document_ids=batch.document_ids, depth_index=depth_index)
        codebook_sums = nats_by_codebook(out.depth_logits.transpose(0, 1), depth_codes)
        depth = (codebook_sums * weights).sum()
    else:
        targets = DepthTargets(depth_codes, weights, depth_frames_at_once)
        out = model(tokens, mask, document_ids=batch.document_ids, depth_index=depth_index, depth_targets=targets)
        depth, codebook_sums = out.depth_nats.total, out.depth_nats.sums

    # The last position predicts nothing; it is ignored rather than cut off, which would copy the logits.
    c0_targets = F.pad(tokens[:, 1:, 0].masked_fill(~is_c0_target[:, 1:], _IGNORED), (0, 1), value=_IGNORED)  # [B, T]
    c0_sum = cross_entropy(out.c0_logits.flatten(0, 1), c0_targets.flatten(), overwrite=z_loss == 0).sum()
    c0 = c0_sum / c0_total
    loss = c0_weight * c0 + depth_weight * depth
    if z_loss > 0:
        squares = out.c0_logits[:, :-1].float().logsumexp(dim=-1).square()
        loss = loss + z_loss * (squares * is_c0_target[:, 1:]).sum() / c0_total
    per_codebook = torch.cat((c0.detach()[None], codebook_sums.detach() * num_depth_codebooks / depth_total))
    stop_counts = None if model.training else _count_stops(out.c0_logits[:, :-1], tokens, batch.mask, is_c0_target)
    return Losses(loss, c0.detach(), depth.detach(), per_codebook, c0_count, depth_count, stop_counts)


def count_targets(batch: Batch, amortization: float) -> tuple[int, int]:
    """Targets of codebook 0, and of codebooks 1..K-1 in the rows that will be picked: what `csm_loss` divides by."""
    follows = _follows_in_document(batch.document_ids) & batch.mask[..., 0]
    num_rows = int((batch.learn_depth & follows).sum())
    return int((batch.learn_c0 & follows).sum()), num_rows_to_pick(num_rows, amortization) * (batch.tokens.shape[-1] - 2)


def num_rows_to_pick(num_rows: int, amortization: float) -> int:
    """Rows the depth decoder learns from: round(num_rows * amortization), at least one when there is any."""
    return max(1, round(num_rows * amortization)) if num_rows else 0


def pick_depth_rows(
    is_depth_target: Tensor, amortization: float, key: tuple[int, ...], *, static_shapes: bool = False
) -> tuple[Tensor, int]:
    """Pick a uniform sample of the target rows.

    Args:
        is_depth_target: bool [B, T].
        key: of the generator; the same key and the same mask give the same rows.
        static_shapes: pad to `round(B * T * amortization)` rows.
    Returns:
        int64 [N, 2] of (row, position), sorted, and how many of the N are real. The others repeat a row and carry no
        loss; there is at least one, so that every parameter of the depth decoder always gets a gradient.
    """
    candidates = is_depth_target.nonzero()  # [count, 2], sorted
    num_picked = num_rows_to_pick(candidates.shape[0], amortization)
    if num_picked < candidates.shape[0]:
        order = torch.randperm(candidates.shape[0], generator=_generator("depth", *key))
        candidates = candidates[order[:num_picked].sort().values.to(candidates.device)]
    num_rows = max(1, round(is_depth_target.numel() * amortization)) if static_shapes else max(1, num_picked)
    if num_picked < num_rows:
        filler = candidates.new_tensor([[0, min(1, is_depth_target.shape[1] - 1)]])
        candidates = torch.cat((candidates, filler.expand(num_rows - num_picked, 2)))
    return candidates, num_picked


def _generator(purpose: str, *key: int) -> torch.Generator:
    digest = hashlib.blake2b(repr((purpose, *key)).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


def _follows_in_document(document_ids: Tensor) -> Tensor:
    """Whether the position before is of the same document: bool [B, T]."""
    same = (document_ids[:, 1:] == document_ids[:, :-1]) & (document_ids[:, 1:] != PADDING_DOCUMENT)
    return F.pad(same, (1, 0), value=False)


def _hide_frames(tokens: Tensor, mask: Tensor, frame_dropout: float, key: tuple[int, ...]) -> Tensor:
    """The mask with a share of the audio frames hidden, EOS rows never."""
    generator = _generator("frame_dropout", *key)
    share = torch.rand(tokens.shape[0], 1, generator=generator) * frame_dropout
    is_hidden = (torch.rand(tokens.shape[:2], generator=generator) < share).to(tokens.device)
    is_hidden &= mask[..., 0] & ~is_eos_row(tokens, mask)
    return mask & ~is_hidden[..., None]


def _codebook_weights(codebook_weights: Sequence[float] | None, num_codebooks: int, device: torch.device) -> Tensor:
    """float32 [num_codebooks] with a mean of 1."""
    if codebook_weights is None:
        return torch.ones(num_codebooks, device=device)
    weights = torch.tensor(list(codebook_weights), dtype=torch.float32, device=device)
    if weights.shape != (num_codebooks,) or not bool((weights >= 0).all()) or not bool(weights.sum() > 0):
        raise ValueError(
            f"codebook_weights={list(codebook_weights)}: expected {num_codebooks} weights of 0 or more, one for each of "
            "codebooks 1..K-1, not all 0"
        )
    return weights / weights.mean()


def _at_least_one(count: int | Tensor) -> int | Tensor:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)


@torch.no_grad()
def _count_stops(c0_logits: Tensor, tokens: Tensor, mask: Tensor, is_c0_target: Tensor) -> Tensor:
    stops = c0_logits.argmax(dim=-1) == 0  # [B, T-1]
    is_eos = is_eos_row(tokens, mask)[:, 1:] & is_c0_target[:, 1:]
    is_frame = is_c0_target[:, 1:] & ~is_eos
    return torch.stack(((stops & is_eos).sum(), is_eos.sum(), (stops & is_frame).sum(), is_frame.sum()))
