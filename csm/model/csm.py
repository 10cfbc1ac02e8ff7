"""CSM: a backbone over rows of text and audio, and a depth decoder that completes each frame.

The backbone reads rows [B, T, K+1] and its hidden state at t-1 predicts codebook 0 of the frame at t. For chosen frames
the depth decoder reads that hidden state and codebooks 0..K-2, and predicts codebooks 1..K-1. Losses are `csm.loss`'s,
sampling `csm.generation`'s, files `csm.model.pretrained`'s. Parameter names are those of Sesame's checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csm.config import ModelConfig
from csm.model.depth_nats import DepthNats, DepthTargets, depth_nats
from csm.model.functions import sum_and_look_up
from csm.model.products import batched_product
from csm.model.transformer import INIT_STD, Linear, Transformer


class Embedding(nn.Embedding):
    """A table left uninitialised: its model fills it from its own seed, or from a checkpoint."""

    def reset_parameters(self) -> None:
        pass


@dataclass
class CSMOutput:
    """What a forward gives.

    Attributes:
        hidden: [B, T, D], normed.
        c0_logits: [B, T, V]; position t predicts the frame at t+1.
        depth_logits: [N, K-1, V], column i predicts codebook i+1 of the frames asked for; None without `depth_index`. A
            view of memory laid out [K-1, N, V].
        depth_nats: only with `depth_targets`, and then in place of the logits.
    """

    hidden: Tensor
    c0_logits: Tensor
    depth_logits: Tensor | None
    depth_nats: DepthNats | None = None


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _DepthPass(nn.Module):
    """The depth decoder and the projection before it: a view of a CSM's parts, which owns nothing."""

    def __init__(self, projection: Linear, decoder: Transformer) -> None:
        super().__init__()
        self.projection, self.decoder = projection, decoder

    def forward(self, previous_hidden: Tensor, embeds: Tensor) -> Tensor:
        """[N, D] and the embeddings of codebooks 0..K-2, [N, K-1, D] -> what the heads of codebooks 1..K-1 read, [K-1, N, E]."""
        x = self.projection(torch.cat((previous_hidden[:, None].to(embeds.dtype), embeds), dim=1))  # [N, K, E]
        return self.decoder(x)[:, 1:].transpose(0, 1)  # what the hidden state's own position says is not used


