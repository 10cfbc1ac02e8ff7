"""The transformer and CSM: what may see what, caches, packing, initial weights, and the maths written out by hand."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from csm import CSM, ModelConfig, TransformerConfig
from csm.frames import Batch, Rows, audio_rows, text_rows
from csm.model import functions, products
from csm.model.attention import attend, plan_packed_rows, positions_from_documents
from csm.model.functions import cross_entropy, gated_linear, rms_norm, rotate, sum_and_look_up, swiglu
from csm.model.transformer import FeedForward, KVCache

FLOAT32 = {"atol": 2e-5, "rtol": 1e-4}  # another order of sums


def loud(config: ModelConfig, seed: int = 0) -> CSM:
    """A model whose weights are large enough for a wrong mask to show."""
    model = CSM(config, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15, generator=generator)
    return model


def document(config: ModelConfig, num_frames: int, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(config.text_vocab_size, (3,), generator=generator).tolist()
    codes = torch.randint(1, config.audio_vocab_size, (config.num_codebooks, num_frames), generator=generator)
    return Rows.concatenate([text_rows(text, config.num_codebooks), audio_rows(codes)])


def run(model: CSM, batch: Batch) -> Tensor:
    return model(batch.tokens, batch.mask, document_ids=batch.document_ids).c0_logits


# What a position may see


def test_packed_documents_equal_documents_alone(tiny_model_config):
    model = loud(tiny_model_config)
    documents = [document(tiny_model_config, n, seed=n) for n in (5, 9, 2)]
    packed = run(model, Batch.from_documents([documents]))[0]
    start = 0
    for alone in documents:
        expected = run(model, Batch.from_documents([[alone]]))[0]
        torch.testing.assert_close(packed[start : start + len(alone)], expected, **FLOAT32)
        start += len(alone)


def test_padding_and_batch_order_change_nothing(tiny_model_config):
    model = loud(tiny_model_config)
    short, long = document(tiny_model_config, 4, seed=1), document(tiny_model_config, 11, seed=2)
    alone = run(model, Batch.from_documents([[short]]))[0]
    together = run(model, Batch.from_documents([[long], [short]], seq_len=40))
    swapped = run(model, Batch.from_documents([[short], [long]], seq_len=40))
    torch.testing.assert_close(together[1, : len(short)], alone, **FLOAT32)
    assert torch.equal(together[0], swapped[1]) and torch.equal(together[1], swapped[0])


def test_padding_never_gives_nan(tiny_model_config):
    model = loud(tiny_model_config)
    batch = Batch.from_documents(
        [[document(tiny_model_config, 3, 1), document(tiny_model_config, 3, 2)], [document(tiny_model_config, 1, 3)]], 20
    )
    batch.document_ids[1] = -1
    batch.mask[1] = False
    out = model(batch.tokens, batch.mask, document_ids=batch.document_ids, depth_index=torch.tensor([[1, 2]]))
    assert out.hidden.isfinite().all() and out.c0_logits.isfinite().all() and out.depth_logits.isfinite().all()


def test_no_position_sees_its_target_or_another_document(tiny_model_config, monkeypatch):
    """By gradient: the logits at t depend on embedded rows of their own document up to t, and on nothing else."""
    model = loud(tiny_model_config)
    batch = Batch.from_documents([[document(tiny_model_config, 4, 1), document(tiny_model_config, 5, 2)]], seq_len=20)
    kept = {}
    embed = model.embed

    def remember(tokens, mask):
        kept["embeds"] = embed(tokens, mask).detach().requires_grad_()
        return kept["embeds"]

    monkeypatch.setattr(model, "embed", remember)
    logits = run(model, batch)
    ids = batch.document_ids[0]
    for position in range(int((ids >= 0).sum())):
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), kept["embeds"], retain_graph=True)
        may_see = (ids == ids[position]) & (torch.arange(len(ids)) <= position)
        assert torch.equal(gradient[0].abs().sum(dim=-1) > 0, may_see), position


def test_depth_codebook_sees_the_hidden_state_before_and_lower_codebooks_only(tiny_model_config):
    model = loud(tiny_model_config)
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1)]])
    frame = 5
    index = torch.tensor([[0, frame]])

    def depth_logits(tokens: Tensor) -> Tensor:
        return model(tokens, batch.mask, depth_index=index).depth_logits[0]

    before = depth_logits(batch.tokens)
    for codebook in range(tiny_model_config.num_codebooks):
        changed = batch.tokens.clone()
        changed[0, frame, codebook] = (changed[0, frame, codebook] + 1) % tiny_model_config.audio_vocab_size
        moved = (depth_logits(changed) - before).abs().amax(dim=-1) > 1e-6
        assert moved.tolist() == [column >= codebook for column in range(tiny_model_config.num_codebooks - 1)]
    earlier = batch.tokens.clone()
    earlier[0, frame - 1, 0] = (earlier[0, frame - 1, 0] + 1) % tiny_model_config.audio_vocab_size
    assert bool(((depth_logits(earlier) - before).abs().amax(dim=-1) > 1e-6).all())


def test_hiding_a_frame_hides_it_from_the_backbone_only(tiny_model_config):
    model = loud(tiny_model_config)
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1)]])
    hidden_mask = batch.mask.clone()
    hidden_mask[0, 5] = False
    with_codes = model(batch.tokens, hidden_mask, depth_index=torch.tensor([[0, 5]]))
    plain = model(batch.tokens, batch.mask, depth_index=torch.tensor([[0, 5]]))
    assert torch.equal(with_codes.depth_logits, plain.depth_logits)  # h_4 saw nothing of it, and the codes are the input
    assert not torch.allclose(with_codes.hidden[0, 5], plain.hidden[0, 5])


# Caches


@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2]], ids=["prefill", "steps", "mixed"])
def test_cached_equals_uncached(tiny_model_config, chunks):
    backbone = loud(tiny_model_config).backbone
    x = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    cache = KVCache(tiny_model_config.backbone, 2, 12)
    parts = [backbone(part, cache=cache) for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), backbone(x), **FLOAT32)
    assert cache.length == 12


def test_left_padded_prompts_go_on_as_if_alone(tiny_model_config):
    backbone = loud(tiny_model_config).backbone
    generator = torch.Generator().manual_seed(0)
    lengths, num_steps = [7, 3, 1], 4
    rows = [torch.randn(length + num_steps, 32, generator=generator) for length in lengths]
    longest = max(lengths)
    prompt = torch.zeros(len(rows), longest, 32)
    ids = torch.full((len(rows), longest), -1)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        prompt[index, longest - length :] = row[:length]
        ids[index, longest - length :] = 0
    cache = KVCache(tiny_model_config.backbone, len(rows), longest + num_steps)
    outputs = [backbone(prompt, document_ids=ids, cache=cache)]
    for step in range(num_steps):
        outputs.append(backbone(torch.stack([row[len(row) - num_steps + step] for row in rows])[:, None], cache=cache))
    together = torch.cat(outputs, dim=1)
    assert together.isfinite().all()
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        torch.testing.assert_close(together[index, longest - length :], backbone(row[None])[0], **FLOAT32)


def test_cache_is_reused_after_reset_and_rewind(tiny_model_config):
    backbone = loud(tiny_model_config).backbone
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    cache = KVCache(tiny_model_config.backbone, 1, 8)
    backbone(torch.randn(1, 5, 32), document_ids=torch.tensor([[-1, 0, 0, 0, 0]]), cache=cache)
    cache.reset()
    first = backbone(x, cache=cache)
    torch.testing.assert_close(first, backbone(x), **FLOAT32)
    cache.rewind(4)
    torch.testing.assert_close(backbone(x[:, 4:], cache=cache), first[:, 4:], **FLOAT32)
    with pytest.raises(ValueError, match="cannot rewind a cache of 6 positions to 7"):
        cache.rewind(7)


def test_cache_that_is_full_says_so(tiny_model_config):
    backbone = loud(tiny_model_config).backbone
    cache = KVCache(tiny_model_config.backbone, 1, 4)
    backbone(torch.zeros(1, 3, 32), cache=cache)
    with pytest.raises(ValueError, match="3 positions cached and 2 more do not fit a cache of 4"):
        backbone(torch.zeros(1, 2, 32), cache=cache)
    with pytest.raises(ValueError, match="the window has 128"):
        backbone(torch.zeros(1, 129, 32))


# The maths written out


def naive_embed(model: CSM, tokens: Tensor, mask: Tensor) -> Tensor:
    offsets = torch.arange(model.config.num_codebooks) * model.config.audio_vocab_size
    columns = torch.cat((model.audio_embeddings(tokens[..., :-1] + offsets), model.text_embeddings(tokens[..., -1:])), dim=-2)
    return (columns * mask[..., None]).sum(dim=-2)


def test_embed_sums_the_columns_that_count(tiny_model_config):
    model = loud(tiny_model_config)
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1)], [document(tiny_model_config, 2, 2)]])
    got, expected = model.embed(batch.tokens, batch.mask), naive_embed(model, batch.tokens, batch.mask)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    tables = [model.audio_embeddings.weight, model.text_embeddings.weight]
    for ours, theirs in zip(
        torch.autograd.grad((got * weights).sum(), tables), torch.autograd.grad((expected * weights).sum(), tables), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_table_read_twice_gets_the_sum_of_both_gradients(generator):
    table = torch.randn(12, 6, generator=generator).requires_grad_()
    bags, rows = torch.randint(12, (5, 3), generator=generator), torch.randint(12, (2, 4), generator=generator)
    weights = torch.randint(2, (5, 3), generator=generator).float()
    got = sum_and_look_up(table, bags, weights, rows)
    expected = ((table[bags] * weights[..., None]).sum(dim=1), table[rows])
    scales = [torch.randn(part.shape, generator=generator) for part in expected]
    grads = []
    for parts in (got, expected):
        for part, known in zip(parts, expected, strict=True):
            torch.testing.assert_close(part, known)
        grads += torch.autograd.grad(sum((part * scale).sum() for part, scale in zip(parts, scales, strict=True)), table)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("rows_in_chunk", [1, 3, 100])
def test_cross_entropy_equals_torchs_whatever_the_chunks(generator, monkeypatch, overwrite, rows_in_chunk):
    monkeypatch.setattr(functions, "_CHUNK_ELEMENTS", rows_in_chunk * 9)
    values = torch.randn(7, 9, generator=generator) * 5
    targets = torch.tensor([0, 8, -1, 3, 3, -1, 5])
    scale = torch.randn(7, generator=generator)
    leaf = values.clone().requires_grad_()
    got = cross_entropy(leaf * 1.0, targets, overwrite=overwrite)
    plain = values.clone().requires_grad_()
    expected = F.cross_entropy(plain, targets, ignore_index=-1, reduction="none")
    torch.testing.assert_close(got, expected)
    for loss, tensor in ((got, leaf), (expected, plain)):
        (loss * scale).sum().backward()
        assert tensor.grad is not None
    torch.testing.assert_close(leaf.grad, plain.grad)
    assert bool((leaf.grad[targets < 0] == 0).all())


def test_cross_entropy_of_bfloat16_logits_is_taken_in_float32(generator):
    logits = (torch.randn(6, 50, generator=generator) * 5).bfloat16()
    targets = torch.randint(50, (6,), generator=generator)
    got = cross_entropy(logits, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, F.cross_entropy(logits.float(), targets, reduction="none"))


def test_second_backward_over_overwritten_logits_is_refused(generator):
    leaf = torch.randn(3, 5, generator=generator).requires_grad_()
    loss = cross_entropy(leaf * 1.0, torch.tensor([0, 1, 2]), overwrite=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def check_against(formula, function, *inputs: Tensor) -> None:
    """Values and gradients of a function and of the plain formula, in float64 where autograd does the formula."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    doubles = [tensor.double().requires_grad_() for tensor in inputs]
    got, expected = function(*leaves), formula(*doubles)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(9))
    grads = torch.autograd.grad((got * weights).sum(), leaves)
    for ours, theirs in zip(grads, torch.autograd.grad((expected * weights).sum(), doubles), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)


