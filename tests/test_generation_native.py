"""The compiled frame loop against PyTorch's: same codes in float32 on every path, rows apart, threads apart, narrow weights close."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from csm import Turn
from csm.generation import Generator, iterate_frames
from csm.generation.native import NativeLoop, compiled_loop
from csm.generation.sampling import Sampler
from tests.conftest import tiny_config
from tests.test_generation_decoding import decode_without_cache, loud, made_up_prompt

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def frames_of(model, loop, tokens, mask, *, num_frames=10, **options) -> torch.Tensor:
    seeds = list(range(tokens.shape[0]))
    frames = iterate_frames(model, tokens, mask, seeds=seeds, max_frames=num_frames, stop_at_eos=False, loop=loop, **options)
    return torch.stack(list(frames), dim=1)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_compiled_greedy_frames_equal_the_plain_model(any_model_config, generator, num_threads):
    model = loud(any_model_config)
    tokens, mask = made_up_prompt(any_model_config, 3, 12, generator)
    assert torch.equal(
        frames_of(model, NativeLoop(model, num_threads=num_threads), tokens, mask, num_frames=6, temperature=0),
        decode_without_cache(model, tokens, mask, 6),
    )


@pytest.mark.parametrize(("temperature", "top_k"), [(0.9, 5), (1.3, 0), (0.5, 50)])
def test_compiled_sampling_draws_what_eager_draws(generator, temperature, top_k):
    model = loud(tiny_config(8))
    tokens, mask = made_up_prompt(model.config, 5, 12, generator)
    options = dict(temperature=temperature, top_k=top_k, min_frames=3, num_frames=30)
    assert torch.equal(frames_of(model, NativeLoop(model), tokens, mask, **options), frames_of(model, None, tokens, mask, **options))


def test_compiled_top_k_over_a_large_vocabulary_keeps_ties(generator):
    """2,051 codes take the path by blocks; weights of few distinct values make ties at the k-th."""
    model = loud(tiny_config(audio_vocab_size=2051))
    with torch.no_grad():
        model.codebook0_head.weight.copy_((model.codebook0_head.weight * 4).round() / 4)
        model.codebook0_head.weight[:, 4:] = 0
    tokens, mask = made_up_prompt(model.config, 4, 12, generator)
    options = dict(temperature=1.0, top_k=50, num_frames=20)
    assert torch.equal(frames_of(model, NativeLoop(model), tokens, mask, **options), frames_of(model, None, tokens, mask, **options))


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("use_tiles", [True, False])
def test_compiled_rows_of_unlike_prompts_are_the_same_alone_among_others_and_on_two_threads(generator, weights, use_tiles):
    model = loud(tiny_config())
    loop = NativeLoop(model, weights, use_tiles=use_tiles)
    prompts = [made_up_prompt(model.config, 1, length, generator) for length in (5, 11, 8)] * 7  # 21 rows: more than one block of tiles
    tokens = torch.zeros(21, 11, model.config.num_codebooks + 1, dtype=torch.int64)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, (row_tokens, row_mask) in enumerate(prompts):
        tokens[row, 11 - row_tokens.shape[1] :], mask[row, 11 - row_tokens.shape[1] :] = row_tokens[0], row_mask[0]
    together = frames_of(model, loop, tokens, mask)
    on_two_threads = NativeLoop(model, weights, use_tiles=use_tiles, num_threads=2)
    assert torch.equal(together, frames_of(model, on_two_threads, tokens, mask))
    for row in (0, 1, 2, 20):
        alone = iterate_frames(model, *prompts[row], seeds=[row], max_frames=10, stop_at_eos=False, loop=loop)
        assert torch.equal(together[row], torch.cat(list(alone)))


@pytest.mark.parametrize(("weights", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("int8", 0.05)])
@pytest.mark.parametrize("use_tiles", [True, False])
def test_compiled_logits_are_those_of_the_model(any_model_config, generator, weights, tolerance, use_tiles):
    """Tolerance: of the largest logit. bfloat16 holds 8 bits, int8 7 and its scale, through two layers."""
    model = loud(any_model_config)
    loop = NativeLoop(model, weights, use_tiles=use_tiles)
    hidden = torch.randn(3, any_model_config.backbone.width, generator=generator)
    logits = torch.zeros(3, any_model_config.num_codebooks, any_model_config.audio_vocab_size)
    sampler = Sampler([0, 1, 2], 1, any_model_config.num_codebooks, temperature=1.0, top_k=0)
    codes = loop.frame(hidden, sampler, 0, logits=logits)
    with torch.no_grad():
        expected = torch.cat((model.codebook0_head(hidden)[:, None], model.depth_logits(hidden, codes)), dim=1)
    assert float((logits - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_guessed_frames_are_those_of_float32_bit_for_bit(any_model_config, generator, temperature, num_threads):
    """Also where the guesses are another model's, and so mostly wrong."""
    model, stranger = loud(any_model_config), NativeLoop(loud(any_model_config, seed=2), guesses=True)
    plain = NativeLoop(model, guesses=False)
    guessing = NativeLoop(model, guesses=True, num_threads=num_threads)
    misled = NativeLoop(model, guesses=True, num_threads=num_threads)
    misled._guess = stranger._guess
    kept = {loop: [] for loop in (plain, guessing, misled)}
    sampler = Sampler([5], 20, any_model_config.num_codebooks, temperature=temperature, top_k=8, min_frames=10)
    for index, hidden in enumerate(torch.randn(20, 1, any_model_config.backbone.width, generator=generator)):
        for loop, outputs in kept.items():
            logits = torch.zeros(1, any_model_config.num_codebooks, any_model_config.audio_vocab_size)
            outputs += [loop.frame(hidden, sampler, index, logits=logits), logits]
    for expected, of_guessing, of_misled in zip(*kept.values(), strict=True):
        assert torch.equal(expected, of_guessing) and torch.equal(expected, of_misled)
    assert plain.num_checks == 0 and 20 <= guessing.num_checks <= 25
    assert misled.num_checks > (30 if any_model_config.num_codebooks > 2 else 20)


