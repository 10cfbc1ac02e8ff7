"""Which attention kernel runs, chosen in one place for training and for cached inference.

The transformer asks once per forward for a plan and hands it to every layer. What is chosen, and why:
- CPU: PyTorch's `scaled_dot_product_attention`, causal without a mask when every row is one document, else with a boolean
  block-diagonal mask. In bfloat16 over at most 256 keys: three explicit batched matmuls, because the CPU flash kernel packs
  its bfloat16 blocks anew for each head (measured forward and backward, one thread: [64, 4 heads, 32] 41 against 3 ms, [8, 4
  heads, 192] 12 against 6 ms; at 1,024 keys the kernel wins, 62 against 123 ms). On a CPU without bfloat16 products: in float32.
- CUDA: FlexAttention over a block mask for packed rows (blocks of other documents are skipped), SDPA otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.model.products import must_widen

_MAX_EXPLICIT_KEYS = 256


@dataclass
class AttentionPlan:
    """How the layers of one forward attend.

    Attributes:
        is_causal: causal from the first key on, no mask needed.
        mask: bool, broadcastable to [B, 1, T, keys], true where a position may look; None: no mask.
        block_mask: FlexAttention's BlockMask; None: SDPA.
    """

    is_causal: bool = False
    mask: Tensor | None = None
    block_mask: Any = None
    _bias: Tensor | None = None

    def bias(self, like: Tensor, num_keys: int) -> Tensor | None:
        """The mask as numbers to add to scores, 0 or -inf; made once for all layers."""
        mask = causal_mask(like.shape[2], num_keys, like.device) if self.is_causal else self.mask
        if self._bias is None and mask is not None:
            self._bias = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(~mask, float("-inf"))
        return self._bias


def positions_from_documents(document_ids: Tensor) -> Tensor:
    """Positions that restart wherever the id changes. int64 [B, T] -> int64 [B, T]."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device)
    is_start = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return index - torch.where(is_start, index, 0).cummax(dim=1).values


def document_mask(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    """Causal, and inside equal ids: bool [B, 1, T, keys]; the queries are the last T of the keys.

    Padding (-1) looks at padding, so that no row of the softmax is empty and nothing becomes NaN.
    """
    num_queries, num_keys = query_ids.shape[1], key_ids.shape[1]
    same = query_ids[:, None, :, None] == key_ids[:, None, None, :]
    if num_queries == 1:
        return same
    return same & causal_mask(num_queries, num_keys, query_ids.device)


def causal_mask(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool [T, keys]; the queries are the last T of the keys."""
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)


def plan_packed_rows(document_ids: Tensor | None) -> AttentionPlan:
    """The plan of an uncached forward over [B, T] positions."""
    if document_ids is None:
        return AttentionPlan(is_causal=True)
    if document_ids.is_cuda:
        return AttentionPlan(block_mask=_block_mask(document_ids))
    if not torch.compiler.is_compiling() and _is_one_document_per_row(document_ids):
        return AttentionPlan(is_causal=True)
    return AttentionPlan(mask=document_mask(document_ids, document_ids))


def attend(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    """[B, H, T, head_dim], keys and values [B, kv heads, keys, head_dim] -> [B, H, T, head_dim]."""
    if plan.block_mask is not None:
        return _flex_attention()(query, key, value, block_mask=plan.block_mask, enable_gqa=True)
    if must_widen(query):
        with torch.autocast("cpu", enabled=False):
            return _attend_by_sdpa(query.float(), key.float(), value.float(), plan).to(query.dtype)
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and key.shape[2] <= _MAX_EXPLICIT_KEYS:
        return _attend_by_matmul(query, key, value, plan.bias(query, key.shape[2]))
    return _attend_by_sdpa(query, key, value, plan)


def _attend_by_sdpa(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=plan.mask, is_causal=plan.is_causal, enable_gqa=True)


def _attend_by_matmul(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention written out; the queries that share a key are laid side by side, so nothing is repeated."""
    batch_size, num_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    query = (query * head_dim**-0.5).reshape(batch_size, num_kv_heads, -1, head_dim)
    scores = (query @ key.transpose(-1, -2)).view(batch_size, num_heads, num_queries, num_keys)
    if bias is not None:
        scores = scores + bias
    weights = scores.softmax(dim=-1).view(batch_size, num_kv_heads, -1, num_keys)
    return (weights @ value).view(batch_size, num_heads, num_queries, head_dim)


def _is_one_document_per_row(document_ids: Tensor) -> bool:
    """Whether each row is one document from its first position, padded at the end or not at all."""
    return bool(((document_ids == document_ids[:, :1]) | (document_ids == -1)).all() & (document_ids[:, 1:] <= document_ids[:, :-1]).all())


def _block_mask(document_ids: Tensor) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def may_look(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[batch, query] == document_ids[batch, key])

    batch_size, length = document_ids.shape
    return create_block_mask(may_look, batch_size, None, length, length, device=str(document_ids.device))


@cache
def _flex_attention() -> Any:
    """FlexAttention is only fast compiled; compiled once per process."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)
