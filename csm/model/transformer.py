"""Our Llama transformer, used twice: as the backbone and as the depth decoder.

RMSNorm, rotary positions with llama3 scaling, grouped-query attention, SwiGLU, no biases; parameter names are Sesame's
(torchtune's). Knows embeddings in and normed hidden states out; what they mean is `csm.model.csm`'s business, and which
attention kernel runs is `csm.model.attention`'s.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from csm.config import TransformerConfig
from csm.model.attention import AttentionPlan, attend, causal_mask, document_mask, plan_packed_rows, positions_from_documents
from csm.model.functions import gated_linear, rms_norm, rms_norm_again, rotate
from csm.model.products import linear
from csm.model.remade import remade_for_backward

INIT_STD = 0.02


class Linear(nn.Linear):
    """A linear map without bias, left uninitialised: its model fills it from its own seed, or from a checkpoint."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class GatedLinear(Linear):
    """A linear map of silu(gate) * up, which is never kept."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        return gated_linear(gate, up, self.weight)


class RMSNorm(nn.Module):
    """Divides by the root mean square over the last axis; computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)

    def remaking(self, normed: Tensor, x: Tensor) -> AbstractContextManager[None]:
        """Inside, nothing keeps `normed`, this norm's of `x`, for a backward pass: it is made again, by two walks over memory."""
        return remade_for_backward(normed, rms_norm_again(x, self.scale, self.eps))


def rope_frequencies(config: TransformerConfig) -> Tensor:
    """Angular frequency of each lane pair, float32 [head_dim / 2], with llama3 scaling when it is on.

    Source: Llama 3.1 (llama_models/llama3/model.py, Meta): long wavelengths are divided by the factor, short ones kept,
    those between are blended.
    """
    lanes = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / config.rope_base ** (lanes / config.head_dim)
    if config.rope_scaling_factor is None:
        return frequencies
    turns = config.rope_original_context * frequencies / (2 * math.pi)  # within the old context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    share_kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * (share_kept + (1.0 - share_kept) / config.rope_scaling_factor)


class KVCache:
    """Keys and values of the positions seen so far, in static buffers, for inference.

    Rows of different prompt lengths are padded on the left and prefilled with `document_ids` that are -1 on the padding;
    steps after that need neither ids nor positions.

    Attributes:
        keys, values: [layers, B, kv heads, max_len, head_dim]; the first `length` positions are filled.
        length: positions seen, the same for every row (padding included).
        is_ragged: whether rows hold padding or several documents, so that steps need a mask and each row its positions.
        document_ids: int64 [B, max_len]; kept up only while rows are ragged.
        next_positions: int64 [B], the position each row goes on with; kept up only while rows are ragged.
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        size = (config.num_layers, batch_size, config.num_kv_heads, max_len, config.head_dim)
        self.keys = torch.zeros(size, device=device, dtype=dtype)
        self.values = torch.zeros(size, device=device, dtype=dtype)
        self.document_ids = torch.zeros(batch_size, max_len, dtype=torch.int64, device=device)
        self.next_positions = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.length = 0
        self.is_ragged = False

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self.length = 0
        self.is_ragged = False
        self.document_ids[:, 0] = 0

    def rewind(self, length: int) -> None:
        """Forget the positions from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot rewind a cache of {self.length} positions to {length}")
        self.next_positions -= self.length - length
        self.length = length

    def store(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, kv heads, T, head_dim] behind what is there; return all keys and values so far."""
        stop = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : stop] = key
        self.values[layer, :, :, self.length : stop] = value
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]


class Attention(nn.Module):
    """Grouped-query self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.width, config.width)
        self.k_proj = Linear(config.width, kv_width)
        self.v_proj = Linear(config.width, kv_width)
        self.output_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache: KVCache | None, layer: int) -> Tensor:
        heads = (-1, self.head_dim)
        query = rotate(self.q_proj(x).unflatten(-1, heads), cos, sin).transpose(1, 2)  # [B, H, T, head_dim]
        key = rotate(self.k_proj(x).unflatten(-1, heads), cos, sin).transpose(1, 2)  # [B, kv heads, T, head_dim]
        value = self.v_proj(x).unflatten(-1, heads).transpose(1, 2)
        if cache is not None:
            key, value = cache.store(layer, key, value)
        return self.output_proj(attend(query, key, value, plan).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.width, config.ffn_width)
        self.w2 = GatedLinear(config.ffn_width, config.width)
        self.w3 = Linear(config.width, config.ffn_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w1(x), self.w3(x))


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attn = Attention(config)
        self.mlp = FeedForward(config)
        self.sa_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan, cache: KVCache | None, layer: int, remake_norms: bool = False
    ) -> Tensor:
        normed = self.sa_norm(x)
        with self.sa_norm.remaking(normed, x) if remake_norms else nullcontext():
            x = x + self.attn(normed, cos, sin, plan, cache, layer)
        normed = self.mlp_norm(x)
        with self.mlp_norm.remaking(normed, x) if remake_norms else nullcontext():
            return x + self.mlp(normed)


