"""Products of bfloat16 on a CPU without units for it: the numbers of torch's own, whatever this machine has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csm import CSM
from csm.config import ModelConfig
from csm.frames import Batch
from csm.loss import csm_loss
from csm.model import products
from csm.model.functions import gated_linear


@pytest.fixture(params=[True, False], ids=["bfloat16_units", "widened"])
def has_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_CPU_HAS_BFLOAT16", request.param)
    return request.param


@pytest.mark.parametrize("shape", [(24, 16), (3, 8, 16), (1, 16)], ids=str)
def test_linear_and_its_gradients_are_torch_s(has_units: bool, generator: torch.Generator, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(12, 16, generator=generator).bfloat16().requires_grad_()
    grad = torch.randn(*shape[:-1], 12, generator=generator).bfloat16()
    out = products.linear(x, weight)
    got = torch.autograd.grad(out, (x, weight), grad)
    wide_x, wide_weight = x.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = F.linear(wide_x, wide_weight)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.02)
    for ours, theirs in zip(got, torch.autograd.grad(expected, (wide_x, wide_weight), grad.float()), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0.01, atol=0.02)


def test_batched_product_and_its_gradients_are_torch_s(has_units: bool, generator: torch.Generator) -> None:
    a = torch.randn(3, 9, 16, generator=generator).bfloat16().requires_grad_()
    b = torch.randn(3, 16, 7, generator=generator).bfloat16().requires_grad_()
    out = products.batched_product(a, b)
    got = torch.autograd.grad(out.float().square().sum(), (a, b))
    wide_a, wide_b = a.detach().float().requires_grad_(), b.detach().float().requires_grad_()
    expected = wide_a @ wide_b
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=0.02)
    for ours, theirs in zip(got, torch.autograd.grad(expected.square().sum(), (wide_a, wide_b)), strict=True):
        torch.testing.assert_close(ours.float(), theirs, rtol=0.02, atol=0.3)


def test_gated_linear_and_its_gradients_are_float32_s_within_bfloat16(has_units: bool, generator: torch.Generator) -> None:
    gate, up = (torch.randn(9, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(12, 16, generator=generator).requires_grad_()  # float32, as with autocast
    with torch.autocast("cpu", torch.bfloat16):
        out = gated_linear(gate, up, weight)
    got = torch.autograd.grad(out.float().square().sum(), (gate, up, weight))
    wide = [tensor.detach().float().requires_grad_() for tensor in (gate, up, weight)]
    expected = (F.silu(wide[0]) * wide[1]) @ wide[2].T
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.05)
    for ours, theirs, leaf in zip(got, torch.autograd.grad(expected.square().sum(), wide), (gate, up, weight), strict=True):
        assert ours.dtype == leaf.dtype
        torch.testing.assert_close(ours.float(), theirs, rtol=0.03, atol=0.03 * float(theirs.abs().max()))


def losses(model: CSM, batch: Batch, *, is_mixed: bool) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        loss = csm_loss(model, batch, amortization=0.5).loss
    loss.backward()
    return loss.detach(), [parameter.grad.float() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("is_mixed", [True, False], ids=["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("is_packed", [True, False])
def test_a_step_is_the_same_with_and_without_units(
    monkeypatch: pytest.MonkeyPatch, tiny_model_config: ModelConfig, generator: torch.Generator, is_mixed: bool, is_packed: bool
) -> None:
    """Loss, and gradients of weights that keep their dtype; both paths round, so near is what they can be."""
    model = CSM(tiny_model_config, dtype=torch.float32 if is_mixed else torch.bfloat16)
    tokens = torch.randint(1, 32, (2, 24, 5), generator=generator)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[..., -1] = False
    documents = torch.arange(24).expand(2, -1) // 12 if is_packed else torch.zeros(2, 24, dtype=torch.int64)
    learn = torch.ones(2, 24, dtype=torch.bool)
    batch = Batch(tokens, mask, documents, learn, learn)
    found = []
    for has_units in (True, False):
        monkeypatch.setattr(products, "_CPU_HAS_BFLOAT16", has_units)
        found.append(losses(model, batch, is_mixed=is_mixed))
    (loss, gradients), (widened_loss, widened) = found
    assert abs(loss - widened_loss) < 0.01 * loss
    assert len(gradients) == len(widened) == sum(1 for _ in model.parameters())
    for ours, theirs in zip(gradients, widened, strict=True):
        assert (ours - theirs).norm() <= 0.03 * ours.norm()


def test_float32_is_never_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_CPU_HAS_BFLOAT16", False)
    assert not products.must_widen(torch.zeros(8, 8))
    assert products.must_widen(torch.zeros(8, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert products.must_widen(torch.zeros(8, 8))


def test_a_gpu_s_word_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert not products.has_bfloat16_products("cuda")  # emulation does not count
    assert not products.has_bfloat16_products("mps")
