"""The transformer's elementwise maths with the backward passes written out: fewer passes over memory, fewer tensors kept.

Plain autograd keeps every intermediate and walks memory once an operation; on a CPU that is a third of a training step.
Each function here states what it computes, and tests/test_model.py holds it against the plain formula.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from csm.model.products import compute_dtype, linear

_CHUNK_ELEMENTS = 1 << 20  # 4 MiB in float32, so that a CPU's passes over a chunk stay in its cache


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a row. Measured [8, 192, 256] float32 forward and backward: see `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, rstd)
        return (wide * rstd).mul_(scale).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, rstd = ctx.saved_tensors
        width = x.shape[-1]
        grad, weight = grad.float(), scale.float()
        wants = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        # LayerNorm's kernel with the mean set to zero; it also takes out the gradient's mean, which is put back.
        grad_x, grad_scale, _ = torch.ops.aten.native_layer_norm_backward(
            grad.contiguous(), x.float().contiguous(), [width], torch.zeros_like(rstd), rstd, weight, None, wants
        )
        if wants[0]:
            grad_x = grad_x.addcmul_((grad @ weight)[..., None], rstd, value=1 / width).to(x.dtype)
        return grad_x, grad_scale.to(scale.dtype) if wants[1] else None, None, None


class _SwiGLU(torch.autograd.Function):
    """Keeps its two inputs and not silu(gate), which is cheap to have again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


class _GatedLinear(torch.autograd.Function):
    """Keeps gate and up, and not their product: a third of what a feed-forward part would keep.

    The product is had again where its gradients are, in the same walk over memory, by rows that stay in a CPU's cache.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        gate, up, weight = ctx.saved_tensors
        grad_gate = linear(grad, weight.to(grad.dtype).T)  # so far the product's
        grad_up = torch.empty_like(up)
        product = torch.empty_like(up) if ctx.needs_input_grad[2] else None
        size = _rows_in_chunk(gate)
        for start in range(0, gate.shape[0], size):
            rows = slice(start, start + size)
            silu, grad_product = F.silu(gate[rows]), grad_gate[rows]
            torch.mul(silu, grad_product, out=grad_up[rows])
            if product is not None:
                torch.mul(silu, up[rows], out=product[rows])
            grad_gate[rows] = torch.ops.aten.silu_backward(grad_product.mul_(up[rows]), gate[rows])
        return grad_gate, grad_up, None if product is None else linear(grad.T, product.T).to(weight.dtype)


class _SumAndLookUp(torch.autograd.Function):
    """Two readers of one table whose gradients meet before they are written: one dense gradient, not two and their sum."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, bags: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.num_rows = table.shape[0]
        offsets = torch.arange(0, bags.numel(), bags.shape[1], device=bags.device)
        bags, weights = bags.flatten(), weights.flatten()
        sums, *shape_of_bags = torch.ops.aten._embedding_bag(table, bags, offsets, False, 0, False, weights)  # False: dense; 0: sum
        ctx.save_for_backward(bags, weights, rows, offsets, *shape_of_bags)
        return sums, F.embedding(rows, table)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor, grad_rows: Tensor) -> tuple[Tensor | None, None, None, None]:
        bags, weights, rows, offsets, *shape_of_bags = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        grad = torch.ops.aten._embedding_bag_backward(
            grad_sums.contiguous(), bags, offsets, *shape_of_bags, ctx.num_rows, False, 0, False, weights
        )
        return grad.index_add_(0, rows.flatten(), grad_rows.flatten(0, -2)), None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Works in chunks of rows, so that no float32 copy of all logits is made; keeps one number a row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, overwrite: bool) -> Tensor:
        normaliser = torch.cat([chunk.float().logsumexp(dim=-1) for chunk in logits.split(_rows_in_chunk(logits))])
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.overwrite = overwrite
        of_target = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float()
        return (normaliser - of_target).masked_fill_(targets < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normaliser = ctx.saved_tensors
        grad_logits = logits if ctx.overwrite else torch.empty_like(logits)
        size = _rows_in_chunk(logits)
        columns = zip(targets.clamp(min=0)[:, None].split(size), grad.masked_fill(targets < 0, 0.0)[:, None].split(size), strict=True)
        for start, (index, scale) in zip(range(0, logits.shape[0], size), columns, strict=True):
            rows = slice(start, start + size)
            probability = (logits[rows].float() - normaliser[rows, None]).exp_().mul_(scale)
            grad_logits[rows] = probability.scatter_add_(1, index, -scale)
        return grad_logits, None, None


def _rows_in_chunk(x: Tensor) -> int:
    # A GPU wants few, large launches; fake tensors stand for one (csm plan).
    is_cpu = x.device.type == "cpu" and not isinstance(x, FakeTensor)
    num_elements = _CHUNK_ELEMENTS if is_cpu else 16 * _CHUNK_ELEMENTS
    return max(1, num_elements // x.shape[1])


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in the dtype of the products that follow."""
    return _RMSNorm.apply(x, scale, eps, compute_dtype(x))


def rms_norm_again(x: Tensor, scale: Tensor, eps: float) -> Callable[[], Tensor]:
    """A function that gives what `rms_norm` gives here and now, bit for bit, without a gradient."""
    x, scale, dtype = x.detach(), scale.detach(), compute_dtype(x)
    return lambda: _RMSNorm.apply(x, scale, eps, dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T: twice [..., in] and [out, in] -> [..., out]."""
    return _GatedLinear.apply(gate.flatten(0, -2), up.flatten(0, -2), weight).unflatten(0, gate.shape[:-1])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate lane pairs (0, 1), (2, 3), ... of each head, as Sesame's weights want them.

    Args:
        x: [B, T, H, head_dim].
        cos, sin: float32, broadcastable to [B, T, 1, head_dim / 2]; the product is taken in float32.
    Returns:
        [B, T, H, head_dim] in x's dtype.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # One complex product: a fifth of the time of the products below. The compiler would fuse those, not this.
        turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin))
    else:
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def sum_and_look_up(table: Tensor, bags: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sums of some rows of a table, and other rows as they are.

    Args:
        table: [rows, D].
        bags: int64 [M, K], rows to sum.
        weights: [M, K] in the table's dtype; no gradient.
        rows: int64 [..., k], rows to look up.
    Returns:
        [M, D] and [..., k, D].
    """
    return _SumAndLookUp.apply(table, bags, weights, rows)


def cross_entropy(logits: Tensor, targets: Tensor, *, overwrite: bool = False) -> Tensor:
    """-log softmax(logits)[target] of each row, in float32; 0 where the target is negative.

    Args:
        logits: [M, V], any float dtype.
        targets: int64 [M].
        overwrite: the backward pass writes the gradient over the logits, which nothing may read after it; a second backward
            pass is then refused by autograd. For logits too large to hold twice.
    """
    return _CrossEntropy.apply(logits, targets, overwrite)
