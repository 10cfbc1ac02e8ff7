"""Mimi's encoder for CPUs: the arithmetic of transformers' `MimiModel.encode`, as matrix products over many clips at once.

Two things make a convolution slow on a CPU: its weights are put into another order on every call, which is most of a short clip's
time, and a long clip's activations (370 MB of the first layer's for a minute) leave the caches between one layer and the next. Here
rows are time and columns channels, so that every convolution is one or two matrix products over views of what lies in memory. The
early layers, most of whose time is the passing of memory, take a clip in pieces that stay in the cache, each with as much of what
comes before it as a value depends on; the late ones, whose weights are large, take the rows of all clips in one product. A clip's
frames depend on no other clip (tests/test_codec_mimi.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiResnetBlock

from csm.frames import SAMPLES_PER_FRAME

Item = TypeVar("Item")
Result = TypeVar("Result")
PIECE_FRAMES = 3  # of the early layers at once: 3 MB of activations at the width of the first


class PackedEncoder:
    """Encodes clips of whole frames with a model's weights, which it copies in another order (60 MB of Mimi's).

    Args:
        model: on a CPU, float32, causal.
    """

    def __init__(self, model: MimiModel) -> None:
        layers = list(model.encoder.encoder_seanet.layers)
        last = max(index for index, layer in enumerate(layers) if isinstance(layer, MimiConv1d) and layer.conv.stride[0] > 1)
        first_of_last = max(index for index in range(last) if isinstance(layers[index], MimiConv1d))  # what makes the last but one rate
        self._early = [_prepared(layer) for layer in layers[: first_of_last + 1]]
        self._late = [_prepared(layer) for layer in layers[first_of_last + 1 :]]
        self._downsample = _Convolution.of(model.encoder.downsample)
        self._transformer = model.encoder.encoder_transformer
        self._window = model.config.sliding_window
        self._early_stride, self._context = 1, 0  # samples a row after the early layers; samples before a row that it depends on
        for layer in self._early:
            for part in layer if isinstance(layer, list) else [layer]:
                if isinstance(part, _Convolution):
                    self._context += (part.num_taps - 1) * part.dilation * self._early_stride
                    self._early_stride *= part.stride
        self._context = -(-self._context // self._early_stride) * self._early_stride
        self._rows_per_frame = SAMPLES_PER_FRAME // self._early_stride
        split = model.quantizer
        self._quantizers = [
            _Quantizer.of(split.semantic_residual_vector_quantizer),
            _Quantizer.of(split.acoustic_residual_vector_quantizer),
        ]

    def encode(self, clips: Sequence[Tensor], num_codebooks: int) -> list[Tensor]:
        """Codes int64 [K, F] of clips, each float32 [F * 1920] with F >= 1."""
        num_frames = [clip.shape[0] // SAMPLES_PER_FRAME for clip in clips]
        hidden = torch.cat(self._early_rows(clips))
        lengths = [frames * self._rows_per_frame for frames in num_frames]
        for layer in self._late:
            hidden, lengths = _apply(layer, hidden, lengths)
        hidden = self._attended(hidden, lengths)
        hidden, lengths = self._downsample(hidden, lengths)
        semantic = self._quantizers[0].encode(hidden, num_codebooks)
        acoustic = self._quantizers[1].encode(hidden, num_codebooks - len(semantic))
        return [codes.contiguous() for codes in torch.stack([*semantic, *acoustic]).split(num_frames, dim=1)]

    def _attended(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """The transformer over clips one behind the other, [N, D]; each attends to itself, as far back as the model's window."""
        clip = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        place = torch.cat([torch.arange(length) for length in lengths])
        back = place[:, None] - place
        mask = (clip[:, None] == clip) & (back >= 0) & (back < self._window)
        return self._transformer(
            hidden[None], attention_mask=mask[None, None], position_ids=place[None], use_cache=False
        ).last_hidden_state[0]

    def _early_rows(self, clips: Sequence[Tensor]) -> list[Tensor]:
        """[rows, C] of every piece of the clips: the layers up to the last but one rate.

        Pieces depend on nothing but samples, so threads take a piece each.
        """
        starts = [(clip, start) for clip in clips for start in range(0, clip.shape[0], PIECE_FRAMES * SAMPLES_PER_FRAME)]
        return map_in_threads(lambda at: self._early_piece(*at), starts)

    def _early_piece(self, clip: Tensor, start: int) -> Tensor:
        begin = max(0, start - self._context)
        hidden = clip[begin : start + PIECE_FRAMES * SAMPLES_PER_FRAME, None]
        for layer in self._early:
            hidden, _ = _apply(layer, hidden, [hidden.shape[0]])
        return hidden[(start - begin) // self._early_stride :]


def balanced_packs(lengths: Sequence[int], max_frames: int, num_threads: int) -> list[list[int]]:
    """Indices of clips, in packs of about `max_frames` at most, alike in length, as many as keep every thread busy to the end."""
    num_packs = min(len(lengths), num_threads * -(-sum(lengths) // (num_threads * max_frames)))
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    taken = [0] * num_packs
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):  # the longest first, each to the emptiest
        emptiest = taken.index(min(taken))
        packs[emptiest].append(index)
        taken[emptiest] += lengths[index]
    return packs


def map_in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """As `map`, without gradients, on as many threads as torch has, an item each; inside, torch has one.

    Sharing each product out instead, which is what torch's threads do, wins little: these products are small, and what is
    between them is passes over memory. While it runs, other threads of the process compute with one thread, too.
    """
    num_threads = torch.get_num_threads()
    if min(num_threads, len(items)) < 2:
        return [work(item) for item in items]

    @torch.no_grad()  # which is a thread's own
    def alone(item: Item) -> Result:
        return work(item)

    torch.set_num_threads(1)  # what new threads begin with
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(num_threads)


@dataclass
class _Convolution:
    """A causal convolution over rows of channels.

    Attributes:
        weight: [num_taps * C_in, C_out], the earliest tap first.
        is_replicating: what comes before a clip is its first row, not zeros.
    """

    weight: Tensor
    bias: Tensor | None
    num_taps: int
    stride: int
    dilation: int
    is_replicating: bool

    @classmethod
    def of(cls, layer: MimiConv1d) -> _Convolution:
        conv = layer.conv
        num_taps, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
        if conv.groups != 1 or (stride > 1 and (num_taps != 2 * stride or dilation > 1)):
            raise ValueError(f"a convolution of {num_taps} taps, stride {stride}, {conv.groups} groups is none of Mimi's encoder")
        weight = conv.weight.detach().permute(2, 1, 0).reshape(-1, conv.out_channels).contiguous()
        return cls(weight, conv.bias, num_taps, stride, dilation, layer.pad_mode == "replicate")

    def __call__(self, hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
        """[N, C_in] of clips one behind the other -> [N / stride, C_out]."""
        if self.stride > 1:
            return self._strided(hidden, lengths), [length // self.stride for length in lengths]
        num_rows, width = hidden.shape
        if self.num_taps == 1:
            columns = hidden
        else:
            columns = hidden.new_empty(num_rows, self.num_taps, width)
            starts = [0, *accumulate(lengths[:-1])]
            for tap in range(self.num_taps):
                back = (self.num_taps - 1 - tap) * self.dilation
                columns[back:, tap] = hidden[: max(0, num_rows - back)]
                for start, length in zip(starts, lengths, strict=True) if back else ():
                    columns[start : start + min(back, length), tap] = 0
            columns = columns.flatten(1)
        return self._product(columns, self.weight), list(lengths)

    def _strided(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Twice as many taps as the stride: each row is the product of a block of rows and of the block before it."""
        blocks = hidden.reshape(-1, self.stride * hidden.shape[1])
        earlier, later = self.weight.chunk(2)
        result = self._product(blocks, later)
        if len(lengths) == 1 and not self.is_replicating:
            result[1:].addmm_(blocks[:-1], earlier)
            return result
        starts = torch.tensor([0, *accumulate(lengths[:-1])]) // self.stride
        before = blocks.roll(1, 0)
        before[starts] = blocks[starts, : hidden.shape[1]].repeat(1, self.stride) if self.is_replicating else 0.0
        return result.addmm_(before, earlier)

    def _product(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows @ weight if self.bias is None else torch.addmm(self.bias, rows, weight)


@dataclass
class _Quantizer:
    """Residual quantization. The nearest entry is that of the largest x.e - |e|^2 / 2: one product a codebook."""

    projection: Tensor | None
    tables: list[Tensor]
    half_norms: list[Tensor]

    @classmethod
    def of(cls, quantizer: nn.Module) -> _Quantizer:
        tables = [layer.codebook.embed.float() for layer in quantizer.layers]
        projection = None if quantizer.input_proj is None else quantizer.input_proj.weight.detach()[:, :, 0].T.contiguous()
        return cls(projection, tables, [-table.square().sum(dim=1) / 2 for table in tables])

    def encode(self, hidden: Tensor, num_codebooks: int) -> list[Tensor]:
        """[N, D] -> codes [N] of each codebook."""
        left = hidden if self.projection is None else hidden @ self.projection
        codes = []
        for table, half_norm in zip(self.tables[:num_codebooks], self.half_norms, strict=False):
            codes.append(torch.addmm(half_norm, left, table.T).argmax(dim=1))
            left = left - table[codes[-1]]
        return codes


def _prepared(layer: nn.Module) -> _Convolution | list[_Convolution] | None:
    """A convolution; the two of a residual block; None for an ELU."""
    if isinstance(layer, MimiConv1d):
        return _Convolution.of(layer)
    if isinstance(layer, MimiResnetBlock):
        if not isinstance(layer.shortcut, nn.Identity):
            raise ValueError("a residual block with a convolution as its shortcut is none of Mimi's encoder")
        return [_Convolution.of(part) for part in layer.block if isinstance(part, MimiConv1d)]
    if isinstance(layer, nn.ELU):
        return None
    raise ValueError(f"a {type(layer).__name__} is none of Mimi's encoder")


def _apply(layer: _Convolution | list[_Convolution] | None, hidden: Tensor, lengths: Sequence[int]) -> tuple[Tensor, list[int]]:
    if layer is None:
        return _elu(hidden), list(lengths)
    if isinstance(layer, _Convolution):
        return layer(hidden, lengths)
    branch = hidden
    for convolution in layer:
        branch, _ = convolution(_elu(branch), lengths)
    return branch.add_(hidden), list(lengths)


def _elu(hidden: Tensor) -> Tensor:
    """exp(x) - 1 below zero. By `exp`, which costs a third of `elu`'s `expm1` and is off by one rounding of 1 at most."""
    below = hidden.clamp(max=0).exp_().sub_(1)
    return torch.maximum(hidden, below, out=below)
