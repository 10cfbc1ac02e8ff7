"""Principal components and residual k-means: the quantiser of the spectral codec, fitted in seconds and the same every time."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_ITERATIONS = 12  # of k-means, per codebook
_ROWS_PER_CHUNK = 8_192  # bounds the float64 copy a fit makes


def principal_components(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and the `size` leading directions [size, D] of rows [N, D], float32; signs fixed, so that fits repeat."""
    mean = rows.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for chunk in rows.split(_ROWS_PER_CHUNK):
        centred = chunk.double() - mean
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance / rows.shape[0])
    basis = vectors.flip(1)[:, :size].T  # [size, D], by falling variance
    signs = torch.gather(basis, 1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return mean.float(), (basis * signs).float().contiguous()


def nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """Index of the closest centre of each row: [N, D], [C, D] -> [N] int64."""
    return (centres.square().sum(dim=1) - 2.0 * (rows @ centres.T)).argmin(dim=1)


def kmeans(rows: Tensor, num_centres: int, generator: torch.Generator) -> Tensor:
    """Lloyd's algorithm from distinct rows, emptied centres moved to the rows that fit worst. [N, D] -> [num_centres, D].

    With fewer rows than centres the rows are used over again with a little noise, so the table still has its size.
    """
    num_rows = rows.shape[0]
    order = torch.randperm(num_rows, generator=generator)
    centres = rows[order[torch.arange(num_centres) % num_rows]].clone()
    if num_rows < num_centres:
        spread = rows.std(dim=0, unbiased=False) + 1e-3
        centres[num_rows:] += 0.01 * spread * torch.randn(num_centres - num_rows, rows.shape[1], generator=generator)
        return centres
    for _ in range(NUM_ITERATIONS):
        index = nearest(rows, centres)
        counts = torch.bincount(index, minlength=num_centres)
        sums = torch.zeros_like(centres).index_add_(0, index, rows)
        empty = (counts == 0).nonzero().flatten()
        centres = sums / counts.clamp(min=1)[:, None]
        if len(empty):
            error = (rows - centres[index]).square().sum(dim=1)
            centres[empty] = rows[error.topk(len(empty)).indices]
    return centres


def fit_codebooks(rows: Tensor, num_codebooks: int, codebook_size: int, seed: int) -> Tensor:
    """Fit one k-means after the other, each on what the ones before leave. [N, D] -> [num_codebooks, codebook_size, D]."""
    generator = torch.Generator().manual_seed(seed)
    residual = rows.clone()
    codebooks = []
    for _ in range(num_codebooks):
        centres = kmeans(residual, codebook_size, generator)
        residual -= centres[nearest(residual, centres)]
        codebooks.append(centres)
    return torch.stack(codebooks)


def quantise(rows: Tensor, codebooks: Tensor) -> Tensor:
    """Closest entry in each codebook of what the ones before leave. [N, D], [K, C, D] -> [N, K] int64."""
    residual = rows
    codes = []
    for centres in codebooks:
        index = nearest(residual, centres)
        residual = residual - centres[index]
        codes.append(index)
    return torch.stack(codes, dim=1)