def test_rms_norm_equals_its_formula(generator):
    x = torch.randn(3, 5, 16, generator=generator) * 3 + 1
    scale = torch.randn(16, generator=generator)
    check_against(lambda x, s: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * s, lambda x, s: rms_norm(x, s, 1e-5), x, scale)


def test_swiglu_equals_its_formula(generator):
    check_against(lambda a, b: F.silu(a) * b, swiglu, *torch.randn(2, 3, 5, 16, generator=generator))


@pytest.mark.parametrize("rows_in_chunk", [1, 4, 100])
def test_gated_linear_equals_its_formula_whatever_the_chunks(generator, monkeypatch, rows_in_chunk):
    monkeypatch.setattr(functions, "_CHUNK_ELEMENTS", rows_in_chunk * 16)
    gate, up = torch.randn(2, 3, 5, 16, generator=generator)
    weight = torch.randn(6, 16, generator=generator)
    check_against(lambda a, b, w: (F.silu(a) * b) @ w.T, gated_linear, gate, up, weight)
    check_against(lambda a, b: (F.silu(a) * b) @ weight.double().T, lambda a, b: gated_linear(a, b, weight), gate, up)  # a frozen weight


def test_feed_forward_keeps_gate_and_up_and_not_their_product(generator):
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    feed_forward = FeedForward(TransformerConfig(num_layers=1, width=8, num_heads=2, num_kv_heads=1, ffn_width=32))
    for parameter in feed_forward.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 5, 8, generator=generator, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        feed_forward(x)
    weights = {parameter.untyped_storage().data_ptr() for parameter in feed_forward.parameters()}
    assert sorted(tensor.numel() for place, tensor in kept.items() if place not in weights) == [x.numel(), 320, 320]


