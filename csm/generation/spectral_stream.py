"""Marks that move spectra: blocks of overlapping windows, joined so that chunks of any size give the same samples."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from csm.generation.watermark import WatermarkStream


class SpectralStream(WatermarkStream):
    """Overlap-add of block after block; hop j is centred on sample `hop_samples` * j.

    Args:
        window_samples, hop_samples: of the Hann windows, which are applied twice.
        first_block_hops: of the first block, shorter so that sound comes early.
        block_hops: of every other block.
    """

    def __init__(self, window_samples: int, hop_samples: int, first_block_hops: int, block_hops: int) -> None:
        self._size, self._hop = window_samples, hop_samples
        self._first_block_hops, self._block_hops = first_block_hops, block_hops
        self._window = torch.hann_window(window_samples)
        squared = F.pad(self._window.square(), (0, -window_samples % hop_samples)).view(-1, hop_samples)
        self._envelope = squared.sum(dim=0)  # [hop_samples]: the windows of all hops at one sample, wherever it is
        self._samples = torch.zeros(window_samples // 2)  # from the next hop's window on; nothing sounds before the clip
        self._overlap = torch.zeros(window_samples - hop_samples)  # of residuals that reach past the hops done
        self._num_hops = 0
        self._num_pushed = self._num_returned = 0
        self._is_over = False

    @abstractmethod
    def _gains(self, spectra: Tensor, first_hop: int) -> Tensor:
        """By how much to multiply the lowest bins of complex spectra [bins, hops]: float32 [bins or fewer, hops]."""

    @torch.no_grad()
    def push(self, waveform: Tensor) -> Tensor:
        if self._is_over:
            raise ValueError("this stream is finished; start another with Watermarker.stream()")
        waveform = waveform.detach().float().cpu()
        self._num_pushed += waveform.shape[0]
        return self._take(waveform)

    @torch.no_grad()
    def finish(self) -> Tensor:
        num_left = self._num_pushed - self._num_returned
        padding = torch.zeros(num_left + 2 * self._size + self._block_hops * self._hop)  # nothing sounds behind it; flushes every block
        marked = self._take(padding)[:num_left]
        self._is_over = True
        return marked

    def _take(self, waveform: Tensor) -> Tensor:
        self._samples = torch.cat((self._samples, waveform))
        parts = []
        while True:
            num_hops = self._block_hops if self._num_hops else self._first_block_hops
            if self._samples.shape[0] < (num_hops - 1) * self._hop + self._size:
                break
            parts.append(self._block(num_hops))
        marked = torch.cat(parts) if parts else torch.zeros(0)
        self._num_returned += marked.shape[0]
        return marked

    def _block(self, num_hops: int) -> Tensor:
        """Mark `num_hops` hops; return the samples that no later hop touches."""
        hop, size = self._hop, self._size
        spectra = torch.fft.rfft(self._samples.unfold(0, size, hop)[:num_hops] * self._window).T  # [bins, hops]
        gains = self._gains(spectra, self._num_hops)
        residual = spectra[: gains.shape[0]] * (gains - 1.0)
        windows = torch.fft.irfft(F.pad(residual, (0, 0, 0, spectra.shape[0] - gains.shape[0])), n=size, dim=0).T * self._window
        total = F.pad(self._overlap, (0, num_hops * hop))
        for index in range(num_hops):
            total[index * hop : index * hop + size] += windows[index]
        num_done = num_hops * hop
        residual_samples = (total[:num_done].view(-1, hop) / self._envelope).flatten()
        marked = self._samples[:num_done] + residual_samples
        if self._num_hops == 0:
            marked = marked[size // 2 :]  # what stands before the clip
        self._samples, self._overlap = self._samples[num_done:], total[num_done:]
        self._num_hops += num_hops
        return marked
