"""The transformer's elementwise maths with the backward passes written out: fewer passes over memory, fewer tensors kept.

Plain autograd keeps every intermediate and walks memory once an operation; on a CPU that is a third of a training step.
Each function here states what it computes, and tests/test_model.py holds it against the plain formula.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products on `x` run in: autocast's where it is on, else `x`'s own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


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


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, in float32, returned in the dtype of the products that follow."""
    return _RMSNorm.apply(x, scale, eps, compute_dtype(x))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up)


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
