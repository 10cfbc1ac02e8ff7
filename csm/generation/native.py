"""The frame loop as machine code, for CPUs: `frame_loop.cpp` compiled once with the system's C++ compiler, called by ctypes.

At batch 1 a frame reads the depth decoder's weights 31 times, so its speed is that of memory, and PyTorch's thousands of small
calls, temporaries and (in bfloat16) slow one-row products come on top. This loop reads what has to be read. Weights stay
float32, or are bfloat16, or int8 with a scale for each output (depth decoder and heads; the backbone is then bfloat16).

For one row of float32 the depth decoder may guess first: speculative decoding (Leviathan et al., 2023, arXiv:2211.17192) with
an int16 copy of itself as the draft, and with the same noise for guess and check, so that frames are bit for bit those of the
float32 weights.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.generation.sampling import Sampler
from csm.model.csm import CSM
from csm.model.transformer import KVCache, Transformer, rope_frequencies

PANEL = 32
_CHUNK_BYTES = 64 * 2**20
_WEIGHTS_OF_A_THREAD = 2**18  # of a layer, to be worth its waiting for the others five times: the demo's have fewer
KINDS = {"float32": 0, "bfloat16": 1, "int8": 2}
_INT16 = 3
_WORTH_GUESSING = 2**19  # weights of the depth decoder's layers that no core's own cache holds (2 MiB): the demo's are fewer
_SOURCE = Path(__file__).with_name("frame_loop.cpp")
_FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-shared", "-fPIC", "-pthread", "-Wno-psabi")


class _Linear(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "kind")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [(name, _Linear) for name in ("qkv", "output", "gate_up", "down")]


class _Stack(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "last_scale")),
        *((name, ctypes.c_int64) for name in ("num_layers", "width", "num_heads", "num_kv_heads", "head_dim", "use_tiles")),
        ("eps", ctypes.c_float),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *((name, ctypes.c_int64) for name in ("is_bfloat16", "batch_size", "max_len")),
    ]


class _Depth(ctypes.Structure):
    _fields_ = [
        ("stack", _Stack),
        ("heads", ctypes.POINTER(_Linear)),
        ("projection", _Linear),
        ("tables", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("tables_are_bfloat16", "num_codebooks", "vocab_size")),
    ]


class NativeLoop:
    """A model's backbone step and frame, packed for `frame_loop.cpp`.

    Args:
        model: on the CPU, float32 or bfloat16; its dtype is that of the prompt's pass and of the backbone's cache.
        weights: "float32", "bfloat16" or "int8"; None is the model's dtype. int8 is of the depth decoder and the heads: one
            scale an output, the backbone in bfloat16.
        use_tiles: whether AMX may be used where the machine has it.
        num_threads: None is torch's number, up to what the depth decoder's layers are worth.
        guesses: whether the frame of a single row is guessed by an int16 copy of the depth decoder, which takes half its memory
            again, and then checked in float32: the same codes, sooner. None: with float32 weights too large for a core's cache.

    Attributes:
        guesses: whether it does.
        num_checks: passes of float32 over guessed frames so far; one a frame where no guess was wrong.
    Raises:
        ValueError: if the model is elsewhere, or the loop cannot be compiled here.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: CSM,
        weights: str | None = None,
        *,
        use_tiles: bool = True,
        num_threads: int | None = None,
        guesses: bool | None = None,
    ) -> None:
        if model.projection.weight.device.type != "cpu":
            raise ValueError(f"the compiled frame loop is for the CPU, the model is on {model.projection.weight.device}")
        config = self._config = model.config
        self.weights = str(model.projection.weight.dtype).removeprefix("torch.") if weights is None else weights
        if self.weights not in KINDS:
            raise ValueError(f"weights={self.weights!r}: expected one of {', '.join(KINDS)}")
        self.num_codebooks, self.vocab_size = config.num_codebooks, config.audio_vocab_size
        self.dtype, self.device = model.projection.weight.dtype, model.projection.weight.device
        self._fixed_num_threads = num_threads
        self._library = compiled_loop()
        self.has_tiles = use_tiles and bool(self._library.csm_has_tiles())
        self._kept: list[Any] = []  # what the structures point into
        self._chunk, self._free = torch.zeros(0, dtype=torch.uint8), 0
        kind = self.weights
        self._backbone = self._stack(
            model.backbone, config.max_seq_len, KINDS["bfloat16" if kind == "int8" else kind], with_last_scale=True
        )
        self._depth = self._depth_decoder(model, KINDS[kind])
        self.guesses = self._shall_guess(guesses)
        self._guess = self._depth_decoder(model, _INT16, shared=self._depth) if self.guesses else None
        self._depth_cache, self._guess_cache = _Cache(), _Cache()
        self._depth_kept: list[Tensor] = []
        self.num_checks = 0

    def step(self, embeds: Tensor, cache: KVCache) -> Tensor:
        """The backbone's state after one more position a row: embeds [B, D] -> hidden [B, D], both in the model's dtype."""
        start = cache.length
        if start + 1 > cache.max_len:
            raise ValueError(f"{start} positions cached and one more do not fit a cache of {cache.max_len}; make it longer")
        starts = None
        if cache.is_ragged:  # rows padded on the left: position `next_positions` of a row is the cache's `length`
            starts = (start - cache.next_positions).contiguous()
            cache.document_ids[:, start] = cache.document_ids[:, start - 1]
            cache.next_positions += 1
        described = _Cache(
            cache.keys.data_ptr(), cache.values.data_ptr(), int(cache.keys.dtype == torch.bfloat16), len(embeds), cache.max_len
        )
        narrow = embeds.float().contiguous()
        hidden = torch.empty_like(narrow)
        self._library.csm_backbone_step(
            ctypes.byref(self._backbone),
            ctypes.byref(described),
            narrow.data_ptr(),
            hidden.data_ptr(),
            start,
            None if starts is None else starts.data_ptr(),
            self._num_threads(),
        )
        cache.length += 1
        return hidden.to(embeds.dtype)

    def frame(self, hidden: Tensor, sampler: Sampler, frame_index: int, *, logits: Tensor | None = None) -> Tensor:
        """Draw a frame: hidden [B, D] -> codes int64 [B, K].

        Args:
            logits: float32 [B, K, V], filled with what the codes were drawn from; None: not kept.
        """
        batch_size = hidden.shape[0]
        if batch_size != self._depth_cache.batch_size:
            self._depth_kept = []
            self._depth_cache, self._guess_cache = self._empty_cache(batch_size), self._empty_cache(batch_size)
        guess = self._guess if batch_size == 1 else None
        wide = F.pad(hidden.float(), (0, self._depth.projection.inputs - hidden.shape[1])).contiguous()
        noise = sampler.noise_of_frame(frame_index)
        codes = torch.empty(batch_size, self.num_codebooks, dtype=torch.int64)
        self.num_checks += self._library.csm_frame(
            ctypes.byref(self._depth),
            ctypes.byref(self._depth_cache),
            None if guess is None else ctypes.byref(guess),
            ctypes.byref(self._guess_cache),
            wide.data_ptr(),
            None if noise is None else noise.data_ptr(),
            sampler.temperature,
            sampler.top_k,
            int(sampler.forbids_eos(frame_index)),
            codes.data_ptr(),
            None if logits is None else logits.data_ptr(),
            self._num_threads(),
        )
        return codes

    def _num_threads(self) -> int:
        if self._fixed_num_threads is not None:
            return self._fixed_num_threads
        return max(1, min(torch.get_num_threads(), self._weights_of_a_layer() // _WEIGHTS_OF_A_THREAD))

    def _weights_of_a_layer(self) -> int:
        config = self._config.depth_decoder
        return config.width * (2 * config.width + 2 * config.num_kv_heads * config.head_dim + 3 * config.ffn_width)

    def _shall_guess(self, asked: bool | None) -> bool:
        if asked and self.weights != "float32":
            raise ValueError(f"guesses=True is for float32 weights, these are {self.weights}; leave it out")
        num_weights = self._config.depth_decoder.num_layers * self._weights_of_a_layer()
        return self.weights == "float32" and (num_weights > _WORTH_GUESSING if asked is None else asked)

    def _empty_cache(self, batch_size: int) -> _Cache:
        config = self._config.depth_decoder
        size = (batch_size, config.num_kv_heads, self.num_codebooks, config.head_dim)
        keys, values = (torch.zeros(config.num_layers, *size) for _ in range(2))
        self._depth_kept += [keys, values]
        return _Cache(keys.data_ptr(), values.data_ptr(), 0, batch_size, self.num_codebooks)

    def _keep(self, thing: Any) -> Any:
        self._kept.append(thing)
        return thing

    def _place(self, tensor: Tensor) -> int:
        """Copy into memory of large pages, which halves the misses of a loop that streams weights; returns the address."""
        tensor = tensor.contiguous()
        size = -(-tensor.nbytes // 64) * 64
        if self._free + size > self._chunk.numel():
            memory = mmap.mmap(-1, max(_CHUNK_BYTES, size))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
            self._chunk, self._free = self._keep(torch.frombuffer(memory, dtype=torch.uint8)), 0
        place = self._chunk[self._free : self._free + tensor.nbytes]
        place.copy_(tensor.view(-1).view(torch.uint8))
        self._free += size
        return place.data_ptr()

    def _depth_decoder(self, model: CSM, kind: int, *, shared: _Depth | None = None) -> _Depth:
        """The depth decoder and all heads in one kind of weights; what a frame reads once is taken from `shared`."""
        depth_scale = model.decoder.norm.scale.float()
        first_head = shared.heads[0] if shared else self._linear(model.codebook0_head.weight.float(), kind)
        heads = [first_head, *(self._linear((head.float() * depth_scale[:, None]).T, kind) for head in model.audio_head)]
        stack = self._stack(model.decoder, self.num_codebooks, kind, with_last_scale=False)
        if shared:
            projection, tables, are_narrow = shared.projection, shared.tables, shared.tables_are_bfloat16
        else:
            table = F.linear(model.audio_embeddings.weight.float(), model.projection.weight.float())
            are_narrow = kind != KINDS["float32"]
            projection = self._linear(model.projection.weight.float(), kind)
            tables = self._place(table.bfloat16() if are_narrow else table)
        kept = self._keep((_Linear * len(heads))(*heads))
        return _Depth(stack, kept, projection, tables, int(are_narrow), self.num_codebooks, self.vocab_size)

    def _stack(self, transformer: Transformer, max_positions: int, kind: int, *, with_last_scale: bool) -> _Stack:
        config = transformer.config
        layers = []
        for layer in transformer.layers:
            attention, mlp = layer.attn, layer.mlp
            qkv = torch.cat([part.weight.float() for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
            gate, up = (_padded(part.weight.float() * layer.mlp_norm.scale.float(), 16, 1) for part in (mlp.w1, mlp.w3))
            # A panel of 32 outputs is 16 gates and their 16 ups, so that SwiGLU needs no second pass.
            gate_up = torch.stack((gate.unflatten(0, (-1, 16)), up.unflatten(0, (-1, 16))), dim=1).flatten(0, 2)
            matrices = (qkv * layer.sa_norm.scale.float(), attention.output_proj.weight.float(), gate_up, mlp.w2.weight.float())
            layers.append(_Layer(*(self._linear(matrix, kind) for matrix in matrices)))
        angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * rope_frequencies(config)
        cos, sin = self._keep(angles.cos()), self._keep(angles.sin())
        scale = self._keep(transformer.norm.scale.detach().float().contiguous()) if with_last_scale else None
        return _Stack(
            self._keep((_Layer * len(layers))(*layers)),
            cos.data_ptr(),
            sin.data_ptr(),
            None if scale is None else scale.data_ptr(),
            config.num_layers,
            config.width,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            int(self.has_tiles),
            config.norm_eps,
        )

    def _linear(self, weight: Tensor, kind: int) -> _Linear:
        """Pack a weight [out, in]; see `Linear` in frame_loop.cpp for the layouts."""
        weight = _padded(weight.detach(), PANEL, 2 * PANEL if kind == KINDS["int8"] else PANEL)
        num_outputs, num_inputs = weight.shape
        scale = None
        if kind == KINDS["float32"]:
            packed = _in_panels(weight)
        elif kind == KINDS["bfloat16"]:  # [panel, half, output, block, pair, 2] -> [panel, block, half, pair, output, 2]
            packed = weight.bfloat16().view(-1, 2, 16, num_inputs // 32, 16, 2).permute(0, 3, 1, 4, 2, 5)
        else:
            highest = 32767 if kind == _INT16 else 127
            scale = self._keep((weight.abs().amax(dim=1) / highest).clamp(min=1e-20))
            whole = (weight / scale[:, None]).round()
            if kind == _INT16:
                packed = _in_panels(whole.to(torch.int16))
            else:
                packed = whole.to(torch.int8).view(-1, 2, 16, num_inputs // 64, 16, 4).permute(0, 3, 1, 4, 2, 5)
        return _Linear(self._place(packed), None if scale is None else scale.data_ptr(), num_inputs, num_outputs, kind)


def _in_panels(weight: Tensor) -> Tensor:
    return weight.view(-1, PANEL, weight.shape[1]).transpose(1, 2)


def _padded(weight: Tensor, outputs: int, inputs: int) -> Tensor:
    """Zero rows and columns up to multiples."""
    return F.pad(weight, (0, -weight.shape[1] % inputs, 0, -weight.shape[0] % outputs))


@cache
def compiled_loop() -> ctypes.CDLL:
    """The compiled `frame_loop.cpp`, built on first use (2 s) and kept in the user's cache folder for this CPU and source.

    Raises:
        ValueError: if there is no C++ compiler, or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ValueError("compile=True needs a C++ compiler (g++ or clang++) on the path; install one, or leave compile off")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm-lab"
    target = folder / f"frame_loop-{_build_key(compiler)}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            part = Path(scratch) / "frame_loop.so"
            done = subprocess.run([compiler, *_FLAGS, str(_SOURCE), "-o", str(part)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f"{compiler} could not compile {_SOURCE.name}; leave compile off, or set CXX: {done.stderr[:500]}")
            os.replace(part, target)
    library = ctypes.CDLL(str(target))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.csm_has_tiles.argtypes, library.csm_has_tiles.restype = [], ctypes.c_int
    library.csm_backbone_step.argtypes = [pointer, pointer, pointer, pointer, number, pointer, ctypes.c_int]
    library.csm_backbone_step.restype = None
    models = [pointer, pointer, pointer, pointer]
    library.csm_frame.argtypes = models + [pointer, pointer, ctypes.c_float, number, ctypes.c_int, pointer, pointer, ctypes.c_int]
    library.csm_frame.restype = ctypes.c_int
    return library


def _build_key(compiler: str) -> str:
    """What the machine code depends on: source, flags, compiler, and the instructions of this CPU."""
    flags = ""
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        flags = next((line for line in cpuinfo.read_text(encoding="utf-8").splitlines() if line.startswith(("flags", "Features"))), "")
    parts: Sequence[str] = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, compiler, platform.machine(), platform.processor(), flags)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
