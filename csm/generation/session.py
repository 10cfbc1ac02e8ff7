"""A conversation that goes on: its turns stay in the backbone's cache, so that a reply costs only what is new.

When the window is full, whole turns are dropped, oldest first, and the cache is filled anew from those that stay, because
their positions move. What is said equals a one-shot `generate` with the same turns as codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from csm.frames import Rows, Turn, audio_rows
from csm.generation.decoding import FrameDecoder
from csm.generation.request import GeneratedCodes, Request
from csm.generation.sampling import Sampler
from csm.generation.speech import Speech

if TYPE_CHECKING:
    from csm.generation.generator import Generator


class Session:
    """Turns heard and said, with their keys and values.

    Args:
        generator: not to be trained further while the session lasts.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._adapter = generator.adapter
        config = generator.model.config
        self._decoder = FrameDecoder(generator.model, batch_size=1, max_positions=config.max_seq_len, loop=generator.frame_loop())
        self._turns: list[Turn] = []  # with codes
        self._rows: list[Rows] = []  # of each turn, EOS row included
        self._unheard: list[Rows] = []  # rows of the turns that are not in the cache yet, in order

    @property
    def turns(self) -> Sequence[Turn]:
        """The turns remembered, oldest first, with their codes."""
        return tuple(self._turns)

    def add(self, turn: Turn) -> None:
        """Hear a turn: its audio is encoded now, and taken in with the next reply.

        Raises:
            ValueError: if it has neither audio nor codes, or they cannot be used.
        """
        self._check_adapter()
        place = f"turn {len(self._turns)}"
        turn = self._generator.prompts.turn_with_codes(turn, place)
        rows = self._generator.prompts.turn_rows(turn, place)
        self._remember(turn, rows)
        self._unheard.append(rows)

    def say(self, text: str, speaker: int = 0, **options: Any) -> Tensor:
        """Reply: float32 [S] at 24 kHz, watermarked. Options are those of `Generator.generate`, without context."""
        return torch.cat([torch.zeros(0), *self.stream(text, speaker, **options)])

    def stream(self, text: str, speaker: int = 0, **options: Any) -> Iterator[Tensor]:
        """Reply in chunks as they are made. One reply at a time; one left early is remembered as far as it was made.

        What is wrong with the arguments is raised here, before the first chunk is asked for.
        """
        self._check_adapter()
        request = Request(text=text, speaker=speaker, **options)
        reply = self._generator.prompts.reply_rows(text, speaker)
        num_dropped = self._generator.prompts.num_to_drop([len(rows) for rows in self._rows], len(reply), request.max_frames)
        if num_dropped:
            del self._turns[:num_dropped], self._rows[:num_dropped]
            self._start_over()
        return self._stream(request, reply, num_dropped)

    def _stream(self, request: Request, reply: Rows, num_dropped: int) -> Iterator[Tensor]:
        generator, decoder = self._generator, self._decoder
        device = generator.model.projection.weight.device
        sampler = Sampler(
            [request.seed or 0],
            request.max_frames,
            generator.model.config.num_codebooks,
            temperature=request.temperature,
            top_k=request.top_k,
            min_frames=request.min_frames,
            device=device,
        )
        speech = Speech(generator.codec, generator.watermarker, trim_silence=request.trim_silence)
        guard = request.guard()
        rows = Rows.concatenate([*self._unheard, reply])
        frames: list[Tensor] = []
        is_whole = is_loop = False
        try:
            decoder.prefill(rows.tokens[None].to(device), rows.mask[None].to(device))
            self._unheard = []
            for batch in decoder.frames(sampler, request.max_frames):
                frames.append(batch[0].cpu())
                chunk = speech.push(batch[0])
                if chunk.numel():
                    yield chunk
                is_loop = guard is not None and guard.push(frames[-1])
                if is_loop:
                    break
            is_whole = True
        except GeneratorExit:
            is_whole = True
            raise
        finally:
            if is_whole:
                self._remember_reply(request, reply, frames)
            else:
                self._start_over()
        codes = torch.stack(frames) if frames else torch.zeros(0, sampler.num_codebooks, dtype=torch.int64)
        generator.last = GeneratedCodes.of(request, codes, num_dropped, is_loop=is_loop)
        chunk = speech.finish()
        if chunk.numel():
            yield chunk

    def _check_adapter(self) -> None:
        if self._generator.adapter != self._adapter:
            raise ValueError(
                f"the session began with adapter {self._adapter!r}, the generator has {self._generator.adapter!r}: start a new session, "
                "or set the old one again"
            )

    def _remember(self, turn: Turn, rows: Rows) -> None:
        self._turns.append(turn)
        self._rows.append(rows)

    def _remember_reply(self, request: Request, reply: Rows, frames: list[Tensor]) -> None:
        """Keep what was said; the newest frame and the EOS row are not in the cache yet."""
        if not frames:
            self._start_over()  # nothing was said, so its text must not stay either
            return
        codes = torch.stack(frames, dim=1)  # [K, F]
        spoken = audio_rows(codes)
        self._remember(Turn(request.speaker, request.text, codes=codes), Rows.concatenate([reply, spoken]))
        assert self._decoder.unheard is not None
        has_ended = not bool(self._decoder.unheard.any())
        num_unheard = 1 if has_ended else 2  # an ended reply has heard all its frames
        self._unheard = [Rows(*(part[-num_unheard:] for part in (spoken.tokens, spoken.mask, spoken.learn_c0, spoken.learn_depth)))]

    def _start_over(self) -> None:
        """Empty the cache; every turn that is remembered is to be heard again."""
        self._decoder.reset()
        self._unheard = list(self._rows)