def test_rotate_equals_its_formula_eager_and_compiled_form(generator, monkeypatch):
    x = torch.randn(2, 5, 3, 8, generator=generator)
    angles = torch.randn(5, 1, 4, generator=generator)
    cos, sin = angles.cos(), angles.sin()

    def formula(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    check_against(formula, lambda x: rotate(x, cos, sin), x)
    eager = rotate(x, cos, sin)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, cos, sin), eager)


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("num_keys", [24, 300])
def test_bfloat16_attention_equals_float32_within_its_precision(num_keys, has_units, generator, monkeypatch):
    """Both sides of the size at which bfloat16 changes kernels, and as on a CPU without bfloat16 products."""
    monkeypatch.setattr(products, "_CPU_HAS_BFLOAT16", has_units)
    ids = (torch.arange(num_keys) // 10)[None].expand(2, -1)
    query = torch.randn(2, 4, num_keys, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, num_keys, 8, generator=generator)
    for document_ids in (None, ids):
        expected = attend(query, key, value, plan_packed_rows(document_ids))
        got = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), plan_packed_rows(document_ids))
        torch.testing.assert_close(got.float(), expected, atol=0.04, rtol=0.04)


def test_positions_restart_in_each_document():
    ids = torch.tensor([[0, 0, 0, 1, 1, -1, -1], [-1, 0, 0, 0, 0, 0, 1]])
    assert positions_from_documents(ids).tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 4, 0]]


