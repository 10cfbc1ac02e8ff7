"""The loss: which rows are targets, that splitting and padding change nothing, that picking is fair and repeatable."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from csm import CSM, ModelConfig, csm_loss
from csm.frames import Batch, Rows, audio_rows, is_eos_row, text_rows
from csm.loss import count_targets, num_rows_to_pick, pick_depth_rows

TOLERANCE = 2e-6  # float32 sums in another order


@pytest.fixture
def model(tiny_model_config: ModelConfig) -> CSM:
    """Weights of std 0.15, so that every frame has a loss of its own."""
    model = CSM(tiny_model_config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model


def document(config: ModelConfig, num_frames: int, seed: int, **learn: bool) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_vocab_size, (3,), generator=generator).tolist()
    codes = torch.randint(1, config.audio_vocab_size, (config.num_codebooks, num_frames), generator=generator)
    return Rows.concatenate([text_rows(text, config.num_codebooks), audio_rows(codes, **learn)])


@pytest.fixture
def batch(tiny_model_config: ModelConfig) -> Batch:
    documents = [document(tiny_model_config, n, seed=n) for n in (9, 4, 12, 7)]
    return Batch.from_documents([documents[:2], documents[2:3], documents[3:]], seq_len=30)


def gradients(model: CSM, *losses: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, gradient in first.items():
        torch.testing.assert_close(gradient, second[name], atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_loss_is_the_mean_over_targets_by_hand(model, batch):
    """Written out row by row: h_{t-1} predicts frame t, EOS rows included, each mean over its own targets."""
    losses = csm_loss(model.eval(), batch, amortization=1.0)
    c0, depth = [], []
    for row in range(batch.tokens.shape[0]):
        for position in range(1, batch.tokens.shape[1]):
            if not batch.mask[row, position, 0]:
                continue
            out = model(batch.tokens, batch.mask, document_ids=batch.document_ids, depth_index=torch.tensor([[row, position]]))
            codes = batch.tokens[row, position, :-1]
            c0.append(F.cross_entropy(out.c0_logits[row, position - 1], codes[0]))
            depth.append(F.cross_entropy(out.depth_logits[0], codes[1:], reduction="none"))
    assert len(c0) == int(losses.c0_count) == 9 + 4 + 12 + 7 + 4
    assert int(losses.depth_count) == len(c0) * 3
    assert abs(losses.c0 - torch.stack(c0).mean()) < TOLERANCE
    torch.testing.assert_close(losses.per_codebook[1:], torch.stack(depth).mean(dim=0))
    assert abs(losses.depth - torch.stack(depth).mean()) < TOLERANCE
    assert abs(losses.loss - losses.c0 - losses.depth) < TOLERANCE
    assert losses.per_codebook[0] == losses.c0


def test_packing_and_padding_do_not_change_the_loss(model, tiny_model_config):
    documents = [document(tiny_model_config, n, seed=n) for n in (9, 4, 12, 7)]
    packed = Batch.from_documents([documents])
    alone = Batch.from_documents([[d] for d in reversed(documents)], seq_len=50)
    first, second = csm_loss(model, packed, 1.0), csm_loss(model, alone, 1.0)
    assert abs(first.loss - second.loss) < TOLERANCE
    assert_same_gradients(gradients(model, first.loss), gradients(model, second.loss))


@pytest.mark.parametrize("amortization", [1.0, 1 / 4])
def test_split_over_ranks_and_micro_batches_adds_up(model, batch, amortization):
    """With the step's counts given, the parts' losses and gradients sum to the whole's (the same picks, where some are)."""
    parts = [
        Batch(batch.tokens[rows], batch.mask[rows], batch.document_ids[rows], batch.learn_c0[rows], batch.learn_depth[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    counts = [sum(part) for part in zip(*(count_targets(part, amortization) for part in parts), strict=True)]
    given = {"num_c0_targets": counts[0], "num_depth_targets": torch.tensor(counts[1])}
    split = [csm_loss(model, part, amortization, rank=rank, **given) for rank, part in enumerate(parts)]
    assert [int(s.c0_count) for s in split] == [count_targets(part, amortization)[0] for part in parts]
    assert [int(s.depth_count) for s in split] == [count_targets(part, amortization)[1] for part in parts]
    whole = csm_loss(model, batch, 1.0)
    if amortization == 1.0:
        assert abs(sum(s.loss for s in split) - whole.loss) < TOLERANCE
        torch.testing.assert_close(sum(s.per_codebook for s in split), whole.per_codebook)
        assert_same_gradients(gradients(model, *(s.loss for s in split)), gradients(model, whole.loss))
    else:
        assert abs(sum(s.c0 for s in split) - whole.c0) < TOLERANCE


def test_amortized_loss_is_an_unbiased_estimate(model, batch):
    model.eval()
    with torch.no_grad():
        full = csm_loss(model, batch, 1.0)
        picks = torch.stack([csm_loss(model, batch, 1 / 8, step=step).depth for step in range(300)])
    error = picks.std() / math.sqrt(len(picks))
    assert abs(picks.mean() - full.depth) < 3 * error
    assert picks.std() > 0  # they do differ


def test_every_row_is_picked_as_often(batch):
    is_target = batch.learn_depth
    counts = torch.zeros(is_target.shape)
    for step in range(400):
        index, num_picked = pick_depth_rows(is_target, 1 / 4, (0, step, 0, 0))
        assert num_picked == num_rows_to_pick(int(is_target.sum()), 1 / 4) == len(index)
        counts[index[:, 0], index[:, 1]] += 1
    assert bool((counts[~is_target] == 0).all())
    expected = 400 * num_picked / int(is_target.sum())
    assert bool(((counts[is_target] - expected).abs() < 5 * math.sqrt(expected)).all())


def test_picks_depend_on_their_key_only(batch):
    keys = [(seed, step, rank, micro) for seed in (0, 1) for step in (0, 1) for rank in (0, 1) for micro in (0, 1)]
    torch.manual_seed(0)
    first = [pick_depth_rows(batch.learn_depth, 1 / 4, key)[0] for key in keys]
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = [pick_depth_rows(batch.learn_depth, 1 / 4, key)[0] for key in keys]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert len({tuple(index.flatten().tolist()) for index in first}) > len(keys) // 2
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global state was not moved
    assert all(torch.equal(index, index[(index[:, 0] * 1000 + index[:, 1]).argsort()]) for index in first)


def test_static_shapes_change_nothing_but_the_number_of_rows(model, batch):
    exact, padded = csm_loss(model, batch, 1 / 4), csm_loss(model, batch, 1 / 4, static_shapes=True)
    assert abs(exact.loss - padded.loss) < TOLERANCE and exact.depth_count == padded.depth_count
    assert_same_gradients(gradients(model, exact.loss), gradients(model, padded.loss))
    index, num_picked = pick_depth_rows(batch.learn_depth, 1 / 4, (0, 0, 0, 0), static_shapes=True)
    assert len(index) == round(batch.learn_depth.numel() / 4) > num_picked


@pytest.mark.parametrize("amortization", [1 / 16, 1.0])
def test_batch_without_audio_gives_zero_attached_to_every_parameter(model, tiny_model_config, amortization):
    silent = Batch.from_documents([[text_rows([1, 2, 3], tiny_model_config.num_codebooks)]], seq_len=6)
    losses = csm_loss(model, silent, amortization, z_loss=0.1)
    assert losses.loss == 0 and losses.c0 == 0 and losses.depth == 0 and losses.c0_count == 0 and losses.depth_count == 0
    assert count_targets(silent, amortization) == (0, 0)
    assert all(bool((gradient == 0).all()) for gradient in gradients(model, losses.loss).values())


def test_batch_with_one_frame_trains_without_nan(model, tiny_model_config):
    for rows in ([document(tiny_model_config, 1, 0)], [audio_rows(torch.ones(4, 1, dtype=torch.int64))]):
        losses = csm_loss(model, Batch.from_documents([[Rows.concatenate(rows)]]))
        assert losses.loss.isfinite()
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model, losses.loss).values())
        assert int(losses.depth_count) == 3


def test_row_that_opens_its_document_is_no_target(model):
    codes = torch.ones(4, 3, dtype=torch.int64)
    batch = Batch.from_documents([[audio_rows(codes), audio_rows(codes)]])
    batch.learn_c0[:] = True  # a careless batch: the loss still knows
    batch.learn_depth[:] = True
    assert count_targets(batch, 1.0) == (6, 18)
    assert int(csm_loss(model, batch, 1.0).c0_count) == 6


def test_turns_that_are_not_learnt_are_heard_only(model, tiny_model_config):
    context = document(tiny_model_config, 6, 1, learn_c0=False, learn_depth=False)
    answer = document(tiny_model_config, 5, 2)
    batch = Batch.from_documents([[Rows.concatenate([context, answer])]])
    losses = csm_loss(model, batch, 1.0)
    assert int(losses.c0_count) == 6 and int(losses.depth_count) == 18
    half = Batch.from_documents([[document(tiny_model_config, 6, 1, learn_depth=False)]])
    assert count_targets(half, 1.0) == (7, 0)
    assert csm_loss(model, half, 1.0).depth == 0


def test_weights_of_parts_and_codebooks(model, batch):
    plain = csm_loss(model, batch, 1.0)
    weighted = csm_loss(model, batch, 1.0, c0_weight=0.5, depth_weight=2.0)
    assert abs(weighted.loss - 0.5 * plain.c0 - 2 * plain.depth) < TOLERANCE
    first_only = csm_loss(model, batch, 1.0, codebook_weights=[5.0, 0.0, 0.0])
    assert abs(first_only.depth - plain.per_codebook[1]) < TOLERANCE
    torch.testing.assert_close(first_only.per_codebook, plain.per_codebook)
    with_z = csm_loss(model, batch, 1.0, z_loss=0.1)
    assert with_z.loss > plain.loss and with_z.c0 == plain.c0
    with pytest.raises(ValueError, match="expected 3 weights of 0 or more"):
        csm_loss(model, batch, codebook_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="amortization=0"):
        csm_loss(model, batch, amortization=0)


def test_frame_dropout_hides_audio_and_nothing_else(model, batch, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda tokens, mask, **rest: seen.append((tokens, mask)) or forward(tokens, mask, **rest))
    shares = []
    is_eos = is_eos_row(batch.tokens, batch.mask)
    is_frame = batch.mask[..., 0] & ~is_eos
    for step in range(40):
        losses = csm_loss(model, batch, 1.0, step=step, frame_dropout=0.8)
        tokens, mask = seen.pop()
        assert torch.equal(tokens, batch.tokens) and int(losses.c0_count) == int(batch.learn_c0.sum())
        is_hidden = is_frame & ~mask[..., 0]
        assert torch.equal(mask[is_hidden], torch.zeros_like(mask[is_hidden]))  # the whole row
        assert torch.equal(mask[~is_hidden], batch.mask[~is_hidden])
        shares.append(is_hidden.sum(dim=1) / is_frame.sum(dim=1))
    share = torch.stack(shares)
    assert 0.3 < share.mean() < 0.5 and share.std() > 0.15  # uniform in 0..0.8: mean 0.4
    model.eval()
    csm_loss(model, batch, 1.0, frame_dropout=0.8)
    assert torch.equal(seen.pop()[1], batch.mask)


def test_stop_rates_are_counted_in_eval_mode_only(model, batch):
    assert csm_loss(model, batch).eos_recall is None and csm_loss(model, batch).false_stop is None
    model.eval()
    losses = csm_loss(model, batch, 1.0)
    assert losses.stop_counts[1] == 4 and losses.stop_counts[3] == 9 + 4 + 12 + 7
    with torch.no_grad():
        model.codebook0_head.weight.zero_()  # all logits alike: the first, code 0, counts as the most likely
    always = csm_loss(model, batch, 1.0)
    assert always.eos_recall == 1 and always.false_stop == 1


def test_validation_is_repeatable_and_uses_every_frame(model, batch):
    model.eval()
    losses = [csm_loss(model, batch, 1.0, step=step, seed=step) for step in (0, 1)]
    assert torch.equal(losses[0].loss, losses[1].loss)
    assert int(losses[0].depth_count) == int(batch.learn_depth.sum()) * 3


def test_bfloat16_autocast_keeps_a_float32_loss(model, batch):
    expected = csm_loss(model, batch, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = csm_loss(model, batch, 1.0)
    assert mixed.loss.dtype == torch.float32
    assert abs(mixed.loss - expected.loss) < 0.02 * expected.loss


# ---- the depth decoder a few frames at a time


@pytest.mark.parametrize("frames_at_once", [1, 3, 100])
@pytest.mark.parametrize("options", [{}, {"codebook_weights": [5.0, 0.0, 1.0], "depth_weight": 2.0, "num_depth_targets": 500}])
def test_frames_a_few_at_a_time_give_the_same_loss_and_gradients(model, batch, frames_at_once, options):
    expected = csm_loss(model, batch, 1 / 2, **options)
    wanted = gradients(model, expected.loss)
    losses = csm_loss(model, batch, 1 / 2, depth_frames_at_once=frames_at_once, **options)
    torch.testing.assert_close(losses.loss, expected.loss, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses.depth, expected.depth, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(losses.per_codebook, expected.per_codebook, atol=TOLERANCE, rtol=0)
    assert_same_gradients(gradients(model, losses.loss), wanted)
    with torch.no_grad():
        silent = csm_loss(model, batch, 1 / 2, depth_frames_at_once=frames_at_once, **options)
    torch.testing.assert_close(silent.loss, expected.loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_frames_a_few_at_a_time_in_bfloat16(model, batch, dtype):
    """Autocast, and bfloat16 weights: as far from float32 as all frames at once are."""
    exact = gradients(model, csm_loss(model, batch, 1.0).loss)
    if dtype is not None:
        model.to(dtype)
    distances = []
    for frames_at_once in (None, 2):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
            loss = csm_loss(model, batch, 1.0, depth_frames_at_once=frames_at_once).loss
        got = gradients(model, loss)
        distances.append([float((got[name].float() - exact[name]).norm() / exact[name].norm()) for name in exact])
    assert max(distances[0]) < 0.1
    assert all(grouped < 1.5 * whole + 0.002 for whole, grouped in zip(*distances, strict=True))


def test_a_few_frames_at_a_time_each_parameter_is_told_once(model, batch):
    """Whoever waits for gradients (DDP, ZeRO) must hear of a parameter once a backward pass, not once a group."""
    told: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: told.append(name))
    loss = csm_loss(model, batch, 1.0, depth_frames_at_once=2).loss
    assert not told
    loss.backward()
    assert sorted(told) == sorted(name for name, _ in model.named_parameters())


def test_a_few_frames_at_a_time_frozen_parameters_stay_without_gradients(model, batch):
    from csm.config import AdapterConfig
    from csm.model.lora import attach_adapter

    attach_adapter(model, AdapterConfig(kind="lora", also_train=["audio_head"]))
    found = []
    for frames_at_once in (None, 3):
        model.zero_grad()
        csm_loss(model, batch, 1.0, depth_frames_at_once=frames_at_once).loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None})
    assert sorted(found[1]) == sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    assert "audio_head" in found[1] and "decoder.layers.0.attn.q_proj.adapters.default.b" in found[1]
    assert_same_gradients(*found)


def test_a_few_frames_at_a_time_work_with_a_decoder_that_is_all_frozen(model, batch):
    for part in (model.decoder, model.projection):
        part.requires_grad_(False)
    model.audio_head.requires_grad_(False)
    losses = [csm_loss(model, batch, 1.0, c0_weight=0.0, depth_frames_at_once=at_once).loss for at_once in (None, 3)]
    found = []
    for loss in losses:
        model.zero_grad()
        loss.backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.backbone.named_parameters()})
    assert_same_gradients(*found)
    assert float(found[1]["layers.0.attn.q_proj.weight"].abs().max()) > 0


