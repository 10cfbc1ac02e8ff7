"""Mimi's encoder for CPUs: the arithmetic of transformers' `MimiModel.encode`, as matrix products over many clips at once.

Two things make a convolution slow on a CPU: its weights are put into another order on every call, which is most of a short clip's
time, and a long clip's activations (370 MB of the first layer's for a minute) leave the caches between one layer and the next. Here
rows are time and columns channels, so that every convolution is two or three matrix products over views of what lies in memory. The
early layers, most of whose time is the passing of memory, take a clip in pieces that stay in the cache, and keep of each what the next
one begins with; the late ones, whose weights are large, take the rows of all clips in one product. A clip's frames depend on no other
clip (tests/test_codec_mimi.py).

Between the convolutions everything is log2(e) times what it is in the model: `exp2` costs half of `exp` here, and the factor is in the
weights of the first and the last convolution and in the biases.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiResnetBlock, apply_rotary_pos_emb

from csm.frames import SAMPLES_PER_FRAME

Item = TypeVar("Item")
Result = TypeVar("Result")
PIECE_FRAMES = 3  # of the early layers at once: 3 MB of activations at the width of the first
LOG2_E = 1 / math.log(2)
_MINUS_LOG2_E = torch.tensor(-LOG2_E)


class PackedEncoder:
    """Encodes clips of whole frames with a model's weights, which it copies in another order (75 MB of Mimi's).

    Args:
        model: on a CPU, float32, causal.
    """

    def __init__(self, model: MimiModel) -> None:
        seanet = [layer for layer in model.encoder.encoder_seanet.layers if not isinstance(layer, nn.ELU)]  # one before each but the first
        layers = [_Layer.of(layer, is_first=layer is seanet[0], is_last=layer is seanet[-1]) for layer in seanet]
        strided = [index for index, layer in enumerate(layers) if isinstance(layer.first, _Strided)]
        num_early = strided[-2] if len(strided) > 1 else 0  # up to what makes the last but one rate
        self._early, self._late = layers[:num_early], layers[num_early:]
        self._downsample = _convolution(model.encoder.downsample, is_even=False)
        self._transformer = model.encoder.encoder_transformer
        self._window = model.config.sliding_window
        self._early_stride, context = 1, 0  # samples a row after the early layers; samples before a row that it depends on
        for layer in self._early:
            context += layer.first.context * self._early_stride
            self._early_stride *= layer.first.stride
        self._context_frames = -(-context // SAMPLES_PER_FRAME)
        split = model.quantizer
        self._quantizers = [
            _Quantizer.of(split.semantic_residual_vector_quantizer),
            _Quantizer.of(split.acoustic_residual_vector_quantizer),
        ]

    def encode(self, clips: Sequence[Tensor], num_codebooks: int) -> list[Tensor]:
        """Codes int64 [K, F] of clips, each float32 [F * 1920] with F >= 1."""
        num_frames = [clip.shape[0] // SAMPLES_PER_FRAME for clip in clips]
        hidden = self._early_rows(clips)
        lengths = [clip.shape[0] // self._early_stride for clip in clips]
        for index, layer in enumerate(self._late):
            hidden, lengths = layer(hidden, lengths, is_active=index == 0)  # the early layers end with an ELU
        hidden = self._attended(hidden, lengths)
        hidden, lengths = self._downsample(hidden, lengths)
        semantic = self._quantizers[0].encode(hidden, num_codebooks)
        acoustic = self._quantizers[1].encode(hidden, num_codebooks - len(semantic))
        return [codes.contiguous() for codes in torch.stack([*semantic, *acoustic]).split(num_frames, dim=1)]

    def _attended(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """The transformer over clips one behind the other, [N, D]; each attends to itself, as far back as the model's window."""
        place = torch.cat([torch.arange(length) for length in lengths])
        angles = self._transformer.rotary_emb(hidden[None], place[None])  # cos and sin, [1, N, D_head]
        masks = {length: self._mask(length) for length in lengths if length > self._window}
        for layer in self._transformer.layers:
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            queries, keys, values = (each(normed).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)[None] for each in projections)
            queries, keys = apply_rotary_pos_emb(queries, keys, *angles)
            clips = zip(lengths, queries.split(lengths, 2), keys.split(lengths, 2), values.split(lengths, 2), strict=True)
            heard = [
                F.scaled_dot_product_attention(query, key, value, masks.get(length), is_causal=length not in masks, enable_gqa=True)
                for length, query, key, value in clips
            ]
            hidden = hidden + layer.self_attn_layer_scale(attention.o_proj(torch.cat(heard, dim=2)[0].transpose(0, 1).flatten(1)))
            hidden = hidden + layer.mlp_layer_scale(layer.mlp(layer.post_attention_layernorm(hidden)))
        return hidden

    def _mask(self, length: int) -> Tensor:
        back = torch.arange(length)[:, None] - torch.arange(length)
        return (back >= 0) & (back < self._window)

    def _early_rows(self, clips: Sequence[Tensor]) -> Tensor:
        """[N, C], one clip's rows behind the other's: the layers up to the last but one rate, and an ELU.

        A clip is the work of one thread, or of as many as torch has: rows depend on nothing but the samples shortly before them.
        """
        if not self._early:
            return torch.cat(list(clips))[:, None]
        rows = torch.empty(sum(len(clip) for clip in clips) // self._early_stride, self._early[-1].num_outputs)
        spans, begin = [], 0
        for clip in clips:
            num_frames = len(clip) // SAMPLES_PER_FRAME
            step = -(-num_frames // torch.get_num_threads())
            for start in range(0, num_frames, step):
                stop = min(start + step, num_frames)
                end = begin + (stop - start) * SAMPLES_PER_FRAME // self._early_stride
                spans.append((clip, start, stop, rows[begin:end]))
                begin = end
        map_in_threads(lambda span: self._early_span(*span), spans)
        return rows

    def _early_span(self, clip: Tensor, start: int, stop: int, out: Tensor) -> None:
        """The rows of frames `start` to `stop`."""
        stream = _EarlyStream(self._early, min(PIECE_FRAMES, stop - start) * SAMPLES_PER_FRAME)
        for frame in range(max(0, start - self._context_frames), start):
            stream.push(clip[frame * SAMPLES_PER_FRAME : (frame + 1) * SAMPLES_PER_FRAME])
        pieces = clip[start * SAMPLES_PER_FRAME : stop * SAMPLES_PER_FRAME].split(PIECE_FRAMES * SAMPLES_PER_FRAME)
        for piece, rows in zip(pieces, out.split(PIECE_FRAMES * SAMPLES_PER_FRAME // self._early_stride), strict=True):
            stream.push(piece, rows)


class _EarlyStream:
    """Takes a clip through the early layers in pieces, in the same buffers.

    Args:
        max_samples: of a piece.
    """

    def __init__(self, layers: Sequence[_Layer], max_samples: int) -> None:
        self._layers: list[tuple[_Layer, Tensor, Tensor, Tensor]] = []
        num_rows = max_samples
        for layer in layers:
            first = layer.first
            padded = torch.zeros(first.context + num_rows, first.num_inputs)  # begins with the rows before the piece; zeros at first
            num_rows //= first.stride
            result = torch.empty(num_rows, first.num_outputs)
            self._layers.append((layer, padded, result, torch.empty_like(result)))

    def push(self, samples: Tensor, out: Tensor | None = None) -> Tensor:
        """The next piece, [S] -> [S / stride, C]."""
        hidden = samples[:, None]
        for layer, padded, result, active in self._layers:
            first, num_rows = layer.first, hidden.shape[0]
            here = padded[first.context : first.context + num_rows]
            if hidden.shape[1] == 1:
                here.copy_(hidden)
            else:
                _elu(hidden, out=here)
            branch = first.of_padded(padded[: first.context + num_rows], out=result[: num_rows // first.stride])
            padded[: first.context] = padded[num_rows : num_rows + first.context].clone()
            hidden = branch if layer.second is None else layer.second.added_to(hidden, _elu(branch, out=active[:num_rows]))
        return _elu(hidden, out)


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

    is_inference = torch.is_inference_mode_enabled()

    def alone(item: Item) -> Result:
        with torch.inference_mode(is_inference), torch.no_grad():  # which are a thread's own
            return work(item)

    torch.set_num_threads(1)  # what new threads begin with
    try:
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(alone, items))
    finally:
        torch.set_num_threads(num_threads)


@dataclass
class _Layer:
    """A convolution, or the two of a residual block; an ELU before each, but for the first of all."""

    first: _Convolution | _Strided
    second: _Convolution | None = None

    @classmethod
    def of(cls, layer: nn.Module, *, is_first: bool, is_last: bool) -> _Layer:
        scale_in, scale_out = 1.0 if is_first else LOG2_E, 1.0 if is_last else LOG2_E
        if isinstance(layer, MimiConv1d):
            return cls(_convolution(layer, scale_in=scale_in, scale_out=scale_out))
        if not isinstance(layer, MimiResnetBlock):
            raise ValueError(f"a {type(layer).__name__} is none of Mimi's encoder")
        first, *others = (_convolution(part, scale_in=LOG2_E, scale_out=LOG2_E) for part in layer.block if isinstance(part, MimiConv1d))
        if not isinstance(layer.shortcut, nn.Identity) or len(others) != 1 or not isinstance(others[0], _Convolution) or others[0].context:
            raise ValueError("a residual block of other than a convolution and one of a single tap is none of Mimi's encoder")
        return cls(first, others[0])

    @property
    def num_outputs(self) -> int:
        return (self.second or self.first).num_outputs

    def __call__(self, hidden: Tensor, lengths: list[int], *, is_active: bool) -> tuple[Tensor, list[int]]:
        """Rows of clips one behind the other, which it may change -> the same of its result.

        Args:
            is_active: the ELU has been.
        """
        if self.second is None:
            return self.first(hidden if is_active else _elu(hidden), lengths)
        branch, _ = self.first(_elu(hidden), lengths)
        return self.second.added_to(hidden, _elu(branch)), lengths


@dataclass
class _Convolution:
    """A causal convolution over rows of channels.

    Attributes:
        weight: [num_taps * C_in, C_out], the earliest tap first.
    """

    weight: Tensor
    bias: Tensor | None
    num_taps: int
    dilation: int
    stride = 1

    @property
    def context(self) -> int:
        """Rows before the first that it sees."""
        return (self.num_taps - 1) * self.dilation

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[0] // self.num_taps

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[1]

    def __call__(self, hidden: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """[N, C_in] of clips one behind the other -> [N, C_out]."""
        num_rows, width = hidden.shape
        columns = hidden.new_empty(num_rows, self.num_taps, width)
        starts = [0, *accumulate(lengths[:-1])]
        for tap in range(self.num_taps):
            back = (self.num_taps - 1 - tap) * self.dilation
            columns[back:, tap] = hidden[: max(0, num_rows - back)]
            for start, length in zip(starts, lengths, strict=True) if back else ():
                columns[start : start + min(back, length), tap] = 0
        return _product(columns.flatten(1), self.weight, self.bias), lengths

    def of_padded(self, padded: Tensor, out: Tensor) -> Tensor:
        """[context + N, C_in] of one clip, contiguous -> out [N, C_out].

        The windows of every so many outputs do not overlap: one behind the other they are what lies in memory.
        """
        if self.dilation > 1 or self.num_inputs == 1:
            windows = padded.unfold(0, self.context + 1, 1)[..., :: self.dilation]
            return _product(windows.transpose(1, 2).flatten(1), self.weight, self.bias, out)
        for way in range(self.num_taps):
            part = out[way :: self.num_taps]
            windows = padded[way : way + len(part) * self.num_taps].view(len(part), -1)
            _product(windows, self.weight, self.bias, part)
        return out

    def added_to(self, hidden: Tensor, branch: Tensor) -> Tensor:
        """`hidden` [N, C_out], changed: the convolution of `branch` [N, C_in], of one tap, is added."""
        hidden.addmm_(branch, self.weight)
        return hidden if self.bias is None else hidden.add_(self.bias)


@dataclass
class _Strided:
    """A causal convolution of twice as many taps as its stride: the sum of a product of each block of rows and of the block before it.

    Two outputs in a row, of three blocks x, y, z, are x.A + y.B and y.A + z.B. With y.(A + B) in both, the rest are (x - y).A and
    (z - y).B: three products for four.

    Attributes:
        earlier, later: A and B, [stride * C_in, C_out].
        both: their sum, or None for a product each: where the outputs of a clip may be odd in number, what is in a row would depend
            on the clips before it.
        is_replicating: what comes before a clip is its first row, not zeros.
    """

    earlier: Tensor
    later: Tensor
    both: Tensor | None
    bias: Tensor | None
    stride: int
    is_replicating: bool

    @property
    def context(self) -> int:
        return self.stride

    @property
    def num_inputs(self) -> int:
        return self.earlier.shape[0] // self.stride

    @property
    def num_outputs(self) -> int:
        return self.earlier.shape[1]

    def __call__(self, hidden: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """[N, C_in] of clips one behind the other -> [N / stride, C_out]."""
        blocks = hidden.view(-1, len(self.earlier))
        starts = torch.tensor([0, *accumulate(lengths[:-1])]) // self.stride
        before = blocks.roll(1, 0)
        before[starts] = blocks[starts, : hidden.shape[1]].repeat(1, self.stride) if self.is_replicating else 0.0
        result = self._of_blocks(before, blocks, blocks.new_empty(len(blocks), self.num_outputs))
        return result, [length // self.stride for length in lengths]

    def of_padded(self, padded: Tensor, out: Tensor) -> Tensor:
        """[stride + N, C_in] of one clip, contiguous -> out [N / stride, C_out]."""
        blocks = padded.view(-1, len(self.earlier))
        return self._of_blocks(blocks[:-1], blocks[1:], out)

    def _of_blocks(self, before: Tensor, blocks: Tensor, out: Tensor) -> Tensor:
        if self.both is None:
            return _product(blocks, self.later, self.bias, out).addmm_(before, self.earlier)
        change = blocks - before
        first, second = out[::2], out[1::2]
        _product(blocks[::2], self.both, self.bias, first)
        second.copy_(first[: len(second)])
        first.addmm_(change[::2], self.earlier, alpha=-1)
        second.addmm_(change[1::2], self.later)
        return out


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)


def _convolution(layer: MimiConv1d, *, scale_in: float = 1.0, scale_out: float = 1.0, is_even: bool = True) -> _Convolution | _Strided:
    """A layer's weights, for rows of channels.

    Args:
        scale_in, scale_out: how many times what they are in the model its input is, and its output is to be.
        is_even: whether every clip gives an even number of outputs.
    """
    conv = layer.conv
    num_taps, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    if conv.groups != 1 or (stride > 1 and (num_taps != 2 * stride or dilation > 1)):
        raise ValueError(f"a convolution of {num_taps} taps, stride {stride}, {conv.groups} groups is none of Mimi's encoder")
    weight = conv.weight.detach().permute(2, 1, 0).reshape(-1, conv.out_channels) * (scale_out / scale_in)
    bias = None if conv.bias is None else conv.bias.detach() * scale_out
    if stride == 1:
        return _Convolution(weight, bias, num_taps, dilation)
    earlier, later = weight.chunk(2)
    return _Strided(earlier, later, earlier + later if is_even else None, bias, stride, layer.pad_mode == "replicate")


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
        return cls(projection, tables, [table.square().sum(dim=1) / 2 for table in tables])

    def encode(self, hidden: Tensor, num_codebooks: int) -> list[Tensor]:
        """[N, D] -> codes [N] of each codebook."""
        left = hidden if self.projection is None else hidden @ self.projection
        codes, scores = [], hidden.new_empty(hidden.shape[0], self.tables[0].shape[0])
        for table, half_norm in zip(self.tables[:num_codebooks], self.half_norms, strict=False):
            codes.append(torch.mm(left, table.T, out=scores).sub_(half_norm).argmax(dim=1))
            left = left - table[codes[-1]]
        return codes


def _elu(hidden: Tensor, out: Tensor | None = None) -> Tensor:
    """log2(e) times the ELU of x, where `hidden` is log2(e) times x: exp(x) - 1 below zero. Off by one rounding of 1 at most."""
    out = torch.clamp(hidden, max=0, out=out).exp2_()
    torch.add(_MINUS_LOG2_E, out, alpha=LOG2_E, out=out)
    return torch.maximum(hidden, out, out=out)