class Transformer(nn.Module):
    """Layers and a last norm: embeddings [B, T, width] in, normed hidden states [B, T, width] out.

    Args:
        config: its shapes.
        max_positions: positions that the rotary table holds.
    """

    def __init__(self, config: TransformerConfig, max_positions: int) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each layer in the backward pass
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        angles = torch.arange(max_positions, dtype=torch.float32, device="cpu")[:, None] * rope_frequencies(config)
        # Not buffers: those would follow `.to(bfloat16)`, and rotary angles must stay float32.
        self._cos, self._sin = angles.cos(), angles.sin()  # [max_positions, head_dim / 2]

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights: std 0.02, the maps that write to the residual stream divided by sqrt(2 * layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("output_proj.weight", "w2.weight"))
                std = INIT_STD / math.sqrt(2 * self.config.num_layers) if writes_residual else INIT_STD
                nn.init.normal_(parameter, std=std, generator=generator)

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Run all positions of x, or, with a cache, the T positions that follow those it holds.

        Args:
            x: [B, T, width].
            positions: int64 [B, T]; None: counted from 0 in each document, or on from the cache.
            document_ids: int64 [B, T], attention stays inside equal ids, -1 is padding; None: one document, or the cache's.
            cache: filled in place; only for inference.
        Raises:
            ValueError: if there are more positions than the window, or than the cache has room for.
        """
        max_positions = self._cos.shape[0]
        if x.shape[1] > max_positions:
            raise ValueError(f"{x.shape[1]} positions, the window has {max_positions}; shorten the rows or raise model.max_seq_len")
        if self._cos.device != x.device:
            self._cos, self._sin = self._cos.to(x.device), self._sin.to(x.device)
        if cache is None:
            plan = plan_packed_rows(document_ids)
            if positions is None and document_ids is not None and not plan.is_causal:
                positions = positions_from_documents(document_ids)
            first_position = 0
        else:
            first_position = cache.length
            plan, positions = _plan_cached(x.shape[1], positions, document_ids, cache, max_positions)
        if positions is None:
            rows = slice(first_position, first_position + x.shape[1])
            cos, sin = self._cos[rows, None], self._sin[rows, None]  # [T, 1, head_dim / 2]
        else:
            cos, sin = self._cos[positions, None], self._sin[positions, None]  # [B, T, 1, head_dim / 2]
        is_learning = torch.is_grad_enabled() and cache is None
        recompute = is_learning and self.activation_checkpointing
        remake_norms = is_learning and not torch.compiler.is_compiling()  # the compiler chooses for itself what it keeps
        for index, layer in enumerate(self.layers):
            if recompute:
                x = checkpoint(layer, x, cos, sin, plan, None, index, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, plan, cache, index, remake_norms)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)


def _plan_cached(
    num_new: int, positions: Tensor | None, document_ids: Tensor | None, cache: KVCache, max_positions: int
) -> tuple[AttentionPlan, Tensor | None]:
    """Note the new positions in the cache; return how they attend, and their positions (None: counted from its length)."""
    start, stop = cache.length, cache.length + num_new
    room = cache.max_len if cache.is_ragged or positions is not None else min(cache.max_len, max_positions)
    if stop > room:
        raise ValueError(f"{start} positions cached and {num_new} more do not fit a cache of {room}; make it longer or drop old turns")
    if not cache.is_ragged and not _becomes_ragged(positions, document_ids, cache):
        if start == 0 and document_ids is not None:
            cache.document_ids[:, 0] = document_ids[:, 0]  # the others are filled in if rows ever differ
        if start == 0 or num_new == 1:
            return AttentionPlan(is_causal=start == 0), None
        return AttentionPlan(mask=causal_mask(num_new, stop, cache.keys.device)), None
    if not cache.is_ragged:
        cache.is_ragged = True
        cache.document_ids[:, 1:start] = cache.document_ids[:, :1]
        cache.next_positions.fill_(start)
    if document_ids is None:
        document_ids = cache.document_ids[:, max(start - 1, 0)].unsqueeze(1).expand(-1, num_new)
    cache.document_ids[:, start:stop] = document_ids
    if positions is None and start == 0:
        positions = positions_from_documents(document_ids)
    elif positions is None:
        positions = cache.next_positions[:, None] + torch.arange(num_new, device=document_ids.device)
    cache.next_positions.copy_(positions[:, -1] + 1)
    return AttentionPlan(mask=document_mask(document_ids, cache.document_ids[:, :stop])), positions


def _becomes_ragged(positions: Tensor | None, document_ids: Tensor | None, cache: KVCache) -> bool:
    """Whether these positions differ from one document a row that goes on from where the cache stands."""
    if positions is not None:
        return True
    if document_ids is None:
        return False
    first = cache.document_ids[:, :1] if cache.length else document_ids[:, :1]
    return bool((document_ids != first).any())
