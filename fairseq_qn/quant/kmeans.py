"""Codebook learning: Lloyd's algorithm, seeded, in fp32, without a Python loop over codewords.

Minimises sum_i ||x_i - c[code_i]||^2 (Fan et al. 2020, eq. 2). Rules, so that the same input gives the same codes:
* it starts from K distinct rows drawn by the seed; where there are plenty of rows, from what ten steps on a sample of 32 K of
  them make of those, which costs about a step and leaves some 0.2% less error after twenty;
* a codeword that no block chose is moved onto the block with the largest error, the next such onto the next, and so on;
* it stops when the objective no longer falls. A step that rounding makes worse is thrown away, so the objective never rises.

Blocks are searched for in fp32, centred and scaled, in which scores neither cancel (1e4 + noise) nor underflow (1e-7); means
and objectives are those of the blocks themselves, in fp64. A step reads the blocks once: the objective is what the means leave
of the energy, sum |x - mean|^2 - sum n_k |c_k - mean|^2, except where that cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.kernels import nearest as kernel

CHUNK = 1 << 18  # scores held at a time: 1 MiB of fp32, which stays in a core's cache
SAMPLE, SAMPLE_STEPS = 32, 10  # rows for each codeword, and steps on them, before the first on all rows
CANCELS = 1e-6  # of the energy: an objective below this share is summed up block by block


@dataclass(frozen=True)
class Clusters:
    """codes int32 [n], codebook fp32 [K, d] (the mean of each code's blocks), the objective after each iteration.

    energy: sum of squares of the input, which the objective is a share of.
    """

    codes: Tensor
    codebook: Tensor
    history: tuple[float, ...]
    energy: float

    @property
    def objective(self) -> float:
        """sum of squared errors, in the units of the input, squared."""
        return self.history[-1]


@dataclass(frozen=True)
class _Points:
    """Blocks as they are searched for: (x - shift) / scale. energy: sum of |x - shift|^2, fp64 scalar."""

    x: Tensor  # fp32 [n, d]
    points: Tensor
    shift: Tensor  # fp64 [d]
    scale: float  # a power of two, so that scaling is exact
    energy: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Points:
        shift = _mean(x)
        low, high = torch.aminmax(x)
        spread = torch.maximum(high - shift.min(), shift.max() - low)
        scale = 2.0 ** math.frexp(float(spread))[1]
        if kernel.usable(x):
            points, energy = kernel.lay_out(x, shift, scale)
            return cls(x, points, shift, scale, torch.tensor(energy, dtype=torch.float64))
        points, energy = torch.empty_like(x), shift.new_zeros(())
        for source, target in zip(x.split(CHUNK), points.split(CHUNK)):
            centred = source.double() - shift
            target.copy_(centred / scale)
            energy += centred.square_().sum()
        return cls(x, points, shift, scale, energy)

    def place(self, rows: Tensor) -> Tensor:
        """Rows [..., d] in the units of the points, fp32."""
        return ((rows.double() - self.shift) / self.scale).float()

    def assign(self, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int32 [n] by a codebook in the units of the points; means fp64 [K, d] of the blocks of each; counts [K]."""
        if kernel.usable(self.x):
            codes, sums, counts = kernel.assign(self.points, self.x, codebook)
        else:
            codes = _nearest(self.points, codebook)
            sums, counts = _sums(self.x, codes, len(codebook))
        return codes, sums / counts.clamp(min=1).unsqueeze(1), counts


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codeword nearest to each row, the lowest on ties: x [n, d], codebook [K, d] -> int32 [n]."""
    if not kernel.usable(x):
        return _nearest(x, codebook)
    x = x.contiguous()
    points, _ = kernel.lay_out(x, torch.zeros(x.shape[1], dtype=torch.float64), 1.0)
    return kernel.assign(points, x, codebook)[0]


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    # argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2
    bias = codebook.pow(2).sum(1).div(-2)
    step = max(64, CHUNK // len(codebook))
    transposed = codebook.t().contiguous()
    parts = [torch.addmm(bias, part, transposed).argmax(1).int() for part in x.split(step)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=x.device)


def cluster_means(x: Tensor, codes: Tensor, n_centroids: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each code, summed in fp64: (fp32 [K, d], counts int64 [K]); no rows, mean 0."""
    sums, counts = _sums(x, codes, n_centroids)
    return (sums / counts.clamp(min=1).unsqueeze(1)).float(), counts


def _sums(x: Tensor, codes: Tensor, n_centroids: int) -> tuple[Tensor, Tensor]:
    if kernel.usable(x):
        return kernel.accumulate(x, codes, n_centroids)
    sums = torch.zeros(n_centroids, x.shape[1], dtype=torch.float64, device=x.device)
    for part, chosen in zip(x.split(CHUNK), codes.split(CHUNK)):
        sums.index_add_(0, chosen, part.double())
    return sums, torch.bincount(codes, minlength=n_centroids)


def _mean(x: Tensor) -> Tensor:
    # 64 sums in turn need not wait for each other
    turn = torch.arange(len(x), dtype=torch.int32, device=x.device).bitwise_and_(63)
    return _sums(x, turn, 64)[0].sum(0) / len(x)


def count_nonfinite(x: Tensor) -> int:
    """How many values are NaN or Inf; where there are none, in one pass without a temporary."""
    return 0 if bool(torch.isfinite(x.sum())) else int((~torch.isfinite(x)).sum())


def kmeans(x: Tensor, n_centroids: int, *, iterations: int = 20, seed: int = 0, start: Tensor | None = None,
           name: str = "weight") -> Clusters:  # fmt: skip
    """Cluster the rows of x [n, d] around min(n_centroids, n) codewords.

    `start` [K, d]: codewords to start from instead of drawn rows. Raises NonFiniteWeight, naming `name`.
    """
    x = x.detach().float().contiguous()
    if bad := count_nonfinite(x):
        raise NonFiniteWeight(f"{name}: {bad} of {x.numel()} values are NaN or Inf; quantise a finite weight")
    if len(x) <= n_centroids:  # every block is its own codeword
        energy = float(x.double().square().sum())
        return Clusters(torch.arange(len(x), dtype=torch.int32, device=x.device), x.clone(), (0.0,), energy)
    return _lloyd(_Points.of(x), _begin(x, n_centroids, seed) if start is None else start, iterations)


def _begin(x: Tensor, n_centroids: int, seed: int) -> Tensor:
    """Codewords [K, d] to start from: rows drawn by the seed, or where there are plenty, what they become on a sample."""
    generator = torch.Generator().manual_seed(seed)
    size = SAMPLE * n_centroids
    if len(x) < 4 * size:
        return x[_draw(len(x), n_centroids, generator).to(x.device)]
    sample = x[_draw(len(x), size, generator).to(x.device)]
    return _lloyd(_Points.of(sample), sample[:n_centroids], SAMPLE_STEPS).codebook


def _draw(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k of n rows, one from each of k equal slices, in a random order: a permutation of all rows would take too long."""
    bounds = torch.arange(k + 1) * n // k
    rows = bounds[:-1] + (torch.rand(k, generator=generator, dtype=torch.float64) * bounds.diff()).long()
    return rows[torch.randperm(k, generator=generator)]


def _lloyd(points: _Points, start: Tensor, iterations: int) -> Clusters:
    centroids, history = points.place(start), []
    for _ in range(max(1, iterations)):
        codes, means, counts = points.assign(centroids)
        explained = _total(counts * (means - points.shift).square().sum(1))
        objective, n_empty = torch.stack([points.energy - explained, (counts == 0).sum().double()]).tolist()  # one wait
        cancels = objective < CANCELS * float(points.energy)
        errors = _errors(points.x, codes, means) if cancels or n_empty else None
        if cancels:
            objective = float(_total(errors))
        if history and objective >= history[-1]:
            break
        best = codes, means
        history.append(objective)
        if objective == 0.0:
            break
        centroids = points.place(means)
        if n_empty:
            centroids[counts == 0] = points.place(points.x[errors.topk(int(n_empty)).indices])
    codes, means = best
    energy = float(points.energy + len(codes) * points.shift.square().sum())
    return Clusters(codes, means.float(), tuple(history), energy)


def _total(values: Tensor) -> Tensor:
    """The sum [] of values [n], added in their order: that of torch's sum depends on the number of threads."""
    return values.cumsum(0)[-1]


def _errors(x: Tensor, codes: Tensor, means: Tensor) -> Tensor:
    """|x - mean of its code|^2 of each row, fp64 [n]."""
    parts = zip(x.split(CHUNK), codes.split(CHUNK))
    return torch.cat([(part.double() - F.embedding(chosen, means)).square_().sum(1) for part, chosen in parts])