def test_a_few_frames_at_a_time_with_recomputed_activations(model, batch):
    expected = gradients(model, csm_loss(model, batch, 1.0).loss)
    model.activation_checkpointing = True
    assert_same_gradients(gradients(model, csm_loss(model, batch, 1.0, depth_frames_at_once=2).loss), expected)


def test_a_second_backward_pass_is_refused(model, batch):
    loss = csm_loss(model, batch, 1.0, depth_frames_at_once=2).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_number_of_frames_that_cannot_be_is_refused(model, batch):
    with pytest.raises(ValueError, match="depth_frames_at_once=0: expected 1 or more"):
        csm_loss(model, batch, depth_frames_at_once=0)


def test_wrapped_model_is_called_like_one(model, batch):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return self.inner(*args, **kwargs)

    assert torch.equal(csm_loss(Wrapper(model), replace(batch)).loss, csm_loss(model, batch).loss)


def test_tokens_and_mask_alone_are_a_batch(model, tiny_model_config):
    """What is left out is what a row of one conversation means: one document, every frame and EOS row a target."""
    whole = Batch.from_documents([[document(tiny_model_config, 9, seed=1)], [document(tiny_model_config, 5, seed=2)]])
    bare = Batch(whole.tokens, whole.mask)
    first, second = csm_loss(model, whole, seed=3, step=4), csm_loss(model, bare, seed=3, step=4)
    assert torch.equal(first.loss, second.loss)
    assert (bare.document_ids[1] == -1).sum() == whole.tokens.shape[1] - 3 - 5 - 1  # padding is told by the mask
