"""One code from its logits: temperature, top-k with ties, noise that belongs to the row."""

from __future__ import annotations

import math

import pytest
import torch

from csm.generation.sampling import Sampler, sample_topk, uniform_noise


def draw_many(logits: list[float], temperature: float, top_k: int, num_draws: int = 20_000) -> torch.Tensor:
    """Shares of each code over many draws."""
    uniforms = uniform_noise(0, num_draws, 1)[:, 0]
    codes = sample_topk(torch.tensor(logits).expand(num_draws, -1), uniforms, temperature, top_k)
    return torch.bincount(codes, minlength=len(logits)) / num_draws


def test_shares_follow_the_softmax_at_temperature():
    logits = [0.0, 1.0, 2.0, -math.inf]
    expected = (torch.tensor(logits) / 0.7).softmax(dim=0)
    torch.testing.assert_close(draw_many(logits, 0.7, 0), expected, atol=0.015, rtol=0)  # 4 standard errors of 20,000 draws


def test_topk_keeps_the_k_highest():
    shares = draw_many([3.0, 2.0, 1.0, 0.0], 1.0, 2)
    assert (shares[:2] > 0).all() and (shares[2:] == 0).all()


def test_topk_keeps_ties_with_the_kth():
    shares = draw_many([2.0, 1.0, 1.0, 1.0, 0.0], 1.0, 2)
    assert (shares[:4] > 0.1).all() and shares[4] == 0


def test_temperature_comes_before_topk_and_zero_is_greedy():
    logits = torch.tensor([[0.0, 5.0, 1.0], [2.0, 2.0, 1.0]])
    assert sample_topk(logits, None, 0, 2).tolist() == [1, 0]


def test_extreme_noise_never_draws_an_excluded_code():
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]])
    for value in (0.0, float(uniform_noise(0, 1, 1).clamp(max=0) + 1 - 2**-22)):
        assert sample_topk(logits, torch.tensor([value]), 1.0, 0).item() in (1, 2)


def test_noise_of_the_first_frames_does_not_depend_on_the_length():
    assert torch.equal(uniform_noise(7, 3, 4), uniform_noise(7, 9, 4)[:3])
    assert not torch.equal(uniform_noise(7, 3, 4), uniform_noise(8, 3, 4))


def test_a_row_draws_the_same_alone_and_among_others(generator):
    logits = torch.randn(3, 50, generator=generator)
    together = Sampler([5, 6, 7], 2, 4, temperature=1.0, top_k=20)
    for row, seed in enumerate([5, 6, 7]):
        alone = Sampler([seed], 2, 4, temperature=1.0, top_k=20)
        assert alone.draw(logits[row : row + 1], 1, 2).item() == together.draw(logits, 1, 2)[row].item()


@pytest.mark.parametrize(("temperature", "top_k"), [(-1.0, 50), (math.nan, 50), (math.inf, 50), (0.9, -1), (0.9, 1.5)])
def test_meaningless_settings_are_refused(temperature, top_k):
    with pytest.raises(ValueError, match=r"(temperature|top_k)=.*expected"):
        Sampler([0], 1, 4, temperature=temperature, top_k=top_k)
