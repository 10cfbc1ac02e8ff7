"""The frame loop: one backbone step and K-1 depth steps for every 80 ms, over static caches.

Two parts. A `FrameLoop` makes one frame: it is where the time goes. `DepthLoop` is the one that always works: the depth
decoder's weights copied once into the form its steps want, a step a fixed handful of operator calls with no host sync.
`GraphLoop` records those calls as one CUDA graph; `native.NativeLoop` is machine code for CPUs. `FrameDecoder` owns the
backbone's cache and yields frames [B, K]. What the rows mean, and sound, is `generator`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.generation.sampling import MAX_SEED, Sampler
from csm.model.csm import CSM
from csm.model.transformer import KVCache, rope_frequencies


class FrameLoop(Protocol):
    """What a `FrameDecoder` needs of the model between prompts."""

    device: torch.device

    def step(self, embeds: Tensor, cache: KVCache) -> Tensor:
        """Take one more position a row, embeds [B, D], into the cache; the hidden state [B, D] after it."""
        ...

    def frame(self, hidden: Tensor, sampler: Sampler, frame_index: int) -> Tensor:
        """Draw a frame from hidden [B, D]: int64 [B, K]."""
        ...


class DepthLoop:
    """Draws the codes of one frame a row, in PyTorch's own operators.

    Holds copies of the depth decoder's weights: queries, keys and values in one matrix, the two inputs of SwiGLU in one
    matrix, both laid out [in, out] and with the norm before them folded in; and the audio table already projected D -> E,
    so that a code becomes an input by one look-up. Made anew when the model's weights change.

    Args:
        model: float32 or bfloat16.
    """

    @torch.no_grad()
    def __init__(self, model: CSM) -> None:
        config = model.config.depth_decoder
        self._backbone, self._codebook0_head = model.backbone, model.codebook0_head
        self.num_codebooks = model.config.num_codebooks
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.width, self.ffn_width, self.eps = config.width, config.ffn_width, config.norm_eps
        self.dtype, self.device = model.projection.weight.dtype, model.projection.weight.device
        self.projection = model.projection.weight.T
        table = F.linear(model.audio_embeddings.weight, model.projection.weight).detach()
        self.tables = list(table.view(self.num_codebooks, -1, self.width).unbind(0))  # K of [V, E]
        self.heads = list(model.audio_head.detach().unbind(0))  # K-1 of [E, V]
        self.last_scale = model.decoder.norm.scale.detach()
        self.layers = []
        for layer in model.decoder.layers:
            attention, mlp = layer.attn, layer.mlp
            qkv = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
            gate_up = torch.cat((mlp.w1.weight, mlp.w3.weight))
            self.layers.append(
                (
                    _fold(qkv, layer.sa_norm.scale),  # [E, (H + 2 kv) * head_dim]
                    attention.output_proj.weight.detach().T.contiguous(),
                    _fold(gate_up, layer.mlp_norm.scale),  # [E, 2 * ffn]
                    mlp.w2.weight.detach().T.contiguous(),
                )
            )
        angles = torch.arange(self.num_codebooks, dtype=torch.float32)[:, None] * rope_frequencies(config)
        rotations = torch.polar(torch.ones_like(angles), angles).to(self.device)  # [K, head_dim / 2] complex
        self.rotations = [rotations[0:2, None], *rotations[2:, None, None].unbind(0)]  # of step 1 (two positions), 2, 3, ...
        num_groups = self.num_heads // self.num_kv_heads
        # Step 1 runs positions 0 (hidden state) and 1 (codebook 0) together; a query row is (position, head of the group).
        mask = torch.tensor([[True, False], [True, True]]).repeat_interleave(num_groups, dim=0)
        self.first_mask = mask.to(self.device)  # [2 * groups, 2]
        self._slots: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]] = []
        self._batch_size = 0

    def _allocate(self, batch_size: int) -> None:
        """Static keys and values, and every view of them that a step writes or reads."""
        size = (batch_size, self.num_kv_heads, self.num_codebooks, self.head_dim)
        self._slots = []
        for _ in self.layers:
            keys = torch.zeros(size, dtype=self.dtype, device=self.device)
            values = torch.zeros_like(keys)
            views = []
            for step in range(1, self.num_codebooks):
                new = slice(0 if step == 1 else step, step + 1)
                seen = slice(0, step + 1)
                views.append((keys[:, :, new], values[:, :, new], keys[:, :, seen], values[:, :, seen]))
            self._slots.append(views)
        self._batch_size = batch_size

    @torch.no_grad()
    def step(self, embeds: Tensor, cache: KVCache) -> Tensor:
        return self._backbone(embeds[:, None], cache=cache)[:, 0]

    @torch.no_grad()
    def frame(self, hidden: Tensor, sampler: Sampler, frame_index: int) -> Tensor:
        return self.run(hidden, sampler.draw(self._codebook0_head(hidden), frame_index, 0), sampler, frame_index)

    @torch.no_grad()
    def run(self, hidden: Tensor, code0: Tensor, sampler: Sampler, frame_index: int) -> Tensor:
        """Complete a frame.

        Args:
            hidden: [B, D], the backbone's state that predicted codebook 0.
            code0: int64 [B].
        Returns:
            int64 [B, K].
        """
        batch_size = hidden.shape[0]
        if batch_size != self._batch_size:
            self._allocate(batch_size)
        first = torch.mm(hidden, self.projection)
        x = torch.stack((first, self.tables[0].index_select(0, code0)), dim=1).flatten(0, 1)  # [B * 2, E]
        codes = [code0]
        for step in range(1, self.num_codebooks):
            num_new = 2 if step == 1 else 1
            for layer_index, weights in enumerate(self.layers):
                x = self._layer(x, weights, self._slots[layer_index][step - 1], step, batch_size, num_new)
            if num_new == 2:
                x = x.view(batch_size, 2, self.width)[:, 1]
            x = F.rms_norm(x, (self.width,), self.last_scale, self.eps)
            code = sampler.draw(torch.mm(x, self.heads[step - 1]), frame_index, step)
            codes.append(code)
            if step + 1 < self.num_codebooks:
                x = self.tables[step].index_select(0, code)  # [B, E]
        return torch.stack(codes, dim=1)

    def _layer(
        self,
        x: Tensor,
        weights: tuple[Tensor, Tensor, Tensor, Tensor],
        slot: tuple[Tensor, Tensor, Tensor, Tensor],
        step: int,
        batch_size: int,
        num_new: int,
    ) -> Tensor:
        qkv_weight, output_weight, gate_up_weight, down_weight = weights
        new_keys, new_values, keys, values = slot
        heads, kv_heads, head_dim = self.num_heads, self.num_kv_heads, self.head_dim
        qkv = torch.mm(F.rms_norm(x, (self.width,), None, self.eps), qkv_weight)
        qkv = qkv.view(batch_size, num_new, heads + 2 * kv_heads, head_dim)
        pairs = qkv[:, :, : heads + kv_heads].float().unflatten(3, (head_dim // 2, 2))
        turned = torch.view_as_real(torch.view_as_complex(pairs) * self.rotations[step - 1]).flatten(3).to(self.dtype)
        new_keys.copy_(turned[:, :, heads:].transpose(1, 2))
        new_values.copy_(qkv[:, :, heads + kv_heads :].transpose(1, 2))
        # The heads that share a key are laid along the query axis: grouped attention without repeating keys.
        if num_new == 1:
            query = turned[:, :, :heads].view(batch_size, kv_heads, heads // kv_heads, head_dim)
            attended = F.scaled_dot_product_attention(query, keys, values).reshape(batch_size, -1)
        else:
            query = turned[:, :, :heads].unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(2, 3)
            attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=self.first_mask)
            attended = attended.unflatten(2, (num_new, -1)).transpose(1, 2).reshape(batch_size * num_new, -1)
        x = torch.addmm(x, attended, output_weight)
        gate_up = torch.mm(F.rms_norm(x, (self.width,), None, self.eps), gate_up_weight)
        gate, up = gate_up[:, : self.ffn_width], gate_up[:, self.ffn_width :]
        return torch.addmm(x, F.silu(gate) * up, down_weight)


def _fold(weight: Tensor, scale: Tensor) -> Tensor:
    """A weight [out, in] behind a norm, as [in, out] with the norm's scale in it; multiplied in float32."""
    return (weight.detach().float() * scale.detach().float()).to(weight.dtype).T.contiguous()


