"""What a run will need, before it is started: parameters, FLOPs a frame, memory a GPU, hours of hardware.

Parameters and FLOPs are closed forms of the shapes, and the sharded states follow from them; activations are counted by
running our own training step on fake tensors (shapes only, nothing is allocated), so they follow the code as it changes.
Communication buffers, fragmentation and the CUDA context are not counted: leave a tenth of the card for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from csm.config import ModelConfig, PlanConfig, TransformerConfig
from csm.frames import FRAME_RATE_HZ
from csm.model.csm import CSM
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
        per_row = count_activations(config, activation_checkpointing=is_checkpointed)
        for strategy in STRATEGIES:
            states = state_bytes(parts.total, strategy, config.devices, config.precision)
            fits = max(0, int((config.memory_gib * GIB - sum(states[:3])) // per_row))
            memory.append(Memory(strategy, is_checkpointed, *states[:3], config.rows * per_row, states[3], fits))
    return Plan(parts, flops, memory, num_frames, device_hours, device_hours / config.devices, frames_per_s)


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


def count_activations(config: PlanConfig, *, activation_checkpointing: bool, rows: int = 1) -> float:
    """Peak bytes above weights and gradients during one step, counted on fake tensors; they grow with `rows`."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    # Every layer of a stack costs the same: two sizes give the slope, so that an 8B model is as quick as a small one.
    def peak(num_layers: int) -> float:
        model_config = replace(config.model, backbone=replace(config.model.backbone, num_layers=num_layers))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = CSM(model_config, dtype=torch.bfloat16 if config.precision == "bf16-true" else torch.float32)
            model.activation_checkpointing = activation_checkpointing
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            tracker = MemTracker()
            tracker.track_external(model)
            with tracker, torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16-mixed"):
                _step(model, rows, config.seq_len, config.amortization)
            total = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
        # Gradients are there from the start, as in every micro-batch of a step but the first.
        num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        return float(total - 2 * num_bytes)

    few, more = peak(2), peak(4)
    return few + (config.model.backbone.num_layers - 2) * (more - few) / 2


def _step(model: CSM, rows: int, seq_len: int, amortization: float) -> None:
    """The tensors of one training step: forward, both losses, backward."""
    columns = model.config.num_codebooks + 1
    tokens = torch.zeros(rows, seq_len, columns, dtype=torch.int64)
    mask = torch.ones(rows, seq_len, columns, dtype=torch.bool)
    num_picked = max(1, round(rows * seq_len * amortization))
    depth_index = torch.tensor([[0, 1]]).expand(num_picked, 2)
    out = model(tokens, mask, depth_index=depth_index)
    assert out.depth_logits is not None
    targets = tokens[..., 0].flatten(), depth_index.new_zeros(num_picked * (columns - 2))
    loss = cross_entropy(out.c0_logits.flatten(0, 1), targets[0]).sum()
    loss = loss + cross_entropy(out.depth_logits.transpose(0, 1).flatten(0, 1), targets[1], overwrite=True).sum()
    loss.backward()


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
