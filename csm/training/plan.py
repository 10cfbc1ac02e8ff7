"""What a run will need, before it is started: parameters, FLOPs a frame, memory a GPU, hours of hardware.

Parameters and FLOPs are closed forms of the shapes, and the sharded states follow from them; activations are counted by
running our own training step on fake tensors (shapes only, nothing is allocated), so they follow the code as it changes.
Communication buffers, fragmentation and the CUDA context are not counted: leave a tenth of the card for them.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from csm.config import ModelConfig, PlanConfig, TransformerConfig
from csm.frames import FRAME_RATE_HZ
from csm.model.csm import CSM
from csm.model.depth_nats import DepthTargets, nats_by_codebook
from csm.model.functions import cross_entropy

GIB = 2**30
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload")


@dataclass
class Parameters:
    """Parameters by part."""

    backbone: int
    depth_decoder: int
    text_embeddings: int
    audio_embeddings: int
    codebook0_head: int
    depth_heads: int
    projection: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass
class Flops:
    """Floating-point operations of one training frame (forward and backward), without recomputation.

    Attributes:
        backbone: of one position, codebook 0's head and the attention over half a row of `seq_len` included.
        depth: of one picked frame, its K positions and heads.
        per_frame: with the planned amortization.
        per_frame_full: with the depth decoder on every frame.
    """

    backbone: float
    depth: float
    per_frame: float
    per_frame_full: float


@dataclass
class Memory:
    """Bytes a device, for one strategy.

    Attributes:
        weights, gradients, optimizer: this device's part; `optimizer` holds the float32 copy where the precision keeps one.
        activations: of one micro-batch, logits and temporary buffers included.
        host: bytes a device keeps in the host's memory instead.
        rows_that_fit: rows of `seq_len` that fit into the memory given, activations growing with the row count; 0: none.
    """

    strategy: str
    activation_checkpointing: bool
    weights: float
    gradients: float
    optimizer: float
    activations: float
    host: float
    rows_that_fit: int

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass
class Plan:
    parameters: Parameters
    flops: Flops
    memory: list[Memory]
    num_frames: float  # of all epochs
    device_hours: float
    wall_hours: float
    frames_per_s: float  # of one device


def count_parameters(model: ModelConfig) -> Parameters:
    """Parameters of each part, from the shapes alone."""
    width, depth_width = model.backbone.width, model.depth_decoder.width
    num_codebooks, vocab = model.num_codebooks, model.audio_vocab_size
    return Parameters(
        backbone=_transformer_parameters(model.backbone),
        depth_decoder=_transformer_parameters(model.depth_decoder),
        text_embeddings=model.text_vocab_size * width,
        audio_embeddings=num_codebooks * vocab * width,
        codebook0_head=vocab * width,
        depth_heads=(num_codebooks - 1) * depth_width * vocab,
        projection=width * depth_width,
    )


def count_flops(model: ModelConfig, seq_len: int, amortization: float) -> Flops:
    """Six operations a weight and position (two forward, four backward), and causal attention's products.

    Source of the rule: Kaplan et al. 2020, appendix B; embeddings are look-ups and count nothing.
    """
    parts = count_parameters(model)
    backbone = 6.0 * (parts.backbone + parts.codebook0_head) + _attention_flops(model.backbone, seq_len)
    per_position = parts.depth_decoder + parts.projection
    num_positions = model.num_codebooks
    depth = 6.0 * (per_position * num_positions + parts.depth_heads)
    depth += _attention_flops(model.depth_decoder, num_positions) * num_positions
    return Flops(backbone, depth, backbone + amortization * depth, backbone + depth)


def make_plan(config: PlanConfig) -> Plan:
    """The whole plan of a run."""
    parts = count_parameters(config.model)
    flops = count_flops(config.model, config.seq_len, config.amortization)
    num_frames = config.hours * 3600 * FRAME_RATE_HZ * config.epochs
    frames_per_s = config.mfu * config.peak_tflops * 1e12 / flops.per_frame
    device_hours = num_frames / frames_per_s / 3600
    memory = []
    for is_checkpointed in (False, True):
        whole = _activations_of_rows(config, is_checkpointed, None)
        in_groups = _activations_of_rows(config, is_checkpointed, config.depth_frames_at_once)
        for strategy in STRATEGIES:
            first, further = whole if strategy.startswith("zero3") else in_groups
            states = state_bytes(parts.total, strategy, config.devices, config.precision)
            room = config.memory_gib * GIB - sum(states[:3]) - first
            fits = 1 + int(room // further) if room >= 0 else 0
            activations = first + (config.rows - 1) * further
            memory.append(Memory(strategy, is_checkpointed, *states[:3], activations, states[3], fits))
    return Plan(parts, flops, memory, num_frames, device_hours, device_hours / config.devices, frames_per_s)


def _activations_of_rows(config: PlanConfig, is_checkpointed: bool, depth_frames_at_once: int | None) -> tuple[float, float]:
    """Of the first row of a micro-batch, and of each further one: where groups are full, those need no more depth decoder."""
    one, two = (
        count_activations(replace(config, rows=rows), activation_checkpointing=is_checkpointed, depth_frames_at_once=depth_frames_at_once)
        for rows in (1, 2)
    )
    return one, two - one


def state_bytes(num_parameters: int, strategy: str, devices: int, precision: str) -> tuple[float, float, float, float]:
    """Weights, gradients and optimizer state a device, and what moves to the host, in bytes.

    bf16-mixed is the sharded engines' way: bfloat16 weights and gradients, and 12 bytes a parameter of float32 copy and
    AdamW moments. 32 keeps float32 of all; bf16-true keeps bfloat16 of all, moments included.
    """
    weight, gradient, state = {"bf16-mixed": (2, 2, 12), "32": (4, 4, 8), "bf16-true": (2, 2, 4)}[precision]
    level = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}[strategy]
    shares = [1 / devices if level >= needed else 1.0 for needed in (3, 2, 1)]
    weights, gradients, optimizer = (num_parameters * size * share for size, share in zip((weight, gradient, state), shares, strict=True))
    if strategy == "zero3_offload":
        return weights, gradients, 0.0, optimizer
    return weights, gradients, optimizer, 0.0


def count_activations(config: PlanConfig, *, activation_checkpointing: bool, depth_frames_at_once: int | None) -> float:
    """Peak bytes above weights and gradients during one step of `config.rows`, counted on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Every layer of a stack costs the same: two sizes give the slope, so that an 8B model is as quick as a small one.
    def peak(num_layers: int) -> int:
        model_config = replace(config.model, backbone=replace(config.model.backbone, num_layers=num_layers))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = CSM(model_config, dtype=torch.bfloat16 if config.precision == "bf16-true" else torch.float32)
            model.activation_checkpointing = activation_checkpointing
            for parameter in model.parameters():  # as in every micro-batch of a step but the first
                parameter.grad = torch.zeros_like(parameter)
            with _LiveBytes() as live, torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed"):
                _step(model, config.rows, config.seq_len, config.amortization, depth_frames_at_once)
        return live.peak

    few, more = peak(2), peak(4)
    return few + (config.model.backbone.num_layers - 2) * (more - few) / 2


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside while they live. torch's own MemTracker knows no module called twice.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._storages = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in known:
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._storages:
            return
        num_bytes = storage.nbytes()
        self._storages[storage] = True
        self._now += num_bytes
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, num_bytes)

    def _forget(self, num_bytes: int) -> None:
        self._now -= num_bytes