class GraphLoop(DepthLoop):
    """The same calls for a frame, recorded once as a CUDA graph and replayed: one launch instead of thousands.

    Inputs and outputs are static buffers; the backbone's step stays eager, because its cache grows. Recorded anew when the
    batch size or the sampling settings change. Unchecked: no GPU was at hand when this was written.
    """

    @torch.no_grad()
    def __init__(self, model: CSM) -> None:
        super().__init__(model)
        if self.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs the model on a CUDA device, it is on {self.device}")
        self._recorded: tuple[int, float, int, bool] | None = None
        self._graph = torch.cuda.CUDAGraph()

    @torch.no_grad()
    def frame(self, hidden: Tensor, sampler: Sampler, frame_index: int) -> Tensor:
        settings = (hidden.shape[0], sampler.temperature, sampler.top_k, sampler.forbids_eos(frame_index))
        if settings != self._recorded:
            self._record(hidden, sampler, frame_index)
            self._recorded = settings
        self._hidden.copy_(hidden)
        noise = sampler.noise_of_frame(frame_index)
        if noise is not None:
            self._noise.copy_(noise)
        self._graph.replay()
        return self._codes.clone()

    def _record(self, hidden: Tensor, sampler: Sampler, frame_index: int) -> None:
        self._hidden = hidden.clone()
        self._noise = torch.zeros(self.num_codebooks, hidden.shape[0], device=self.device)
        fixed = sampler.with_noise(self._noise, forbids_eos=sampler.forbids_eos(frame_index))
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):  # libraries load and caches come to life outside the recording
            for _ in range(2):
                super().frame(self._hidden, fixed, 0)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._codes = super().frame(self._hidden, fixed, 0)


