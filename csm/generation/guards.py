"""Against runaways, each off unless asked for: replies that go round in circles, and silence at a reply's end."""

from __future__ import annotations

import torch
from torch import Tensor

from csm.frames import SAMPLE_RATE_HZ

MAX_PERIOD_FRAMES = 25  # 2 s: longer circles are hardly ever loops of a model
MIN_LOOP_FRAMES = 38  # 3 s of the same; digits and stammers repeat for less
MIN_REPEATS = 3
_WINDOW_SAMPLES = SAMPLE_RATE_HZ // 100  # 10 ms
_KEPT_SAMPLES = SAMPLE_RATE_HZ // 10  # of the silence, so that the last sound does not end in a click
_SILENCE_RMS = 10 ** (-45 / 20)


class LoopGuard:
    """Tells when a reply repeats itself frame by frame.

    Looks at codebook 0, which carries the words: the finer codebooks are drawn differently in every round of a loop. It is a
    loop when the newest frames are the same circle of 1 to 25 frames, at least 3 times and for at least 3 s. A pause of 3 s
    whose codebook 0 does not change counts, too.
    """

    def __init__(self) -> None:
        self._codes: list[int] = []
        self._num_equal = [0] * (MAX_PERIOD_FRAMES + 1)  # by period: newest frames equal to those a period before

    def push(self, frame: Tensor) -> bool:
        """Take a frame int64 [K]; true once the reply goes in circles."""
        self._codes.append(int(frame[0]))
        is_loop = False
        for period in range(1, min(MAX_PERIOD_FRAMES, len(self._codes) - 1) + 1):
            same = self._codes[-1] == self._codes[-1 - period]
            self._num_equal[period] = self._num_equal[period] + 1 if same else 0
            num_frames = self._num_equal[period] + period
            is_loop = is_loop or (num_frames >= MIN_LOOP_FRAMES and num_frames >= MIN_REPEATS * period)
        return is_loop


class SilenceTrim:
    """Cuts the silence at the end of a clip, but for 0.1 s; works on a stream.

    Silence (10 ms windows below -45 dBFS) is held back until sound follows it, so chunks joined equal the clip trimmed at once.
    """

    def __init__(self) -> None:
        self._held = torch.zeros(0)  # silent windows, then less than a window that is not judged yet
        self._num_silent = 0  # samples of the held ones that were judged

    def push(self, samples: Tensor) -> Tensor:
        """Take samples float32 [S]; return those that are known to stay."""
        held = torch.cat((self._held, samples))
        num_judged = held.shape[0] // _WINDOW_SAMPLES * _WINDOW_SAMPLES
        windows = held[self._num_silent : num_judged].view(-1, _WINDOW_SAMPLES)
        loud = (windows.square().mean(dim=1) >= _SILENCE_RMS**2).nonzero()
        num_out = self._num_silent + (int(loud[-1]) + 1) * _WINDOW_SAMPLES if loud.numel() else 0
        self._held, self._num_silent = held[num_out:], num_judged - num_out
        return held[:num_out]

    def finish(self) -> Tensor:
        """What is left of the end: the rest of a window that may sound, and 0.1 s of silence."""
        rest = self._held[self._num_silent :]
        is_loud = rest.numel() > 0 and float(rest.square().mean()) >= _SILENCE_RMS**2
        return self._held if is_loud else self._held[:_KEPT_SAMPLES]
