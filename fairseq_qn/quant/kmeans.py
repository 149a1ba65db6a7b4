"""Codebook learning: Lloyd's algorithm, seeded, in fp32, without a Python loop over codewords.

Minimises sum_i ||x_i - c[code_i]||^2 (Fan et al. 2020, eq. 2). Rules, so that the same input gives the same codes:
* it starts from K distinct rows drawn without replacement by the seed;
* a codeword that no block chose is moved onto the block with the largest error, the next such onto the next, and so on;
* it stops when the objective no longer falls. A step that rounding makes worse is thrown away, so the objective never rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.kernels import nearest as kernel

CHUNK = 1 << 18  # scores held at a time: 1 MiB of fp32, which stays in a core's cache


@dataclass(frozen=True)
class Clusters:
    """codes int32 [n], codebook fp32 [K, d] (the mean of each code's blocks), the objective after each iteration."""

    codes: Tensor
    codebook: Tensor
    history: tuple[float, ...]

    @property
    def objective(self) -> float:
        """sum of squared errors, in the units of the input, squared."""
        return self.history[-1]


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword nearest to each row: x [n, d], codebook [K, d] -> int32 [n]."""
    if kernel.usable(x):
        return kernel.nearest(x, codebook)
    # argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2
    bias = codebook.pow(2).sum(1).div(-2)
    step = max(64, CHUNK // len(codebook))
    transposed = codebook.t().contiguous()
    parts = [torch.addmm(bias, part, transposed).argmax(1).int() for part in x.split(step)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=x.device)


def cluster_means(x: Tensor, codes: Tensor, n_centroids: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each code, summed in fp64: (fp32 [K, d], counts int64 [K]); no rows, mean 0."""
    if kernel.usable(x):
        sums, counts = kernel.accumulate(x, codes, n_centroids)
    else:
        sums = torch.zeros(n_centroids, x.shape[1], dtype=torch.float64, device=x.device).index_add_(0, codes, x.double())
        counts = torch.bincount(codes, minlength=n_centroids)
    return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts


def kmeans(x: Tensor, n_centroids: int, *, iterations: int = 20, seed: int = 0, start: Tensor | None = None,
           name: str = "weight") -> Clusters:  # fmt: skip
    """Cluster the rows of x [n, d] around min(n_centroids, n) codewords.

    `start` [K, d]: codewords to start from instead of drawn rows. Raises NonFiniteWeight, naming `name`.
    """
    x = x.detach().float()
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteWeight(f"{name}: {bad} of {x.numel()} values are NaN or Inf; quantise a finite weight")
    if len(x) <= n_centroids:  # every block is its own codeword
        return Clusters(torch.arange(len(x), dtype=torch.int32, device=x.device), x.clone(), (0.0,))
    # Centred and scaled to 1, in which fp32 scores neither cancel (1e4 + noise) nor underflow (1e-7).
    centred = x.double()
    shift = centred.mean(0)
    scale = float(centred.sub_(shift).abs().max()) or 1.0
    points = centred.div_(scale).float()
    centroids = _draw(points, n_centroids, seed) if start is None else ((start.double() - shift) / scale).float()
    codes, history = _lloyd(points, centroids, iterations)
    codebook, _ = cluster_means(x, codes, n_centroids)
    return Clusters(codes, codebook, tuple(value * scale**2 for value in history))


def _draw(points: Tensor, n_centroids: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return points[torch.randperm(len(points), generator=generator)[:n_centroids].to(points.device)]


def _lloyd(points: Tensor, centroids: Tensor, iterations: int) -> tuple[Tensor, list[float]]:
    best, history = torch.zeros(len(points), dtype=torch.int32, device=points.device), []
    for _ in range(max(1, iterations)):
        codes = nearest(points, centroids)
        centroids, counts = cluster_means(points, codes, len(centroids))
        errors = (points - F.embedding(codes, centroids)).pow_(2).sum(1)
        objective = float(errors.sum(dtype=torch.float64))
        if history and objective >= history[-1]:
            break
        best = codes
        history.append(objective)
        if objective == 0.0:
            break
        empty = (counts == 0).nonzero().flatten()
        centroids[empty] = points[errors.topk(len(empty)).indices]
    return best, history
