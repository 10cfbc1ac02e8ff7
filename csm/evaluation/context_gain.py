"""What hearing the conversation is worth: the same real turns, teacher-forced, with more and more of the turns before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from csm.data.shards import Sample
from csm.evaluation.metrics import Estimate, ratio_estimate
from csm.frames import Batch, TextEncoder, Turn, rows_from_turns
from csm.loss import csm_loss
from csm.model.csm import CSM

NUM_TURNS: tuple[int | None, ...] = (0, 1, 4, None)  # turns of context; None: all there are


@torch.no_grad()
def context_gain(model: CSM, tokenizer: TextEncoder, samples: Sequence[Sample], *, seed: int) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Nats a code of last turns under 0, 1, 4 and all turns of context, and what each saves against none, line by line.

    Args:
        samples: conversations; those of one turn are left out.
    Returns:
        `c0_nll_context<n>`, `depth_nll_context<n>` and, against 0 turns, `c0_gain_context<n>`, `depth_gain_context<n>`; and why
        some are missing. `n` turns are measured on the lines that have as many; `max` on all.
    """
    talks = [sample.turns for sample in samples if len(sample.turns) > 1]
    if not talks:
        return {}, {"context_gain": "no conversation of two turns or more in the split"}
    was_training = model.training
    model.eval()
    alone = [_score(model, tokenizer, talk, 0) for talk in talks]
    metrics: dict[str, Estimate] = {}
    missing: dict[str, str] = {}
    for wanted in NUM_TURNS:
        name = "context_max" if wanted is None else f"context{wanted}"
        chosen = [index for index, talk in enumerate(talks) if len(talk) - 1 >= (wanted or 0)]
        if not chosen:
            missing[f"context_gain with {wanted} turns"] = (
                f"the longest conversation of the split has {max(map(len, talks)) - 1} before its last"
            )
            continue
        here = [alone[index] if wanted == 0 else _score(model, tokenizer, talks[index], wanted) for index in chosen]
        for part, (sum_at, count_at) in {"c0": (0, 1), "depth": (2, 3)}.items():
            counts = [float(score[count_at]) for score in here]
            metrics[f"{part}_nll_{name}"] = ratio_estimate([s[sum_at] for s in here], counts, seed=seed, name=f"{part}_nll_{name}")
            if wanted != 0:
                saved = [alone[index][sum_at] - score[sum_at] for index, score in zip(chosen, here, strict=True)]
                metrics[f"{part}_gain_{name}"] = ratio_estimate(saved, counts, seed=seed, name=f"{part}_gain_{name}")
    model.train(was_training)
    return metrics, missing


def _score(model: CSM, tokenizer: TextEncoder, talk: Sequence[Turn], num_turns: int | None) -> tuple[float, int, float, int]:
    """(nats, codes) of codebook 0 and of the others in the last turn, as many turns of context before it as asked for and fit."""
    *before, last = talk
    heard = before if num_turns is None else before[len(before) - num_turns :]
    num_codebooks = model.config.num_codebooks
    while True:
        turns = [*(replace(turn, learn_c0=False, learn_depth=False) for turn in heard), last]
        rows = rows_from_turns(turns, tokenizer, num_codebooks)
        if len(rows.tokens) <= model.config.max_seq_len or not heard:
            break
        heard = heard[1:]  # as in generation: whole turns, the oldest first
    losses = csm_loss(model, Batch.from_documents([[rows]]), amortization=1.0)
    c0_count, depth_count = int(losses.c0_count), int(losses.depth_count)
    return float(losses.c0) * c0_count, c0_count, float(losses.depth) * depth_count, depth_count
