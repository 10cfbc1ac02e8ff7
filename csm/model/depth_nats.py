"""The depth decoder's loss a few frames at a time, with its gradient taken at once.

What the depth decoder keeps of a step's picked frames for the backward pass is a large part of a step's memory: K positions a
frame in every layer, and the logits. The loss is a sum over frames, so the gradient of a group of frames can be had as soon as
the group is through, before the next begins: nothing is computed twice, and one group's memory is enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from csm.model.functions import cross_entropy
from csm.model.products import add_product, batched_product, compute_dtype


@dataclass
class DepthTargets:
    """What the depth decoder is to predict.

    Attributes:
        codes: int64 [N, K-1], codebooks 1..K-1 of each frame; -1 carries no loss.
        weights: float32 [K-1], of each codebook's nats in the total.
        frames_at_once: size of a group.
    """

    codes: Tensor
    weights: Tensor
    frames_at_once: int


@dataclass
class DepthNats:
    """Cross-entropy of the depth decoder's targets.

    Attributes:
        total: scalar float32, `sums` weighed and added up. Its gradient is there already; a second backward pass is refused.
        sums: float32 [K-1], nats of each codebook over all frames; no gradient.
    """

    total: Tensor
    sums: Tensor


class _GroupedNats(torch.autograd.Function):
    """Keeps gradients instead of activations."""

    @staticmethod
    def forward(
        ctx: Any, decode: nn.Module, names: list[str], targets: DepthTargets, head: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        wants_head, *wants = ctx.needs_input_grad[3:]
        (hidden, embeds), parameters = inputs[:2], inputs[2:]
        # Leaves of their own: the parameters' would wake whoever waits for their gradients, once a group.
        learnt = {name: p.detach().requires_grad_(want) for name, p, want in zip(names, parameters, wants[2:], strict=True)}
        head_grad = torch.zeros_like(head) if wants_head else None
        input_grads = [torch.empty_like(x) if want else None for x, want in zip((hidden, embeds), wants, strict=False)]
        head = head.to(compute_dtype(hidden))
        sums = torch.zeros_like(targets.weights)
        for start in range(0, hidden.shape[0], targets.frames_at_once):
            group = slice(start, start + targets.frames_at_once)
            leaves = [x[group].detach().requires_grad_(want) for x, want in zip((hidden, embeds), wants, strict=False)]
            with torch.set_grad_enabled(any(wants)):
                outputs = functional_call(decode, learnt, tuple(leaves))  # [K-1, n, E]
            logits = batched_product(outputs, head).requires_grad_(wants_head or outputs.requires_grad)
            with torch.set_grad_enabled(logits.requires_grad):
                nats = nats_by_codebook(logits, targets.codes[group])
            sums += nats.detach()
            if not logits.requires_grad:
                continue
            with torch.autocast(hidden.device.type, enabled=False):  # as backward passes are
                (grad_logits,) = torch.autograd.grad(nats, logits, targets.weights)  # written over the logits
                if head_grad is not None:
                    add_product(head_grad, outputs.detach().mT, grad_logits)
                grad_outputs = batched_product(grad_logits, head.mT) if outputs.requires_grad else None
                del logits, grad_logits
                if grad_outputs is not None:
                    outputs.backward(grad_outputs)
            for grad, leaf in zip(input_grads, leaves, strict=True):
                if grad is not None:
                    grad[group] = leaf.grad
        ctx.save_for_backward(head_grad, *input_grads, *(leaf.grad for leaf in learnt.values()))
        ctx.mark_non_differentiable(sums)
        return (sums * targets.weights).sum(), sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: together these are as large as the depth decoder, and nobody else has them.
        return None, None, None, *(kept if kept is None else kept.mul_(grad) for kept in ctx.saved_tensors)


def nats_by_codebook(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of each codebook, summed over frames; the backward pass writes the gradient over the logits.

    Args:
        logits: [K-1, N, V], contiguous.
        codes: int64 [N, K-1]; -1 carries no loss.
    Returns:
        float32 [K-1].
    """
    return cross_entropy(logits.flatten(0, 1), codes.T.flatten(), overwrite=True).view(logits.shape[:2]).sum(dim=1)


def depth_nats(decode: nn.Module, head: Tensor, hidden: Tensor, embeds: Tensor, targets: DepthTargets) -> DepthNats:
    """Cross-entropy of codebooks 1..K-1, summed over frames.

    Args:
        decode: hidden states [n, D] and embeddings [n, K-1, D] to what the heads read, [K-1, n, E].
        head: [K-1, E, V].
        hidden: [N, D], the backbone's at the position before each frame.
        embeds: [N, K-1, D], of codebooks 0..K-2.
    """
    names, parameters = zip(*decode.named_parameters(), strict=True)
    return DepthNats(*_GroupedNats.apply(decode, list(names), targets, head, hidden, embeds, *parameters))
