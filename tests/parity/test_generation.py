"""Greedy frames equal transformers' `generate` on the same weights and prompt, frame for frame."""

from __future__ import annotations

import torch

from csm.frames import text_rows
from csm.generation import decode_frames
from csm.generation.prompt import pad_prompts

NUM_FRAMES = 8


def their_frames(model, token_ids, attention_mask):
    codes = model.generate(
        input_ids=token_ids,
        attention_mask=attention_mask,
        do_sample=False,
        depth_decoder_do_sample=False,
        max_new_tokens=NUM_FRAMES,
        output_audio=False,
    )
    return codes if isinstance(codes, torch.Tensor) else codes.sequences


def test_greedy_frames_equal_transformers(loud_model, small_mimi, tmp_path, generator):
    from transformers import CsmForConditionalGeneration

    config = loud_model.config
    loud_model.save_pretrained(tmp_path, layout="transformers", codec=small_mimi)
    theirs = CsmForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    prompts = [torch.randint(1, config.text_vocab_size, (length,), generator=generator) for length in (5, 9)]
    for ids in prompts:
        expected = their_frames(theirs, ids[None], torch.ones_like(ids)[None])[0]
        tokens, mask = pad_prompts([text_rows(ids.tolist(), config.num_codebooks)])
        ours = decode_frames(loud_model, tokens, mask, max_frames=NUM_FRAMES, temperature=0)[0]
        expected = expected[expected.any(dim=-1)]  # theirs ends with the EOS frame, where one came
        assert torch.equal(ours, expected)
        assert ours.shape[0] > 1 and ours.unique().numel() > 3
    together = pad_prompts([text_rows(ids.tolist(), config.num_codebooks) for ids in prompts])
    assert torch.equal(decode_frames(loud_model, *together, max_frames=NUM_FRAMES, temperature=0)[1, : ours.shape[0]], ours)
