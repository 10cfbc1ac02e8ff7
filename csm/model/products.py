"""Matrix products, also on CPUs that have no units for bfloat16.

There torch multiplies bfloat16 matrices in plain loops: [256, 2048] by [2048, 2048], forward and backward, took 12.1 s on one
thread of an AVX2 EPYC, and 0.17 s with the operands widened on the way, where float32 itself takes 0.13 s. What comes out is
what such units give: operands of bfloat16, sums in float32, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_WIDENED_ROWS = 4  # with fewer, as when a frame is generated, widening the weight takes longer than torch's loops


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that matrix products on `x` run in: autocast's where it is on, else `x`'s own."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def has_bfloat16_products(device_type: str) -> bool:
    """Whether a kind of device ("cpu", "cuda") multiplies bfloat16 matrices by units made for it.

    A CPU needs AVX-512 BF16, AMX or Arm's BF16, and a torch with oneDNN, which knows how to use them.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and _CPU_HAS_BFLOAT16


def _cpu_has_bfloat16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # torch 2.8, which tells of x86 only


_CPU_HAS_BFLOAT16 = _cpu_has_bfloat16()


def must_widen(x: Tensor) -> bool:
    """Whether products on `x` are of bfloat16 on a CPU that lacks them. The compiler is left to its own kernels."""
    if _CPU_HAS_BFLOAT16 or torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and compute_dtype(x) == torch.bfloat16


class _Widened(torch.autograd.Function):
    """The product of [..., n, k] and [..., k, m], equal in front, in float32; keeps its operands as they came."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        with torch.autocast("cpu", enabled=False):
            return (_widen(a) @ _widen(b)).bfloat16()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad.float()
        with torch.autocast("cpu", enabled=False):
            grad_a = (grad @ _widen(b).mT).to(a.dtype) if ctx.needs_input_grad[0] else None
            grad_b = (_widen(a).mT @ grad).to(b.dtype) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def _widen(x: Tensor) -> Tensor:
    return x.bfloat16().float()  # what autocast would have rounded is rounded here


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [..., in] and [out, in] -> [..., out]."""
    if must_widen(x) and x.numel() >= _MIN_WIDENED_ROWS * x.shape[-1]:
        return _Widened.apply(x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])
    return F.linear(x, weight)


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """[G, n, k] and [G, k, m] -> [G, n, m]."""
    if must_widen(a) and a.shape[1] >= _MIN_WIDENED_ROWS:
        return _Widened.apply(a, b)
    return torch.bmm(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add [G, n, k] times [G, k, m] to `total`, [G, n, m], which may be wider; no gradient."""
    if must_widen(a):
        a, b = a.float(), b.float()
    if a.dtype == total.dtype:
        total.baddbmm_(a, b)
    else:
        total += torch.bmm(a, b)