class CSM(nn.Module):
    """The model.

    Args:
        config: its shapes.
        seed: of the initial weights; the global random state is neither read nor moved.
        dtype: of the weights, which are made in it; another dtype draws other weights. None is torch's default.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        width, depth_width = config.backbone.width, config.depth_decoder.width
        with _default_dtype(dtype):
            self.backbone = Transformer(config.backbone, config.max_seq_len)
            self.decoder = Transformer(config.depth_decoder, config.num_codebooks)
            self.text_embeddings = Embedding(config.text_vocab_size, width)
            self.audio_embeddings = Embedding(config.num_codebooks * config.audio_vocab_size, width)
            self.projection = Linear(width, depth_width)
            self.codebook0_head = Linear(width, config.audio_vocab_size)
            self.audio_head = nn.Parameter(torch.empty(config.num_codebooks - 1, depth_width, config.audio_vocab_size))
        # Not a buffer: it is no state, and `.to(dtype)` must leave it alone.
        self._code_offsets = torch.arange(config.num_codebooks, device="cpu") * config.audio_vocab_size
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw all weights anew; the same seed gives the same weights. On the meta device: nothing."""
        device = self.audio_head.device
        if device.type == "meta":
            return
        generator = torch.Generator(device).manual_seed(seed)
        self.backbone.reset_parameters(generator)
        self.decoder.reset_parameters(generator)
        for weight in (self.text_embeddings.weight, self.audio_embeddings.weight, self.projection.weight, self.codebook0_head.weight):
            nn.init.normal_(weight, std=INIT_STD, generator=generator)
        nn.init.normal_(self.audio_head, std=INIT_STD, generator=generator)

    @property
    def activation_checkpointing(self) -> bool:
        """Recompute each layer in the backward pass: about a third more time, far fewer activations kept."""
        return self.backbone.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.backbone.activation_checkpointing = value
        self.decoder.activation_checkpointing = value

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def table_index(self, codes: Tensor, first_codebook: int = 0) -> Tensor:
        """Rows of the shared audio table: `code + V * codebook`.

        Args:
            codes: int64 [..., k], codes of codebooks first_codebook .. first_codebook + k - 1.
        """
        if self._code_offsets.device != codes.device:
            self._code_offsets = self._code_offsets.to(codes.device)
        return codes + self._code_offsets[first_codebook : first_codebook + codes.shape[-1]]

    def embed(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Sum the embeddings of the columns that count: [B, T, K+1] -> [B, T, D], without making [B, T, K, D]."""
        index, weights = self._bags(tokens, mask)
        audio = F.embedding_bag(index, self.audio_embeddings.weight, mode="sum", per_sample_weights=weights)
        return self._with_text(audio, tokens, mask)

    def _bags(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the audio table that each position sums, and their weights, 0 or 1: both [B * T, K]."""
        return self.table_index(tokens[..., :-1]).flatten(0, 1), mask[..., :-1].flatten(0, 1).to(self.audio_embeddings.weight.dtype)

    def _with_text(self, audio: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.text_embeddings(tokens[..., -1]) * mask[..., -1:] + audio.view(*tokens.shape[:2], -1)  # [B, T, D]

    def depth_logits(self, previous_hidden: Tensor, codes: Tensor) -> Tensor:
        """Predict codebooks 1..K-1 of frames whose codes are known (teacher forcing).

        Args:
            previous_hidden: [N, D], the backbone's hidden state at the position before each frame.
            codes: int64 [N, K]; the last codebook is not read.
        Returns:
            [N, K-1, V]; a view of memory laid out [K-1, N, V].
        """
        return self._depth_logits(previous_hidden, self.audio_embeddings(self.table_index(codes[:, :-1])))

    def _depth_logits(self, previous_hidden: Tensor, embeds: Tensor) -> Tensor:
        """[N, D] and the embeddings of codebooks 0..K-2, [N, K-1, D] -> [N, K-1, V]."""
        outputs = _DepthPass(self.projection, self.decoder)(previous_hidden, embeds)
        return batched_product(outputs, self.audio_head).transpose(0, 1)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        document_ids: Tensor | None = None,
        depth_index: Tensor | None = None,
        depth_targets: DepthTargets | None = None,
    ) -> CSMOutput:
        """Run the backbone over packed rows and, for the frames asked for, the depth decoder.

        Args:
            tokens: int64 [B, T, K+1].
            mask: bool [B, T, K+1]; hiding a column hides it from the backbone, never from the depth decoder.
            document_ids: int64 [B, T]: attention and positions stay inside equal ids; -1 is padding. None: one each row.
            depth_index: int64 [N, 2]: (row, position >= 1) of frames. None: no depth pass.
            depth_targets: of those frames: the depth decoder's loss instead of its logits, and its gradient at once.
        Raises:
            ValueError: if tokens or mask do not fit the model.
        """
        columns = self.config.num_codebooks + 1
        if tokens.ndim != 3 or tokens.shape[-1] != columns or tokens.shape != mask.shape:
            raise ValueError(
                f"tokens {tuple(tokens.shape)} and mask {tuple(mask.shape)}: expected [B, T, {columns}] for both, {columns - 1} "
                "codebooks and the text column"
            )
        if depth_index is None:
            hidden = self.backbone(self.embed(tokens, mask), document_ids=document_ids)
            return CSMOutput(hidden, self.codebook0_head(hidden), None)
        row, position = depth_index.unbind(1)
        depth_rows = self.table_index(tokens[row, position, :-2])  # [N, K-1]
        audio, depth_embeds = sum_and_look_up(self.audio_embeddings.weight, *self._bags(tokens, mask), depth_rows)
        hidden = self.backbone(self._with_text(audio, tokens, mask), document_ids=document_ids)
        previous_hidden = hidden[row, position - 1]
        if depth_targets is None:
            return CSMOutput(hidden, self.codebook0_head(hidden), self._depth_logits(previous_hidden, depth_embeds))
        # Before codebook 0's logits, which then need not be there yet.
        nats = depth_nats(_DepthPass(self.projection, self.decoder), self.audio_head, previous_hidden, depth_embeds, depth_targets)
        return CSMOutput(hidden, self.codebook0_head(hidden), None, nats)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = torch.float32, device: torch.device | str = "cpu") -> CSM:
        """Read a checkpoint: a folder, a run, or a hub id; our layout, Sesame's or transformers', detected.

        Raises:
            FileNotFoundError: if there is nothing at `path`.
            ValueError: if its tensors are not those of its config, or it holds pickles only.
        """
        from csm.model.pretrained import load_model

        return load_model(path, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, layout: str = "csm", **extras: Any) -> None:
        """Write weights and config; see `csm.model.pretrained.save_model` for the layouts and what else can be written."""
        from csm.model.pretrained import save_model

        save_model(self, folder, layout=layout, **extras)