def test_a_mask_is_made_only_where_rows_hold_several_documents():
    assert plan_packed_rows(None).is_causal
    assert plan_packed_rows(torch.tensor([[0, 0, 0], [3, 3, -1]])).is_causal
    for ids in ([[0, 0, 1]], [[-1, 0, 0]], [[0, -1, 0]]):
        plan = plan_packed_rows(torch.tensor(ids))
        assert not plan.is_causal and plan.mask is not None


def test_activation_checkpointing_changes_neither_loss_nor_gradients(tiny_model_config):
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1), document(tiny_model_config, 3, 2)]])
    results = []
    for is_on in (False, True):
        model = loud(tiny_model_config)
        model.activation_checkpointing = is_on
        out = model(batch.tokens, batch.mask, document_ids=batch.document_ids, depth_index=torch.tensor([[0, 5]]))
        (out.c0_logits.square().mean() + out.depth_logits.square().mean()).backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_are_not_kept_for_the_backward_pass_and_change_nothing_in_it(tiny_model_config, autocast):
    """Compared with activation checkpointing, which keeps a layer's input only and runs the layer as it was written."""
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1), document(tiny_model_config, 3, 2)]])
    results = []
    for is_recomputed in (True, False):
        model = loud(tiny_model_config)
        model.activation_checkpointing = is_recomputed
        normed: list[weakref.ref] = []
        for name, module in model.backbone.named_modules():
            if name.endswith(("sa_norm", "mlp_norm")):
                module.register_forward_hook(lambda _, __, out, normed=normed: normed.append(weakref.ref(out.untyped_storage())))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(batch.tokens, batch.mask, document_ids=batch.document_ids)
        assert len(normed) == 4 and all(storage() is None for storage in normed)
        out.c0_logits.float().square().mean().backward()
        results.append([parameter.grad for parameter in model.parameters()])
    for ours, expected in zip(*results, strict=True):
        assert (ours is None) == (expected is None) and (ours is None or torch.equal(ours, expected))