class FrameDecoder:
    """Yields the frames of a batch of prompts.

    Args:
        model: float32 or bfloat16.
        batch_size: B.
        max_positions: room in the backbone's cache, prompt and frames together.
        loop: of the same model; None makes a `DepthLoop`.

    Attributes:
        unheard: int64 [B, K], the newest frame, which the backbone has not taken in yet; None before the first.
        has_ended: bool [B], rows whose EOS came.
    """

    def __init__(self, model: CSM, *, batch_size: int, max_positions: int, loop: FrameLoop | None = None) -> None:
        weight = model.projection.weight
        self.model = model
        self.loop = DepthLoop(model) if loop is None else loop
        self.cache = KVCache(model.config.backbone, batch_size, max_positions, device=weight.device, dtype=weight.dtype)
        self.unheard: Tensor | None = None
        self.has_ended = torch.zeros(batch_size, dtype=torch.bool, device=weight.device)
        self._hidden: Tensor | None = None

    def reset(self) -> None:
        """Forget the prompt and what was said."""
        self.cache.reset()
        self.unheard, self._hidden = None, None

    @torch.no_grad()
    def prefill(self, tokens: Tensor, mask: Tensor) -> None:
        """Take in rows behind those heard so far.

        Args:
            tokens: int64 [B, T, K+1]; shorter prompts are padded on the left with rows that are masked whole.
            mask: bool [B, T, K+1].
        """
        is_padding = ~mask.any(dim=-1)
        document_ids = -is_padding.long() if bool(is_padding.any()) else None
        embeds = self.model.embed(tokens, mask)
        self._hidden = self.model.backbone(embeds, document_ids=document_ids, cache=self.cache)[:, -1]
        self.unheard = None

    @torch.no_grad()
    def frames(self, sampler: Sampler, max_frames: int, *, stop_at_eos: bool = True) -> Iterator[Tensor]:
        """Yield frames int64 [B, K] until every row has ended or `max_frames` came.

        With `stop_at_eos`, a row's frames are zero from its EOS on, and the frame at which the last row ends is not yielded.

        Raises:
            ValueError: if the model's numbers are not finite.
        """
        assert self._hidden is not None or self.unheard is not None, "prefill comes first"
        self.has_ended = torch.zeros_like(self.has_ended)
        for frame_index in range(max_frames):
            hidden = self._hear()
            frame = self.loop.frame(hidden, sampler, frame_index)
            self.unheard = frame
            is_finite = torch.isfinite(hidden).all()
            if stop_at_eos:
                self.has_ended = self.has_ended | ~frame.any(dim=1)
                frame = frame.masked_fill(self.has_ended[:, None], 0)
            # One look from the host a frame, after all its work is queued.
            all_ended, fine = torch.stack((self.has_ended.all(), is_finite)).tolist()
            if not fine:
                raise ValueError(f"the model's numbers are not finite at frame {frame_index}; use dtype float32, or another checkpoint")
            if all_ended:
                return
            yield frame

    def _hear(self) -> Tensor:
        """The hidden state [B, D] after the newest frame."""
        if self.unheard is not None:
            table = self.model.audio_embeddings.weight
            embeds = F.embedding_bag(self.model.table_index(self.unheard), table, mode="sum")  # [B, D]
            self._hidden = self.loop.step(embeds, self.cache)
            self.unheard = None
        assert self._hidden is not None
        return self._hidden


