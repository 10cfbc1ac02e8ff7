"""Text in, speech out: a model with its codec, tokenizer and watermark.

Everything spoken goes one way: prompt -> frames -> codec stream -> watermark stream. `generate` is `stream` joined, so both
give the same samples. The frame loop is `decoding`'s, the prompt `prompt`'s, a conversation's memory `session`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csm.codec import Codec
from csm.codec.voices import VOICES_FOLDER
from csm.config import DEFAULT_WATERMARK
from csm.frames import Rows, Turn
from csm.generation.decoding import DepthLoop, FrameLoop, GraphLoop, iterate_frames
from csm.generation.prompt import PromptBuilder, pad_prompts
from csm.generation.request import GeneratedCodes, Request, as_request
from csm.generation.speech import Speech
from csm.generation.voices import load_voice
from csm.generation.watermark import Watermarker, load_watermarker
from csm.model.adapter_files import load_adapter
from csm.model.csm import CSM
from csm.model.lora import merge_adapter, set_adapter
from csm.model.pretrained import resolve_checkpoint
from csm.text import FILE_NAME as TOKENIZER_NAME
from csm.text import TextTokenizer

if TYPE_CHECKING:
    from csm.generation.session import Session


class Generator:
    """Speaks with one model.

    Args:
        model: moved to evaluation mode; its device is where frames are made.
        codec, tokenizer: those it was trained with.
        watermarker: marks everything that is spoken; None leaves the mark out and must be given as such.
        compile: make frames by machine code on a CPU (`native`, needs a C++ compiler), by a CUDA graph on a GPU.
        int8: the depth decoder's weights as int8, the backbone's as bfloat16; needs `compile` and a CPU.

    Attributes:
        last: what the last `generate` or finished `stream` made.
        adapter: the one it speaks with, of those that `add_adapter` took; None is the model as it was given.
    """

    def __init__(
        self,
        model: CSM,
        codec: Codec,
        tokenizer: TextTokenizer,
        watermarker: Watermarker | None,
        *,
        compile: bool = False,
        int8: bool = False,
    ) -> None:
        if int8 and not (compile and model.projection.weight.device.type == "cpu"):
            raise ValueError("int8 weights are read by the compiled loop on a CPU only; set compile=True and device cpu, or leave int8 off")
        self.model = model.eval()
        self.compile, self.int8 = compile, int8
        self.codec = codec
        self.tokenizer = tokenizer
        self.watermarker = watermarker
        self.prompts = PromptBuilder(model.config, codec, tokenizer)
        self.last: GeneratedCodes | None = None
        self.voice_folders: list[Path] = []  # where `voice` looks
        self.adapter: str | None = None
        self._tokenizers: dict[str | None, TextTokenizer] = {None: tokenizer}
        self._loop: FrameLoop | None = None
        self._loop_version: tuple[int, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        watermark: str = DEFAULT_WATERMARK,
        compile: bool = False,
        int8: bool = False,
    ) -> Generator:
        """Load a checkpoint with its codec and tokenizer.

        Args:
            checkpoint: a run folder, a checkpoint folder, or a folder or hub id in Sesame's or transformers' layout.
            dtype: None is float32.
            watermark: a name that `load_watermarker` knows; "off" leaves the mark out.
            compile, int8: as for `Generator`.
        Raises:
            FileNotFoundError, ValueError: if something is missing or does not fit; the message says what to do.
        """
        from csm.generation.checkpoint import load_companions

        watermarker = load_watermarker(watermark)
        model, codec, tokenizer = load_companions(checkpoint, device, torch.float32 if dtype is None else dtype)
        generator = cls(model, codec, tokenizer, watermarker, compile=compile, int8=int8)
        generator.voice_folders = [resolve_checkpoint(checkpoint) / VOICES_FOLDER]
        return generator

    def add_adapter(self, name: str, place: str | Path) -> None:
        """Keep an adapter beside the model, with the tokenizer it brings; `set_adapter(name)` then speaks with it.

        Args:
            place: a fine-tuning run, a checkpoint of one, or an adapter's folder in PEFT's layout.
        Raises:
            FileNotFoundError, ValueError: if there is none, it is of another model, or the name is taken.
        """
        from csm.generation.checkpoint import find_adapter, load_tokenizer_of

        folder = find_adapter(place)
        if name in self._tokenizers:
            raise ValueError(f"adapter {name!r}: there is one of that name; choose another")
        has_own = (folder / TOKENIZER_NAME).is_file()
        tokenizer = load_tokenizer_of(folder, self.model.config) if has_own else self._tokenizers[None]
        PromptBuilder(self.model.config, self.codec, tokenizer)  # refuses one that does not fit
        set_adapter(self.model, None)
        try:
            load_adapter(self.model, folder, name=name)
            self._tokenizers[name] = tokenizer
        finally:
            self.set_adapter(self.adapter)

    def set_adapter(self, name: str | None) -> None:
        """Speak with one of the adapters from now on, None: with none. It is merged, so speech is made as fast as without.

        A session goes with the adapter it began with.

        Raises:
            ValueError: if there is none of that name; the message lists those there are.
        """
        if name not in self._tokenizers:
            known = ", ".join(repr(known) for known in self._tokenizers if known is not None) or "none"
            raise ValueError(f"adapter {name!r}: not one of those added ({known})")
        set_adapter(self.model, name)
        merge_adapter(self.model)
        self.adapter, self._loop = name, None
        self.tokenizer = self.prompts.tokenizer = self._tokenizers[name]

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
        **options: Any,
    ) -> Tensor:
        """Say `text`; see `Request` for the arguments, and for `options`: min_duration_s, trim_silence, stop_loops.

        Returns:
            float32 [S] at 24 kHz, watermarked; empty when the model ends at once. `last` tells whether it reached its end.
        Raises:
            ValueError: if the text or a context turn cannot be used, or they exceed the window.
        """
        options |= dict(max_duration_s=max_duration_s, temperature=temperature, top_k=top_k, seed=seed)
        return torch.cat([torch.zeros(0), *self.stream(text, speaker, context, **options)])

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
        **options: Any,
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
            **options,
        )
        rows, num_dropped = self.prompts.build(text, speaker, context, request.max_frames)
        return self._stream(request, rows, num_dropped)

    def _stream(self, request: Request, rows: Rows, num_dropped: int) -> Iterator[Tensor]:
        speech = Speech(self.codec, self.watermarker, trim_silence=request.trim_silence)
        guard = request.guard()
        frames: list[Tensor] = []
        is_loop = False
        for batch in self._frames([request], [rows]):
            frames.append(batch[0].cpu())
            chunk = speech.push(batch[0])
            if chunk.numel():
                yield chunk
            is_loop = guard is not None and guard.push(frames[-1])
            if is_loop:
                break
        codes = torch.stack(frames) if frames else self._no_frames()
        self.last = GeneratedCodes.of(request, codes, num_dropped, is_loop=is_loop)
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
        checked = [as_request(request, index) for index, request in enumerate(requests)]
        results = self.generate_codes_batch(checked)
        return [self.audio_from_codes(r.codes, trim_silence=q.trim_silence) for r, q in zip(results, checked, strict=True)]

    def generate_codes_batch(
        self,
        requests: Sequence[Request | Mapping[str, Any]],
        *,
        max_batch_size: int = 32,
        on_frame: Callable[[int, int], None] | None = None,
    ) -> list[GeneratedCodes]:
        """The codes of several requests, decoded together where their sampling settings and durations agree.

        Args:
            on_frame: called with the frames made so far, and of how many requests at a time; for progress.
        """
        checked = [as_request(request, index) for index, request in enumerate(requests)]
        prompts = [self.prompts.build(r.text, r.speaker, r.context, r.max_frames) for r in checked]
        groups: dict[tuple[float, int, int, int], list[int]] = {}
        for index, request in enumerate(checked):
            settings = (request.temperature, request.top_k, request.max_frames, request.min_frames)
            groups.setdefault(settings, []).append(index)
        results: dict[int, GeneratedCodes] = {}
        for members in groups.values():
            for start in range(0, len(members), max_batch_size):
                chosen = members[start : start + max_batch_size]
                rows = self._decode_together([checked[i] for i in chosen], [prompts[i][0] for i in chosen], on_frame)
                for index, (codes, is_loop) in zip(chosen, rows, strict=True):
                    results[index] = GeneratedCodes.of(checked[index], codes, prompts[index][1], is_loop=is_loop)
        return [results[index] for index in range(len(checked))]

    def _decode_together(
        self, requests: Sequence[Request], prompts: Sequence[Rows], on_frame: Callable[[int, int], None] | None
    ) -> list[tuple[Tensor, bool]]:
        """The codes [F, K] of each request, and whether the guard ended it."""
        guards = [request.guard() for request in requests]
        ends: list[int | None] = [None] * len(requests)  # frames of the rows that are over
        is_loop = [False] * len(requests)
        frames: list[Tensor] = []
        for batch in self._frames(requests, prompts):
            frames.append(batch)
            if on_frame is not None:
                on_frame(len(frames), len(requests))
            if not any(guards):
                continue
            for row, (guard, frame) in enumerate(zip(guards, batch.cpu(), strict=True)):
                if ends[row] is None and not bool(frame.any()):
                    ends[row] = len(frames) - 1
                elif ends[row] is None and guard is not None and guard.push(frame):
                    ends[row], is_loop[row] = len(frames), True
            if None not in ends:
                break
        stacked = torch.stack(frames, dim=1).cpu() if frames else self._no_frames().expand(len(requests), -1, -1)  # [B, F, K]
        lengths = stacked.any(dim=2).sum(dim=1).tolist()  # behind a row's end all frames are zero
        lengths = [length if end is None else end for length, end in zip(lengths, ends, strict=True)]
        return [(codes[:length].clone(), loop) for codes, length, loop in zip(stacked, lengths, is_loop, strict=True)]

    def audio_from_codes(self, codes: Tensor, *, trim_silence: bool = False) -> Tensor:
        """Sound codes int64 [F, K]: float32 [F * 1920] at 24 kHz, watermarked; shorter where silence is trimmed."""
        speech = Speech(self.codec, self.watermarker, trim_silence=trim_silence)
        return torch.cat([torch.zeros(0), *(speech.push(frame) for frame in codes), speech.finish()])

    def voice(self, name: str) -> Turn:
        """The preset of that name, of those that came with the checkpoint, as a turn to put first into `context`.

        Raises:
            FileNotFoundError: if there is none of that name; the message lists those there are.
        """
        return load_voice(name, self.voice_folders).turn(self.codec)

    def session(self) -> Session:
        """Start a conversation that remembers its turns."""
        from csm.generation.session import Session

        return Session(self)

    @property
    def watermark_name(self) -> str:
        """For the metadata of what is written."""
        return "off" if self.watermarker is None else self.watermarker.name

    def frame_loop(self) -> FrameLoop:
        """The model laid out for speed, made anew when it was trained on in between."""
        version = tuple(parameter._version for parameter in self.model.parameters())
        device = self.model.projection.weight.device
        if self._loop is None or version != self._loop_version or self._loop.device != device:
            self._loop, self._loop_version = self._make_loop(device), version
        return self._loop

    def _make_loop(self, device: torch.device) -> FrameLoop:
        if not self.compile:
            return DepthLoop(self.model)
        if device.type == "cpu":
            from csm.generation.native import NativeLoop

            return NativeLoop(self.model, "int8" if self.int8 else None)
        return GraphLoop(self.model)

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
            min_frames=settings.min_frames,
            loop=self.frame_loop(),
        )

    def _no_frames(self) -> Tensor:
        return torch.zeros(0, self.model.config.num_codebooks, dtype=torch.int64)
