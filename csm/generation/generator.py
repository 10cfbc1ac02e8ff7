"""Text in, speech out: a model with its codec, tokenizer and watermark.

Everything spoken goes one way: prompt -> frames -> codec stream -> watermark stream. `generate` is `stream` joined, so both
give the same samples. The frame loop is `decoding`'s, the prompt `prompt`'s, a conversation's memory `session`'s.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csm.codec import Codec
from csm.frames import Rows, Turn
from csm.generation.decoding import DepthLoop, iterate_frames
from csm.generation.prompt import PromptBuilder, max_frames_from_duration, pad_prompts
from csm.generation.sampling import MAX_SEED, check_sampling
from csm.generation.watermark import Watermarker, load_watermarker
from csm.model.csm import CSM
from csm.text import TextTokenizer

if TYPE_CHECKING:
    from csm.generation.session import Session


@dataclass(kw_only=True)
class Request:
    """One thing to say.

    Attributes:
        text: what to say. speaker: the number in front of it.
        context: turns heard before, oldest first, each with audio or codes.
        max_duration_s: where a reply without an end is cut.
        temperature: 0 is greedy. top_k: 0 keeps every code.
        seed: equal seeds give equal speech; None draws one, which `GeneratedCodes.seed` tells.
    """

    text: str
    speaker: int = 0
    context: Sequence[Turn] = ()
    max_duration_s: float = 10.0
    temperature: float = 0.9
    top_k: int = 50
    seed: int | None = None

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k)
        if self.seed is None:
            self.seed = secrets.randbelow(2**31)
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed}: expected a whole number from 0 to {MAX_SEED}")

    @property
    def max_frames(self) -> int:
        return max_frames_from_duration(self.max_duration_s)


@dataclass
class GeneratedCodes:
    """What a request became.

    Attributes:
        codes: int64 [F, K], without the EOS frame.
        reached_eos: false for a runaway, which was cut at `max_duration_s`.
        seed: that gives these codes again.
        num_dropped_turns: oldest context turns that did not fit the window.
    """

    codes: Tensor
    reached_eos: bool
    seed: int
    num_dropped_turns: int


class Speech:
    """Frames in, watermarked samples out, for one clip."""

    def __init__(self, codec: Codec, watermarker: Watermarker | None) -> None:
        self._codec_stream = codec.stream()
        self._watermark_stream = None if watermarker is None else watermarker.stream()
        self._last_code = codec.vocab_size - 1
        self._has_frames = False

    def push(self, frame: Tensor) -> Tensor:
        """Take a frame int64 [K]; return the samples that are final by now, float32 [S] (possibly none)."""
        self._has_frames = True
        codes = frame[:, None].clamp(max=self._last_code)  # an untrained model draws ids of the table's spare rows, too
        samples = self._codec_stream.push(codes).cpu()
        return samples if self._watermark_stream is None else self._watermark_stream.push(samples)

    def finish(self) -> Tensor:
        """The samples that are left."""
        if not self._has_frames:
            return torch.zeros(0)
        samples = self._codec_stream.finish().cpu()
        if self._watermark_stream is None:
            return samples
        return torch.cat((self._watermark_stream.push(samples), self._watermark_stream.finish()))


class Generator:
    """Speaks with one model.

    Args:
        model: moved to evaluation mode; its device is where frames are made.
        codec, tokenizer: those it was trained with.
        watermarker: marks everything that is spoken; None leaves the mark out and must be given as such.

    Attributes:
        last: what the last `generate` or finished `stream` made.
    """

    def __init__(self, model: CSM, codec: Codec, tokenizer: TextTokenizer, watermarker: Watermarker | None) -> None:
        self.model = model.eval()
        self.codec = codec
        self.tokenizer = tokenizer
        self.watermarker = watermarker
        self.prompts = PromptBuilder(model.config, codec, tokenizer)
        self.last: GeneratedCodes | None = None
        self._depth: DepthLoop | None = None
        self._depth_version: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        watermark: str = "perth",
    ) -> Generator:
        """Load a checkpoint with its codec and tokenizer.

        Args:
            checkpoint: a run folder, a checkpoint folder, or a folder or hub id in Sesame's or transformers' layout.
            dtype: None is float32.
            watermark: "perth", or "off".
        Raises:
            FileNotFoundError, ValueError: if something is missing or does not fit; the message says what to do.
        """
        from csm.generation.checkpoint import load_companions

        watermarker = load_watermarker(watermark)
        model, codec, tokenizer = load_companions(checkpoint, device, torch.float32 if dtype is None else dtype)
        return cls(model, codec, tokenizer, watermarker)

    def generate(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Turn] = (),
        *,
        max_duration_s: float = 10.0,
        temperature: float = 0.9,
        top_k: int = 50,
        seed: int | None = None,
    ) -> Tensor:
        """Say `text`; see `Request` for the arguments.

        Returns:
            float32 [S] at 24 kHz, watermarked; empty when the model ends at once. `last` tells whether it reached its end.
        Raises:
            ValueError: if the text or a context turn cannot be used, or they exceed the window.
        """
        chunks = self.stream(text, speaker, context, max_duration_s=max_duration_s, temperature=temperature, top_k=top_k, seed=seed)
        return torch.cat([torch.zeros(0), *chunks])

    def stream(
        self,
        text: str,
        speaker: int = 0,
        context: Sequence[Turn] = (),
        *,
        max_duration_s: float = 10.0,
        temperature: float = 0.9,
        top_k: int = 50,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """Say `text` in chunks as they are made, float32 [S] each; joined they equal `generate` with the same seed.

        What is wrong with the arguments is raised here, before the first chunk is asked for.
        """
        request = Request(
            text=text,
            speaker=speaker,
            context=context,
            max_duration_s=max_duration_s,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
        rows, num_dropped = self.prompts.build(text, speaker, context, request.max_frames)
        return self._stream(request, rows, num_dropped)

    def _stream(self, request: Request, rows: Rows, num_dropped: int) -> Iterator[Tensor]:
        speech = Speech(self.codec, self.watermarker)
        frames = []
        for batch in self._frames([request], [rows]):
            frame = batch[0]
            frames.append(frame.cpu())
            chunk = speech.push(frame)
            if chunk.numel():
                yield chunk
        self.last = self._generated(torch.stack(frames) if frames else self._no_frames(), request, num_dropped)
        chunk = speech.finish()
        if chunk.numel():
            yield chunk

    def generate_codes(self, text: str, speaker: int = 0, context: Sequence[Turn] = (), **options: Any) -> Tensor:
        """The codes `generate` would sound, int64 [F, K]; same arguments."""
        self.last = self.generate_codes_batch([Request(text=text, speaker=speaker, context=context, **options)])[0]
        return self.last.codes

    def generate_batch(self, requests: Sequence[Request | Mapping[str, Any]]) -> list[Tensor]:
        """Say several texts together; each equals what `generate` gives alone, with the same seed.

        Args:
            requests: each a `Request`, or a dict of its arguments.
        """
        return [self.audio_from_codes(generated.codes) for generated in self.generate_codes_batch(requests)]

    def generate_codes_batch(self, requests: Sequence[Request | Mapping[str, Any]], *, max_batch_size: int = 32) -> list[GeneratedCodes]:
        """The codes of several requests, decoded together where their sampling settings and longest durations agree."""
        checked = [_as_request(request, index) for index, request in enumerate(requests)]
        prompts = [self.prompts.build(r.text, r.speaker, r.context, r.max_frames) for r in checked]
        groups: dict[tuple[float, int, int], list[int]] = {}
        for index, request in enumerate(checked):
            groups.setdefault((request.temperature, request.top_k, request.max_frames), []).append(index)
        results: list[GeneratedCodes | None] = [None] * len(checked)
        for members in groups.values():
            for start in range(0, len(members), max_batch_size):
                chosen = members[start : start + max_batch_size]
                frames = list(self._frames([checked[i] for i in chosen], [prompts[i][0] for i in chosen]))
                stacked = torch.stack(frames, dim=1).cpu() if frames else self._no_frames().expand(len(chosen), -1, -1)  # [B, F, K]
                for row, index in enumerate(chosen):
                    num_frames = int(stacked[row].any(dim=1).sum())  # behind a row's end all frames are zero
                    results[index] = self._generated(stacked[row, :num_frames].clone(), checked[index], prompts[index][1])
        return [result for result in results if result is not None]

    def audio_from_codes(self, codes: Tensor) -> Tensor:
        """Sound codes int64 [F, K]: float32 [F * 1920] at 24 kHz, watermarked."""
        speech = Speech(self.codec, self.watermarker)
        return torch.cat([torch.zeros(0), *(speech.push(frame) for frame in codes), speech.finish()])

    def session(self) -> Session:
        """Start a conversation that remembers its turns."""
        from csm.generation.session import Session

        return Session(self)

    @property
    def watermark_name(self) -> str:
        """For the metadata of what is written."""
        return "off" if self.watermarker is None else self.watermarker.name

    def depth_loop(self) -> DepthLoop:
        """The depth decoder laid out for speed, made anew when the model was trained on in between."""
        version = tuple(parameter._version for parameter in self.model.parameters())
        if self._depth is None or version != self._depth_version or self._depth.device != self.model.projection.weight.device:
            self._depth, self._depth_version = DepthLoop(self.model), version
        return self._depth

    def _frames(self, requests: Sequence[Request], prompts: Sequence[Rows]) -> Iterator[Tensor]:
        tokens, mask = pad_prompts(prompts)
        settings = requests[0]
        return iterate_frames(
            self.model,
            tokens,
            mask,
            seeds=[request.seed or 0 for request in requests],
            max_frames=settings.max_frames,
            temperature=settings.temperature,
            top_k=settings.top_k,
            depth=self.depth_loop(),
        )

    def _no_frames(self) -> Tensor:
        return torch.zeros(0, self.model.config.num_codebooks, dtype=torch.int64)

    def _generated(self, codes: Tensor, request: Request, num_dropped: int) -> GeneratedCodes:
        return GeneratedCodes(codes, codes.shape[0] < request.max_frames, request.seed or 0, num_dropped)


def _as_request(request: Request | Mapping[str, Any], index: int) -> Request:
    if isinstance(request, Request):
        return replace(request)
    try:
        return Request(**request)
    except TypeError as error:
        raise ValueError(f"request {index}: {error}; expected the arguments of Generator.generate") from error
