"""Mimi by moshi, its authors' own package, for the preparation environment, whose transformers is too old to encode with.

The same weights (kyutai/mimi as transformers stores it), the same digest, the same codes but where two entries are nearly as close
(tests/prep). It is for encoding: `stream` gives its samples at the end, for moshi's own streaming is not exact beyond ten seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import MimiConfig

from csm.codec.folder import check_digest, codec_digest, read_description, write_codec_folder
from csm.codec.interface import Codec, DecodeStream, check_codes, check_waveform
from csm.codec.mimi import CSM_NUM_CODEBOOKS, DEFAULT_SOURCE, SETTINGS, batches_by_length, folder_of
from csm.frames import num_frames_from_samples, num_samples_from_frames

_NAMES = (  # moshi's -> transformers' in a file; the order matters
    ("encoder.model.", "encoder.layers."),
    ("decoder.model.", "decoder.layers."),
    (".conv.conv.conv.", ".conv."),
    (".convtr.convtr.convtr.", ".conv."),
    (".conv.conv.", ".conv."),
    (".convtr.convtr.", ".conv."),
    ("_transformer.transformer.layers", "_transformer.layers"),
    ("self_attn.out_projs.0.", "self_attn.o_proj."),
    (".linear1.", ".mlp.fc1."),
    (".linear2.", ".mlp.fc2."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    ("layer_scale_1.", "self_attn_layer_scale."),
    ("layer_scale_2.", "mlp_layer_scale."),
    ("quantizer.rvq_first.", "quantizer.semantic_residual_vector_quantizer."),
    ("quantizer.rvq_rest.", "quantizer.acoustic_residual_vector_quantizer."),
    (".vq.layers.", ".layers."),
    ("._codebook._initialized", ".codebook.initialized"),
    ("._codebook.embedding_sum", ".codebook.embed_sum"),
    ("._codebook.", ".codebook."),
)
_IN_MEMORY = (  # how a file's names begin -> those of a model of transformers 5, by which a digest goes
    ("encoder.", "encoder.encoder_seanet."),
    ("encoder_transformer.", "encoder.encoder_transformer."),
    ("downsample.", "encoder.downsample."),
    ("decoder.", "decoder.decoder_seanet."),
    ("decoder_transformer.", "decoder.decoder_transformer."),
    ("upsample.", "decoder.upsample."),
)


def names_of_transformers(key: str) -> list[str]:
    """Where transformers' files keep a tensor of moshi's; three places for the joined projections of attention."""
    for theirs, ours in _NAMES:
        key = key.replace(theirs, ours)
    return [key.replace("in_projs.0.", f"{name}_proj.") for name in "qkv"] if "in_projs.0." in key else [key]


class MoshiMimiCodec(Codec):
    """Mimi of kyutai/mimi's shape in float32, run by moshi.

    Args:
        weights: as in transformers' model.safetensors.
        config: as in its config.json.
        source: hub id or folder that they are of.
    Raises:
        ImportError: if moshi is not installed.
        ValueError: if the weights are not of kyutai/mimi's shape, or have fewer codebooks.
    """

    name = "mimi"

    def __init__(self, weights: Mapping[str, Tensor], config: MimiConfig, num_codebooks: int | None, source: str) -> None:
        try:
            from moshi.models.loaders import get_mimi
        except ImportError as error:
            how = "run `make prep-env` and use .venv-prep/bin/python, or leave encode.codec_backend=transformers"
            raise ImportError(f"encode.codec_backend=moshi: {error}; {how}") from error
        self.num_codebooks = min(CSM_NUM_CODEBOOKS, config.num_quantizers) if num_codebooks is None else num_codebooks
        if not 2 <= self.num_codebooks <= config.num_quantizers:
            raise ValueError(f"num_codebooks={num_codebooks}: this Mimi by moshi has 2 to {config.num_quantizers} codebooks")
        self._model = get_mimi(None, num_codebooks=config.num_quantizers)
        state = self._model.state_dict()
        for key, tensor in state.items():
            parts = []
            for name in names_of_transformers(key):
                if name not in weights:
                    raise ValueError(f"{source}: no tensor {name}; expected kyutai/mimi as transformers stores it")
                part = weights[name].float()
                if name.endswith(("q_proj.weight", "k_proj.weight")):  # moshi turns neighbouring lanes, transformers halves
                    part = part.view(config.num_attention_heads, 2, -1, part.shape[1]).transpose(1, 2).reshape(part.shape)
                parts.append(part)
            joined = torch.cat(parts) if len(parts) > 1 else parts[0]
            if joined.shape != tensor.shape:
                raise ValueError(
                    f"{source}: {key} is {tuple(joined.shape)}, moshi's Mimi has {tuple(tensor.shape)}; "
                    "it runs kyutai/mimi's shape only, use encode.codec_backend=transformers"
                )
            state[key] = joined
        self._model.load_state_dict(state)
        self._model.set_num_codebooks(self.num_codebooks)
        self._model.eval().requires_grad_(False)
        self.vocab_size, self.source = config.codebook_size, source
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta, "rope_type": "default"}
        settings = {name: rope if name == "rope_parameters" else getattr(config, name) for name in SETTINGS}
        self.digest = codec_digest({_in_memory(name): weights[name] for name in weights}, {**settings, "num_codebooks": self.num_codebooks})

    @classmethod
    def load(
        cls, source: str | Path = DEFAULT_SOURCE, *, device: torch.device | str = "cpu", num_codebooks: int | None = None
    ) -> MoshiMimiCodec:
        """Load from a folder with config.json and safetensors, or from the hub (its local cache first).

        Raises:
            FileNotFoundError, ImportError, ValueError: as the constructor, and if there is nothing at `source`.
        """
        folder, source = folder_of(source)
        weights: dict[str, Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
        return cls(weights, MimiConfig.from_pretrained(folder, local_files_only=True), num_codebooks, source).to(device)

    @classmethod
    def load_saved(cls, folder: Path, device: torch.device | str = "cpu") -> MoshiMimiCodec:
        """Load what a codec folder names, and refuse weights other than those it was written with."""
        description = read_description(folder)
        source, num_codebooks = description.get("source"), description.get("num_codebooks")
        if not isinstance(source, str) or not isinstance(num_codebooks, int):
            raise ValueError(f"{folder}: codec.json names no source of Mimi's weights; use encode.codec_backend=transformers")
        codec = cls.load(source, num_codebooks=num_codebooks)
        check_digest(folder, codec.digest, description)
        return codec.to(device)

    def save(self, folder: Path) -> None:
        """Write codec.json, as `MimiCodec` does."""
        described = ("name", "num_codebooks", "vocab_size", "digest", "source")
        write_codec_folder(Path(folder), {key: getattr(self, key) for key in described}, None)

    def to(self, device: torch.device | str) -> MoshiMimiCodec:
        self._model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self._model.parameters()).device

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        for waveform in waveforms:
            check_waveform(waveform)
        lengths = [num_frames_from_samples(waveform.shape[0]) for waveform in waveforms]
        results: dict[int, Tensor] = {}
        for batch in batches_by_length(lengths):
            num_samples = num_samples_from_frames(max(lengths[index] for index in batch))
            clips = [waveforms[index].to(self.device, torch.float32) for index in batch]
            padded = torch.stack([F.pad(clip, (0, num_samples - clip.shape[0])) for clip in clips])
            codes = self._model.encode(padded[:, None])  # [b, K, F]
            for row, index in enumerate(batch):
                results[index] = self._without_zero_frames(codes[row, :, : lengths[index]].contiguous())
        return [results[index] for index in range(len(waveforms))]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.num_codebooks, self.vocab_size)
        return self._model.decode(codes[None].to(self.device, torch.int64))[0, 0]

    def stream(self) -> DecodeStream:
        return _Whole(self)

    def _without_zero_frames(self, codes: Tensor) -> Tensor:
        """As `MimiCodec`: a frame of zeros would read as EOS."""
        is_zero = (codes == 0).all(dim=0)
        if bool(is_zero.any()):
            table = self._model.quantizer.rvq_rest.vq.layers[self.num_codebooks - 2]._codebook.embedding
            codes[-1, is_zero] = 1 + (table[1:] - table[0]).square().sum(dim=1).argmin()
        return codes


class _Whole(DecodeStream):
    """Keeps what is pushed, and decodes it at the end."""

    def __init__(self, codec: MoshiMimiCodec) -> None:
        self._codec = codec
        self._parts: list[Tensor] | None = []

    def push(self, codes: Tensor) -> Tensor:
        if self._parts is None:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        check_codes(codes, self._codec.num_codebooks, self._codec.vocab_size)
        self._parts.append(codes)
        return torch.zeros(0, device=self._codec.device)

    def finish(self) -> Tensor:
        if self._parts is None:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        parts, self._parts = self._parts, None
        return self._codec.decode(torch.cat(parts, dim=1)) if parts else torch.zeros(0, device=self._codec.device)


def _in_memory(name: str) -> str:
    for theirs, ours in _IN_MEMORY:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name