def test_autocast_and_bfloat16_weights_stay_near_float32(tiny_model_config):
    batch = Batch.from_documents([[document(tiny_model_config, 6, 1), document(tiny_model_config, 3, 2)]])
    model = CSM(tiny_model_config).eval()
    expected = run(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run(model, batch)
    true = run(CSM(tiny_model_config).to(torch.bfloat16).eval(), batch)
    for got in (mixed, true):
        assert got.dtype == torch.bfloat16
        assert (got.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_rotary_angles_stay_float32_in_a_bfloat16_model(tiny_model_config):
    model = CSM(tiny_model_config).to(torch.bfloat16)
    assert model.backbone._cos.dtype == torch.float32
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


# Shapes and weights


def test_initial_weights_depend_on_the_seed_only(tiny_model_config):
    before = torch.get_rng_state()
    first, again, other = CSM(tiny_model_config), CSM(tiny_model_config), CSM(tiny_model_config, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.audio_head, again.audio_head) and not torch.equal(first.audio_head, other.audio_head)


def test_weights_are_made_in_the_dtype_asked_for(tiny_model_config):
    model = CSM(tiny_model_config, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert model.audio_head.float().std().item() == pytest.approx(0.02, rel=0.05)


def test_maps_into_the_residual_stream_start_smaller_with_depth(tiny_model_config):
    config = replace(tiny_model_config, backbone=replace(tiny_model_config.backbone, num_layers=8, width=128, ffn_width=256))
    layer = CSM(config).backbone.layers[3]
    assert layer.mlp.w1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (layer.mlp.w2.weight, layer.attn.output_proj.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert bool((layer.sa_norm.scale == 1).all())


@pytest.mark.parametrize(
    ("name", "millions", "backbone", "decoder"),
    [
        ("demo", 4.19, 2.95, 0.37),
        ("csm_small", 96.0, 39.9, 4.98),
        ("csm_1b", 1553, 973, 111),
        ("csm_3b", 3775, 2819, 252),
        ("csm_8b", 8194, 6980, 308),
    ],
)
def test_shipped_models_have_the_size_they_are_named_for(shipped_model_config, name, millions, backbone, decoder):
    with torch.device("meta"):
        model = CSM(shipped_model_config(name))
    sizes = [model.num_parameters, *(sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.decoder))]
    assert [size / 1e6 for size in sizes] == pytest.approx([millions, backbone, decoder], rel=2e-3)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_key_map_covers_the_published_1b_checkpoint(shipped_model_config):
    """The key lists are spelled by rule, from DESIGN.md's table, and not by our code."""
    from csm.model.layouts import transformers_name

    inner = {
        "attn.q_proj.weight": "self_attn.q_proj.weight", "attn.k_proj.weight": "self_attn.k_proj.weight",
        "attn.v_proj.weight": "self_attn.v_proj.weight", "attn.output_proj.weight": "self_attn.o_proj.weight",
        "mlp.w1.weight": "mlp.gate_proj.weight", "mlp.w2.weight": "mlp.down_proj.weight", "mlp.w3.weight": "mlp.up_proj.weight",
        "sa_norm.scale": "input_layernorm.weight", "mlp_norm.scale": "post_attention_layernorm.weight",
    }  # fmt: skip
    expected = {
        f"{ours}.layers.{layer}.{a}": f"{theirs}.layers.{layer}.{b}"
        for ours, theirs, num_layers in (("backbone", "backbone_model", 16), ("decoder", "depth_decoder.model", 4))
        for layer in range(num_layers)
        for a, b in inner.items()
    } | {
        "backbone.norm.scale": "backbone_model.norm.weight",
        "decoder.norm.scale": "depth_decoder.model.norm.weight",
        "text_embeddings.weight": "embed_text_tokens.weight",
        "audio_embeddings.weight": "backbone_model.embed_tokens.embed_audio_tokens.weight",
        "projection.weight": "depth_decoder.model.inputs_embeds_projector.weight",
        "codebook0_head.weight": "lm_head.weight",
        "audio_head": "depth_decoder.codebooks_head.weight",
    }  # fmt: skip
    with torch.device("meta"):
        state = CSM(shipped_model_config("csm_1b")).state_dict()
    assert {name: transformers_name(name) for name in state} == expected
    assert tuple(state["audio_head"].shape) == (31, 1024, 2051) and tuple(state["audio_embeddings.weight"].shape) == (65632, 2048)


def test_rows_of_another_width_are_refused(tiny_model_config):
    model = CSM(tiny_model_config)
    with pytest.raises(ValueError, match=r"expected \[B, T, 5\] for both, 4 codebooks"):
        model(torch.zeros(1, 3, 9, dtype=torch.int64), torch.ones(1, 3, 9, dtype=torch.bool))
