"""The frame loop against the plain model: cached equals uncached, batched equals single, rows end on their own."""

from __future__ import annotations

import pytest
import torch

from csm import CSM
from csm.generation import DepthLoop, decode_frames, iterate_frames
from csm.generation.sampling import Sampler
from tests.conftest import tiny_config


def loud(config, seed: int = 1) -> CSM:
    """Weights of std 0.2 and uneven norms: logits that differ by more than rounding, and norms that must not be left out."""
    model = CSM(config, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=random)
            parameter.copy_(noise if parameter.ndim > 1 else 1 + noise)
    return model


def made_up_prompt(config, batch_size: int, length: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Half text, half frames: tokens and mask [B, T, K+1]."""
    tokens = torch.zeros(batch_size, length, config.num_codebooks + 1, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    half = length // 2
    tokens[:, :half, -1] = torch.randint(1, config.text_vocab_size, (batch_size, half), generator=generator)
    mask[:, :half, -1] = True
    size = (batch_size, length - half, config.num_codebooks)
    tokens[:, half:, :-1] = torch.randint(1, config.audio_vocab_size, size, generator=generator)
    mask[:, half:, :-1] = True
    return tokens, mask


@torch.no_grad()
def decode_without_cache(model: CSM, tokens, mask, num_frames: int) -> torch.Tensor:
    """Greedy, every frame from the whole forward: slow, and what the loop must equal."""
    num_codebooks = model.config.num_codebooks
    frames = []
    for _ in range(num_frames):
        hidden = model(tokens, mask).hidden[:, -1]
        frame = torch.zeros(tokens.shape[0], num_codebooks, dtype=torch.int64)
        frame[:, 0] = model.codebook0_head(hidden).argmax(dim=-1)
        for codebook in range(1, num_codebooks):
            frame[:, codebook] = model.depth_logits(hidden, frame)[:, codebook - 1].argmax(dim=-1)
        frames.append(frame)
        row = torch.cat((frame, torch.zeros_like(frame[:, :1])), dim=1)[:, None]
        row_mask = torch.ones_like(row, dtype=torch.bool)
        row_mask[..., -1] = False
        tokens, mask = torch.cat((tokens, row), dim=1), torch.cat((mask, row_mask), dim=1)
    return torch.stack(frames, dim=1)


def test_cached_greedy_frames_equal_uncached(any_model_config, generator):
    model = loud(any_model_config)
    tokens, mask = made_up_prompt(any_model_config, 3, 12, generator)
    expected = decode_without_cache(model, tokens, mask, 6)
    assert torch.equal(decode_frames(model, tokens, mask, max_frames=6, temperature=0, stop_at_eos=False), expected)
    assert expected.unique().numel() > 5


def test_depth_loop_logits_equal_teacher_forced(any_model_config, generator):
    model = loud(any_model_config)
    hidden = torch.randn(5, any_model_config.backbone.width, generator=generator)
    frame = torch.randint(1, any_model_config.audio_vocab_size, (5, any_model_config.num_codebooks), generator=generator)
    logits = []

    class Forced(Sampler):
        def draw(self, values, frame_index, codebook):
            logits.append(values)
            return frame[:, codebook]

    DepthLoop(model).run(hidden, frame[:, 0], Forced([0], 1, 4, temperature=0, top_k=0), 0)
    expected = model.depth_logits(hidden, frame)
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, atol=2e-5, rtol=1e-4)  # float32, other order of sums


def test_prompts_of_different_lengths_decode_together_as_alone(generator):
    config = tiny_config()
    model = loud(config)
    prompts = [made_up_prompt(config, 1, length, generator) for length in (5, 11, 8)]
    alone = [list(iterate_frames(model, *p, seeds=[9 + i], max_frames=12, temperature=0.9)) for i, p in enumerate(prompts)]
    for pad_on_the_left in (True, False):
        tokens = torch.zeros(3, 11, config.num_codebooks + 1, dtype=torch.int64)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (row_tokens, row_mask) in enumerate(prompts):
            length = row_tokens.shape[1]
            place = slice(11 - length, 11) if pad_on_the_left else slice(0, length)
            tokens[row, place], mask[row, place] = row_tokens[0], row_mask[0]
        together = list(iterate_frames(model, tokens, mask, seeds=[9, 10, 11], max_frames=12, temperature=0.9))
        for row, frames in enumerate(alone):
            assert torch.equal(torch.stack([frame[row] for frame in together[: len(frames)]]), torch.cat(frames))


def test_rows_are_zero_behind_their_end_and_the_batch_stops_with_the_last(generator):
    config = tiny_config(num_codebooks=2, audio_vocab_size=3)  # one frame in nine or so is all zero
    model = CSM(config, seed=1)
    tokens, mask = made_up_prompt(config, 8, 6, generator)
    frames = decode_frames(model, tokens, mask, max_frames=100, temperature=1.0, top_k=0, generator=generator)
    is_sound = frames.any(dim=-1)  # [B, F]
    lengths = is_sound.sum(dim=1)
    assert frames.shape[1] == lengths.max() < 100 and lengths.min() < lengths.max()
    assert (is_sound == (torch.arange(frames.shape[1]) < lengths[:, None])).all()
    endless = decode_frames(model, tokens, mask, max_frames=30, temperature=1.0, top_k=0, stop_at_eos=False, generator=generator)
    assert endless.shape == (8, 30, 2) and (endless == 0).all(dim=-1).any()


def test_the_generator_seeds_the_rows(generator):
    model = CSM(tiny_config(), seed=1)
    tokens, mask = made_up_prompt(model.config, 2, 6, generator)

    def frames(seed: int) -> torch.Tensor:
        return decode_frames(model, tokens, mask, max_frames=5, stop_at_eos=False, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(frames(1), frames(1)) and not torch.equal(frames(1), frames(2))
    assert not torch.equal(frames(1)[0], frames(1)[1])


def test_bfloat16_speaks(generator):
    model = CSM(tiny_config(), seed=1).to(torch.bfloat16)
    tokens, mask = made_up_prompt(model.config, 2, 6, generator)
    assert decode_frames(model, tokens, mask, max_frames=4, stop_at_eos=False).shape == (2, 4, 4)


def test_training_goes_on_after_speaking(generator):
    model = CSM(tiny_config(), seed=1)
    tokens, mask = made_up_prompt(model.config, 2, 6, generator)
    decode_frames(model, tokens, mask, max_frames=3)
    model(tokens, mask).c0_logits.sum().backward()
    assert model.projection.weight.grad is None and model.codebook0_head.weight.grad is not None


def test_what_does_not_fit_is_refused(generator):
    model = CSM(tiny_config(), seed=1)
    tokens, mask = made_up_prompt(model.config, 2, 6, generator)
    with pytest.raises(ValueError, match=r"expected \[B, T, 5\]"):
        decode_frames(model, tokens[..., :-1], mask[..., :-1])
    with pytest.raises(ValueError, match="do not fit the window of 128"):
        decode_frames(model, tokens, mask, max_frames=124)
    with pytest.raises(ValueError, match="max_frames=0"):
        decode_frames(model, tokens, mask, max_frames=0)
    with pytest.raises(ValueError, match="a prompt is empty"):
        decode_frames(model, tokens, mask & torch.tensor([True, False])[:, None, None])
    with torch.no_grad():
        model.codebook0_head.weight.fill_(1.0)
        model.backbone.norm.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at frame 0"):
        decode_frames(model, tokens, mask)