def _step(model: CSM, rows: int, seq_len: int, amortization: float, depth_frames_at_once: int | None) -> None:
    """The tensors of one training step: forward, both losses, backward."""
    columns = model.config.num_codebooks + 1
    tokens = torch.zeros(rows, seq_len, columns, dtype=torch.int64)
    mask = torch.ones(rows, seq_len, columns, dtype=torch.bool)
    num_picked = max(1, round(rows * seq_len * amortization))
    depth_index = torch.tensor([[0, 1]]).expand(num_picked, 2)
    codes = depth_index.new_zeros(num_picked, columns - 2)
    if depth_frames_at_once is None:
        out = model(tokens, mask, depth_index=depth_index)
        depth = nats_by_codebook(out.depth_logits.transpose(0, 1), codes).sum()
    else:
        targets = DepthTargets(codes, torch.ones(columns - 2), depth_frames_at_once)
        out = model(tokens, mask, depth_index=depth_index, depth_targets=targets)
        depth = out.depth_nats.total
    (cross_entropy(out.c0_logits.flatten(0, 1), tokens[..., 0].flatten(), overwrite=True).sum() + depth).backward()


def _transformer_parameters(config: TransformerConfig) -> int:
    attention = 2 * config.width * config.width + 2 * config.width * config.num_kv_heads * config.head_dim
    layer = attention + 3 * config.width * config.ffn_width + 2 * config.width
    return config.num_layers * layer + config.width


def _attention_flops(config: TransformerConfig, length: int) -> float:
    """Scores and weighted sum of one position over half a causal row, forward and backward."""
    return 3.0 * 2.0 * 2.0 * config.num_layers * config.width * length / 2


def meta_parameters(config: ModelConfig) -> int:
    """Parameters of the real model on the meta device; the closed form must agree with it."""
    with torch.device("meta"):
        model: nn.Module = CSM(config)
    return sum(p.numel() for p in model.parameters())
