"""Mimi, CSM's neural codec, over transformers' MimiModel: batched encoding, and decoding that keeps its state between frames.

transformers decodes whole clips only. Here every convolution of the decoder keeps its left context, every transposed
convolution the samples that reach ahead, and the decoder transformer its keys and values, so a frame costs the same however
long the clip is. `decode` runs the same steps, so it and a stream agree bit for bit; they agree with
`MimiModel.decode` to float32 rounding (tests/test_codec_mimi.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, MimiConfig, MimiModel
from transformers.models.mimi.modeling_mimi import MimiConv1d, MimiConvTranspose1d, MimiResnetBlock

from csm.codec.folder import check_digest, codec_digest, read_description, read_weights, write_codec_folder
from csm.codec.interface import Codec, DecodeStream, check_codes, check_waveform
from csm.codec.mimi_encoder import PackedEncoder, balanced_packs, map_in_threads
from csm.frames import num_frames_from_samples, num_samples_from_frames

DEFAULT_SOURCE = "kyutai/mimi"
CSM_NUM_CODEBOOKS = 32
MAX_BATCH_FRAMES = 750  # 60 s in one forward pass on a GPU: memory grows with length (9.9 GB at 300 s, measured)
MAX_PACKED_FRAMES = 250  # 20 s at once on a CPU: more gains nothing, and attention over a pack grows with its square
HUB_TIMEOUT_S = 5
SETTINGS = (  # of MimiConfig, with the tensors, what codes depend on
    "sampling_rate", "frame_rate", "upsampling_ratios", "kernel_size", "residual_kernel_size", "dilation_growth_rate",
    "pad_mode", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "norm_eps", "sliding_window",
    "rope_parameters", "num_semantic_quantizers",
)  # fmt: skip


class MimiCodec(Codec):
    """Mimi in float32.

    Args:
        model: a MimiModel, or a MimiConfig for random weights.
        num_codebooks: K, the first that many of the model's; None takes CSM's 32, or all where there are fewer.
        source: hub id or folder the weights can be had from again; None makes `save` write them.
    Raises:
        ValueError: if the model has fewer codebooks, or is not a causal 24 kHz, 12.5 Hz, mono Mimi.
    """

    name = "mimi"

    def __init__(self, model: MimiModel | MimiConfig, num_codebooks: int | None = None, source: str | None = None) -> None:
        self.model = (MimiModel(model) if isinstance(model, MimiConfig) else model).float().eval().requires_grad_(False)
        config = self.model.config
        if not hasattr(config, "rope_parameters"):
            raise ValueError(
                "Mimi needs transformers 5: before it, attention had no window, which gives other codes from 10 s on; in the preparation "
                "environment encode by moshi (encode.codec_backend=moshi), or leave stages=[encode,merge] to .venv"
            )
        if config.sampling_rate != self.sample_rate_hz or config.frame_rate != self.frame_rate_hz or config.audio_channels != 1:
            raise ValueError(
                f"this Mimi has {config.sampling_rate} Hz, {config.frame_rate} frames/s, {config.audio_channels} channels; "
                f"expected {self.sample_rate_hz} Hz, {self.frame_rate_hz} frames/s, mono"
            )
        if not config.use_causal_conv or config.pad_mode != "constant" or config.trim_right_ratio != 1.0:
            raise ValueError(
                "this Mimi is not causal with zero padding, so it cannot be decoded as a stream; use kyutai/mimi's configuration"
            )
        self.num_codebooks = min(CSM_NUM_CODEBOOKS, config.num_quantizers) if num_codebooks is None else num_codebooks
        if not config.num_semantic_quantizers <= self.num_codebooks <= config.num_quantizers:
            raise ValueError(
                f"num_codebooks={num_codebooks}: this Mimi has {config.num_semantic_quantizers} to {config.num_quantizers} codebooks"
            )
        self.vocab_size = config.codebook_size
        self.source = source
        self._packed_encoder: PackedEncoder | None = None  # made when something is encoded on a CPU
        settings = {name: getattr(config, name) for name in SETTINGS}
        self.digest = codec_digest(self.model.state_dict(), {**settings, "num_codebooks": self.num_codebooks})

    @classmethod
    def load(
        cls, source: str | Path = DEFAULT_SOURCE, *, device: torch.device | str = "cpu", num_codebooks: int | None = None
    ) -> MimiCodec:
        """Load from a folder with config.json and safetensors, or from the hub (its local cache first).

        Raises:
            FileNotFoundError: if there is no such folder, or the hub cannot be reached and its cache has no such model.
        """
        folder, source = folder_of(source)
        model = MimiModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
        return cls(model, num_codebooks, source).to(device)

    @classmethod
    def load_saved(cls, folder: Path, device: torch.device | str = "cpu") -> MimiCodec:
        """Read what `save` wrote, and refuse weights other than those it was written with."""
        folder = Path(folder)
        description = read_description(folder)
        num_codebooks = description.get("num_codebooks")
        if not isinstance(num_codebooks, int):
            raise ValueError(f"{folder}: codec.json has num_codebooks={num_codebooks!r}, expected a number")
        source, config = description.get("source"), description.get("config")
        if isinstance(source, str):
            codec = cls.load(source, num_codebooks=num_codebooks)
        elif isinstance(config, dict):
            model = MimiModel(MimiConfig.from_dict(config))
            model.load_state_dict(read_weights(folder))
            codec = cls(model, num_codebooks)
        else:
            raise ValueError(f"{folder}: codec.json names neither a source nor a config of Mimi; copy the codec's folder again")
        check_digest(folder, codec.digest, description)
        return codec.to(device)

    def save(self, folder: Path) -> None:
        """Write codec.json; the weights only when they cannot be had from `source` again (Mimi's are 400 MB)."""
        description: dict[str, object] = {
            "name": self.name,
            "num_codebooks": self.num_codebooks,
            "vocab_size": self.vocab_size,
            "digest": self.digest,
            "source": self.source,
        }
        if self.source is None:
            description["config"] = self.model.config.to_dict()
        write_codec_folder(Path(folder), description, self.model.state_dict() if self.source is None else None)

    def to(self, device: torch.device | str) -> MimiCodec:
        self.model.to(device)
        self._packed_encoder = None
        for quantizer in self._quantizers():
            quantizer.codebook._embed = None  # transformers caches the table as a plain attribute, which does not move
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode(self, waveforms: Sequence[Tensor]) -> list[Tensor]:
        """Encode clips to int64 [K, ceil(S / 1920)], zero-padded on the right to whole frames first.

        A clip's codes are the same whatever is encoded with it. A frame that comes out all zero, which would read as EOS, takes in
        its last codebook the entry closest to entry 0 instead.
        """
        for waveform in waveforms:
            check_waveform(waveform)
        lengths = [num_frames_from_samples(waveform.shape[0]) for waveform in waveforms]
        clips = [
            F.pad(waveform.to(self.device, torch.float32), (0, num_samples_from_frames(length) - waveform.shape[0]))
            for waveform, length in zip(waveforms, lengths, strict=True)
        ]
        if self.device.type == "cpu":
            codes = self._encode_packed(clips, lengths)
        else:
            codes = self._encode_padded(clips, lengths)
        return [self._without_zero_frames(rows) for rows in codes]

    def _encode_packed(self, clips: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        if self._packed_encoder is None:
            self._packed_encoder = PackedEncoder(self.model)
        encoder = self._packed_encoder
        packs = balanced_packs(lengths, MAX_PACKED_FRAMES, torch.get_num_threads())
        encoded = map_in_threads(lambda pack: encoder.encode([clips[index] for index in pack], self.num_codebooks), packs)
        of_clip = {index: codes for pack, results in zip(packs, encoded, strict=True) for index, codes in zip(pack, results, strict=True)}
        return [of_clip[index] for index in range(len(clips))]

    def _encode_padded(self, clips: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """By transformers' own modules, where kernels for a batch are at home. Causal: zeros on the right change no frame before them."""
        results: dict[int, Tensor] = {}
        for batch in batches_by_length(lengths):
            num_samples = num_samples_from_frames(max(lengths[index] for index in batch))
            padded = torch.stack([F.pad(clips[index], (0, num_samples - clips[index].shape[0])) for index in batch])
            codes = self.model.encode(padded[:, None], num_quantizers=self.num_codebooks).audio_codes  # [b, K, F]
            for row, index in enumerate(batch):
                results[index] = codes[row, :, : lengths[index]].contiguous()
        return [results[index] for index in range(len(clips))]

    def decode(self, codes: Tensor) -> Tensor:
        stream = self.stream()
        return torch.cat([stream.push(codes), stream.finish()])

    def stream(self) -> DecodeStream:
        return MimiDecodeStream(self)

    def latents_from_codes(self, codes: Tensor) -> Tensor:
        """Sum of the codebooks' entries: [K, F] -> [1, D, F], the same for a frame whatever is beside it."""
        check_codes(codes, self.num_codebooks, self.vocab_size)
        return self.model.quantizer.decode(codes[None].to(self.device, torch.int64))

    def _quantizers(self) -> list[nn.Module]:
        """All codebooks' layers, the semantic ones first, as in the codes."""
        split = self.model.quantizer
        return [*split.semantic_residual_vector_quantizer.layers, *split.acoustic_residual_vector_quantizer.layers]

    def _without_zero_frames(self, codes: Tensor) -> Tensor:
        is_zero = (codes == 0).all(dim=0)
        if bool(is_zero.any()):
            table = self._quantizers()[self.num_codebooks - 1].codebook.embed
            codes[-1, is_zero] = 1 + (table[1:] - table[0]).square().sum(dim=1).argmin()
        return codes


class MimiDecodeStream(DecodeStream):
    """Mimi's decoder with state; every pushed frame gives its 1920 samples at once."""

    def __init__(self, codec: MimiCodec) -> None:
        self._codec = codec
        self._decoder = codec.model.decoder
        self._cache = DynamicCache(config=self._decoder.config)
        self._state: dict[nn.Module, Tensor] = {}  # left context of a convolution, or what a transposed one adds ahead
        self._is_over = False

    @torch.no_grad()
    def push(self, codes: Tensor) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        check_codes(codes, self._codec.num_codebooks, self._codec.vocab_size)
        # One frame at a time, so that any chunking gives the same samples.
        parts = [self._step(self._codec.latents_from_codes(codes[:, index : index + 1])) for index in range(codes.shape[1])]
        return torch.cat(parts) if parts else torch.zeros(0, device=self._codec.device)

    def finish(self) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Codec.stream()")
        self._is_over = True
        return torch.zeros(0, device=self._codec.device)

    def _step(self, latents: Tensor) -> Tensor:
        hidden = self._transposed(self._decoder.upsample, latents)  # [1, D, 2]
        hidden = self._decoder.decoder_transformer(hidden.transpose(1, 2), past_key_values=self._cache, use_cache=True).last_hidden_state
        hidden = hidden.transpose(1, 2)
        for layer in self._decoder.decoder_seanet.layers:
            hidden = self._layer(layer, hidden)
        return hidden[0, 0]  # [1920]

    def _layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        if isinstance(layer, MimiConv1d):
            return self._convolution(layer, hidden)
        if isinstance(layer, MimiConvTranspose1d):
            return self._transposed(layer, hidden)
        if isinstance(layer, MimiResnetBlock):
            branch = hidden
            for inner in layer.block:
                branch = self._layer(inner, branch)
            return self._layer(layer.shortcut, hidden) + branch
        return layer(hidden)

    def _convolution(self, layer: MimiConv1d, hidden: Tensor) -> Tensor:
        num_context = int(layer.padding_total)
        if num_context:
            context = self._state.get(layer)
            hidden = F.pad(hidden, (num_context, 0)) if context is None else torch.cat([context, hidden], dim=-1)
            self._state[layer] = hidden[..., -num_context:]
        conv = layer.conv
        if conv.groups != 1 or conv.stride[0] != 1:
            return conv(hidden)
        # As one matrix product: on CPU a convolution repacks its weights on every call, 1.7 times slower for single frames.
        span = (conv.kernel_size[0] - 1) * conv.dilation[0] + 1
        columns = hidden[0].unfold(-1, span, 1)[..., :: conv.dilation[0]]  # [C, L, k]
        product = conv.weight.flatten(1) @ columns.transpose(1, 2).flatten(0, 1)  # [O, L]
        return (product if conv.bias is None else product + conv.bias[:, None])[None]

    def _transposed(self, layer: MimiConvTranspose1d, hidden: Tensor) -> Tensor:
        conv = layer.conv
        num_samples = hidden.shape[-1] * conv.stride[0]
        # Without the bias: overlapping parts add up, and the bias must count once.
        if conv.groups != 1 or conv.kernel_size[0] != 2 * conv.stride[0]:
            total = F.conv_transpose1d(hidden, conv.weight, None, conv.stride, groups=conv.groups)
        else:  # as a matrix product, like above; each input column reaches over two strides
            reach = (conv.weight.flatten(1).T @ hidden[0]).unflatten(0, (-1, 2, conv.stride[0]))  # [O, 2, stride, L]
            both = F.pad(reach[:, 0], (0, 1)) + F.pad(reach[:, 1], (1, 0))  # [O, stride, L + 1]
            total = both.transpose(1, 2).flatten(1)[None]
        ahead = self._state.get(layer)
        if ahead is not None:
            total[..., : ahead.shape[-1]] += ahead
        self._state[layer] = total[..., num_samples:]
        ready = total[..., :num_samples]
        return ready if conv.bias is None else ready + conv.bias[:, None]


def batches_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indexes of clips in batches of at most MAX_BATCH_FRAMES when padded (or one clip), none less than half as long as the longest."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and 2 * lengths[index] > longest and longest * (len(batches[-1]) + 1) <= MAX_BATCH_FRAMES:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def folder_of(source: str | Path) -> tuple[Path, str]:
    """(the folder that Mimi's files lie in, its name for codec.json), of a folder or a hub id.

    Raises:
        FileNotFoundError: if there are none.
    """
    if Path(source).is_dir():
        folder, source = Path(source), str(Path(source).resolve())
    else:
        folder, source = _folder_from_hub(str(source)), str(source)
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: expected Mimi's config.json and model.safetensors; {_how_to_get(DEFAULT_SOURCE)}")
    return folder, source


def _folder_from_hub(repository: str) -> Path:
    wanted = ["config.json", "*.safetensors"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a hub id: the next call says which
        pass
    is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    try:
        if not is_offline:
            return Path(snapshot_download(repository, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT_S))
        reason: object = "HF_HUB_OFFLINE is set"
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise FileNotFoundError(
        f"Mimi's weights {repository!r}: no such folder, not in the hub's cache, and not downloaded ({reason}); {_how_to_get(repository)}"
    ) from None


def _how_to_get(repository: str) -> str:
    return (
        f"on a connected machine run `hf download {repository} config.json model.safetensors --local-dir mimi` and set codec.source=mimi, "
        "or use codec.name=spectral, which needs no download"
    )