def iterate_frames(
    model: CSM,
    tokens: Tensor,
    mask: Tensor,
    *,
    seeds: Sequence[int],
    max_frames: int,
    temperature: float = 0.9,
    top_k: int = 50,
    stop_at_eos: bool = True,
    min_frames: int = 0,
    loop: FrameLoop | None = None,
) -> Iterator[Tensor]:
    """Check a batch of prompts, then yield their frames int64 [B, K] one at a time; see `FrameDecoder.frames`.

    Args:
        tokens, mask: [B, T, K+1]; padding rows are masked whole and may stand on either side.
        seeds: one a row; a row's frames depend on its own prompt and seed only.
        min_frames: no row ends before; see `Sampler`.
        loop: of this model; None makes a `DepthLoop`.
    Raises:
        ValueError: if shapes do not fit, a prompt is empty, or prompt and frames exceed the window.
    """
    config = model.config
    if tokens.ndim != 3 or tokens.shape[-1] != config.num_codebooks + 1 or tokens.shape != mask.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)}: expected [B, T, {config.num_codebooks + 1}] for both, "
            f"{config.num_codebooks} codebooks and the text column"
        )
    if max_frames < 1 or min_frames > max_frames:
        raise ValueError(f"max_frames={max_frames}, min_frames={min_frames}: expected at least 1 frame, and not fewer than min_frames")
    device = model.projection.weight.device
    tokens, mask = pad_left(tokens.to(device), mask.to(device))
    num_positions = tokens.shape[1] + max_frames - 1  # the last frame is never heard
    if num_positions > config.max_seq_len:
        raise ValueError(
            f"a prompt of {tokens.shape[1]} positions and {max_frames} frames do not fit the window of {config.max_seq_len}; "
            "shorten the prompt or ask for fewer frames"
        )
    sampler = Sampler(seeds, max_frames, config.num_codebooks, temperature=temperature, top_k=top_k, min_frames=min_frames, device=device)
    decoder = FrameDecoder(model, batch_size=tokens.shape[0], max_positions=num_positions, loop=loop)
    decoder.prefill(tokens, mask)
    return decoder.frames(sampler, max_frames, stop_at_eos=stop_at_eos)


def decode_frames(
    model: CSM,
    tokens: Tensor,
    mask: Tensor,
    max_frames: int = 100,
    temperature: float = 0.9,
    top_k: int = 50,
    stop_at_eos: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The bare loop: the frames that follow a batch of prompts.

    Args:
        tokens: int64 [B, T, K+1]. mask: bool [B, T, K+1]; rows masked whole are padding.
        stop_at_eos: end a row at its frame of K zeros; otherwise such a frame is a frame like others and all
            `max_frames` come.
        generator: seeds the rows; None takes torch's default generator, so that `torch.manual_seed` holds.
    Returns:
        int64 [B, F, K], F <= max_frames: without EOS frames; rows that ended before the longest are zero behind their end.
    """
    device = generator.device if generator is not None else "cpu"
    seeds = torch.randint(MAX_SEED, (tokens.shape[0],), generator=generator, device=device).tolist()
    frames = list(
        iterate_frames(
            model,
            tokens,
            mask,
            seeds=seeds,
            max_frames=max_frames,
            temperature=temperature,
            top_k=top_k,
            stop_at_eos=stop_at_eos,
        )
    )
    if not frames:
        return torch.zeros(tokens.shape[0], 0, model.config.num_codebooks, dtype=torch.int64, device=model.projection.weight.device)
    return torch.stack(frames, dim=1)


def pad_left(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Move padding rows (masked whole) to the left of their prompt, keeping the order of the others.

    Raises:
        ValueError: if a prompt has no row that counts.
    """
    is_real = mask.any(dim=-1)  # [B, T]
    num_real = is_real.sum(dim=1)
    if tokens.shape[1] == 0 or bool((num_real == 0).any()):
        raise ValueError("a prompt is empty; give each at least its text rows")
    if bool(is_real.all()):
        return tokens, mask
    order = is_real.long().argsort(dim=1, stable=True)[..., None].expand_as(tokens)  # padding first
    width = int(num_real.max())
    return tokens.gather(1, order)[:, -width:], mask.gather(1, order)[:, -width:]