def test_who_guesses(generator):
    config = tiny_config()
    wide = replace(config, depth_decoder=replace(config.depth_decoder, ffn_width=6_000))  # 576,000 weights: 2.3 MB
    small, large = loud(config), loud(wide)
    hidden = torch.randn(2, small.config.backbone.width, generator=generator)
    sampler = Sampler([0, 1], 1, small.config.num_codebooks, temperature=0.9, top_k=8)
    large_loop = NativeLoop(large)
    large_loop.frame(hidden, sampler, 0)
    assert large_loop.num_checks == 0, "a batch is not guessed"
    large_loop.frame(hidden[:1], Sampler([0], 1, small.config.num_codebooks, temperature=0.9, top_k=8), 0)
    assert large_loop.num_checks >= 1
    assert large_loop.guesses and not NativeLoop(small).guesses, "a depth decoder that a core's cache holds is read fast as it is"
    assert not NativeLoop(large, "int8").guesses
    with pytest.raises(ValueError, match="guesses=True is for float32 weights, these are int8"):
        NativeLoop(small, "int8", guesses=True)


def test_int8_and_bfloat16_models_speak_through_the_compiled_loop(speaking_model, small_codec, word_tokenizer, make_codes):
    from copy import deepcopy

    options = dict(seed=3, max_duration_s=0.8)
    context = [Turn(1, "two", codes=make_codes())]
    eager = Generator(speaking_model, small_codec, word_tokenizer, None)
    for model, int8 in ((speaking_model, False), (speaking_model, True), (deepcopy(speaking_model).bfloat16(), False)):
        compiled = Generator(model, small_codec, word_tokenizer, None, compile=True, int8=int8)
        clip = compiled.generate("seven four", 1, context, **options)
        assert torch.equal(torch.cat(list(compiled.stream("seven four", 1, context, **options))), clip)
        assert torch.equal(
            compiled.generate_batch([dict(text="one", max_duration_s=0.8), dict(text="seven four", speaker=1, context=context, **options)])[
                1
            ],
            clip,
        )
        session = compiled.session()
        session.add(context[0])
        assert torch.equal(session.say("seven four", 1, **options), clip)
        if model is speaking_model and not int8:
            assert torch.equal(clip, eager.generate("seven four", 1, context, **options))


def test_compiled_loop_tells_broken_numbers_and_full_caches(generator):
    model = loud(tiny_config())
    tokens, mask = made_up_prompt(model.config, 2, 6, generator)
    with torch.no_grad():
        model.backbone.norm.scale.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite at frame 0"):
        list(iterate_frames(model, tokens, mask, seeds=[0, 1], max_frames=3, loop=NativeLoop(model)))


def test_what_cannot_be_compiled_is_told(speaking_model, small_codec, word_tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="int8 weights are read by the compiled loop on a CPU only"):
        Generator(speaking_model, small_codec, word_tokenizer, None, int8=True)
    with pytest.raises(ValueError, match="weights='int4': expected one of"):
        NativeLoop(speaking_model, "int4")
    compiled_loop.cache_clear()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        Generator(speaking_model, small_codec, word_tokenizer, None, compile=True).generate_codes("one", max_duration_s=0.2)
    compiled_loop.cache_clear()


def test_a_compiler_that_fails_is_told(speaking_model, monkeypatch, tmp_path):
    (tmp_path / "g++").write_text("#!/bin/sh\necho no such option >&2\nexit 1\n")
    (tmp_path / "g++").chmod(0o755)
    compiled_loop.cache_clear()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match="could not compile frame_loop.cpp.*no such option"):
        NativeLoop(speaking_model)
    compiled_loop.cache_clear()
