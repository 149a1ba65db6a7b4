"""Codebook learning: Lloyd's algorithm, seeded, in fp32, without a Python loop over codewords.

Minimises sum_i ||x_i - c[code_i]||^2 (Fan et al. 2020, eq. 2). Rules, so that the same input gives the same
codes:
* it starts from K rows drawn by the seed; where there are plenty of rows, from what ten steps on a sample of
  32 K of them make of those, which costs about a step and leaves some 0.2% less error after twenty;
* where drawn rows are equal, rows are few, or one lies far out, it starts from rows that lie apart
  (seeding.py): drawn ones would leave up to a hundred times the error. Where no more than K rows differ,
  they are the codewords, without error;
* codewords that no block chose are moved onto blocks with large errors, apart from each other;
* it stops when the objective no longer falls. A step that rounding makes worse is thrown away, so the
  objective never rises.

Blocks are searched for in fp32, centred and scaled, in which scores neither cancel (1e4 + noise) nor
underflow (1e-7); means and objectives are those of the blocks themselves, in fp64. A step reads the blocks
once: the objective is what the means leave of the energy, sum |x - mean|^2 - sum n_k |c_k - mean|^2, except
where that cancels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.kernels import nearest as kernel
from fairseq_qn.quant import seeding

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 18  # scores held at a time: 1 MiB of fp32, which stays in a core's cache
SAMPLE, SAMPLE_STEPS = 32, 10  # rows for each codeword, and steps on them, before the first on all rows
FEW = 8  # rows for each codeword: with fewer, drawn rows are not good enough to start from
# codewords at most that are chosen one by one, from a sample of so many rows for each
GREEDY, POOL = 1024, 16
CANCELS = 1e-6  # of the energy: an objective below this share is summed up block by block


@dataclass(frozen=True)
class Clusters:
    """codes int32 [n], codebook fp32 [K, d] (the mean of each code's blocks), the objective after each
    iteration.

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
    spread: float  # the largest |x - shift| of an element, or a little more
    scale: float  # a power of two, so that scaling is exact
    energy: Tensor

    @classmethod
    def of(cls, x: Tensor) -> _Points:
        shift = _mean(x)
        low, high = torch.aminmax(x)
        spread = float(torch.maximum(high - shift.min(), shift.max() - low))
        scale = 2.0 ** math.frexp(spread)[1]
        if kernel.usable(x):
            points, total = kernel.lay_out(x, shift, scale)
            return cls(x, points, shift, spread, scale, torch.tensor(total, dtype=torch.float64))
        points, energy = torch.empty_like(x), shift.new_zeros(())
        for source, target in zip(x.split(CHUNK), points.split(CHUNK)):
            centred = source.double() - shift
            target.copy_(centred / scale)
            energy += centred.square_().sum()
        return cls(x, points, shift, spread, scale, energy)

    def place(self, rows: Tensor) -> Tensor:
        """Rows [..., d] in the units of the points, fp32."""
        return ((rows.double() - self.shift) / self.scale).float()

    def assign(self, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes int32 [n] by a codebook in units of the points; means fp64 [K, d]; counts [K]."""
        if kernel.usable(self.x):
            codes, sums, counts = kernel.assign(self.points, self.x, codebook)
        else:
            codes = _nearest(self.points, codebook)
            sums, counts = _sums(self.x, codes, len(codebook))
        return codes, sums / counts.clamp(min=1).unsqueeze(1), counts


def _nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The codeword nearest to each row, the lowest on ties: x [n, d], codebook [K, d] -> int32 [n]."""
    # argmin ||x - c||^2 = argmax x.c - ||c||^2 / 2
    bias = codebook.pow(2).sum(1).div(-2)
    step = max(64, CHUNK // len(codebook))
    transposed = codebook.t().contiguous()
    return torch.cat([torch.addmm(bias, part, transposed).argmax(1).int() for part in x.split(step)])


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
    """How many values are NaN or Inf; where there are none, in one pass without a temporary.

    >>> count_nonfinite(torch.tensor([1.0, float("nan"), float("-inf")]))
    2
    """
    return 0 if bool(torch.isfinite(x.sum())) else int((~torch.isfinite(x)).sum())


def kmeans(x: Tensor, n_centroids: int, *, iterations: int = 20, seed: int = 0, start: Tensor | None = None,
           name: str = "weight") -> Clusters:  # fmt: skip
    """Cluster the rows of x [n, d] around min(n_centroids, n) codewords.

    `start` [K, d]: codewords to start from instead of drawn rows. Raises NonFiniteWeight, naming `name`.

    >>> found = kmeans(torch.tensor([[0.0], [9.0], [1.0], [11.0]]), 2)
    >>> found.codebook[found.codes.long()].tolist(), found.objective
    ([[0.5], [10.0], [0.5], [10.0]], 2.5)
    """
    x = x.detach().float().contiguous()
    if bad := count_nonfinite(x):
        raise NonFiniteWeight(
            f"{name}: {bad} of {x.numel()} values are NaN or Inf; quantise a finite weight"
        )
    if len(x) <= n_centroids:  # every block is its own codeword
        energy = float(x.double().square().sum())
        return Clusters(torch.arange(len(x), dtype=torch.int32, device=x.device), x.clone(), (0.0,), energy)
    points, generator = _Points.of(x), torch.Generator().manual_seed(seed)
    first = _begin(points, n_centroids, generator) if start is None else start
    if _repeats(first):
        if exact := _exact(x, n_centroids):
            return exact
        if start is None and n_centroids <= GREEDY:
            first = _apart(points, n_centroids, n_centroids, generator)
    found = _lloyd(points, first, iterations, generator)
    # codewords are left over where no more than K rows differ, some too close for fp32 scores to tell apart
    if found.objective > 0 and not torch.bincount(found.codes, minlength=n_centroids).all():
        return _exact(x, n_centroids) or found
    return found


def _exact(x: Tensor, k: int) -> Clusters | None:
    """The distinct rows of x [n, d] as codewords; None if they are more than k."""
    exact = seeding.distinct(x, k)
    if exact is None:
        return None
    codebook = torch.nn.functional.pad(exact[1], (0, 0, 0, k - len(exact[1])))
    return Clusters(exact[0], codebook, (0.0,), float(x.double().square().sum()))


def _begin(points: _Points, k: int, generator: torch.Generator) -> Tensor:
    """Codewords [k, d] to start from: drawn rows, what steps on a sample make of them, or rows apart."""
    x, size = points.x, SAMPLE * k
    # one element has more of it than the blocks of a codeword have
    far = k * points.spread**2 > float(points.energy)
    if k <= GREEDY and (len(x) < FEW * k or far):
        return _apart(points, k, k, generator)
    plenty = len(x) >= 4 * size
    rows = x[_draw(len(x), size if plenty else k, generator).to(x.device)]
    if not plenty or _repeats(rows[:k]):
        return rows[:k]
    return _lloyd(_Points.of(rows), rows[:k], SAMPLE_STEPS, generator).codebook


def _repeats(rows: Tensor) -> bool:
    return len(seeding.keys(rows.float()).unique()) < len(rows)


def _apart(
    points: _Points, count: int, k: int, generator: torch.Generator, errors: Tensor | None = None
) -> Tensor:
    """Rows [count, d] that lie apart, with errors fp64 [n] also from the codewords that leave these.

    They come from a sample: by the errors, or half uniform, half by the squared distance to the mean, so
    that it holds what lies far out (Bachem, Lucic & Krause 2018). Where too few rows differ, the last are
    copies of one.
    """
    mass = errors
    if mass is None:
        one = torch.zeros(len(points.x), dtype=torch.int32, device=points.x.device)
        mass = _errors(points.x, one, points.shift.unsqueeze(0))
        mass = mass + (_total(mass) / len(mass)).clamp(min=1e-300)
    greedy = count <= GREEDY
    chosen, weights = seeding.sample(mass, POOL * k if greedy else count, generator)
    rows = points.x[chosen]
    if greedy:
        near = None if errors is None else (errors[chosen] / points.scale**2).float()
        rows = rows[seeding.apart(points.place(rows), weights, count, generator, near)]
    return torch.cat([rows, points.x[:1].expand(count - len(rows), -1)])


def _draw(n: int, k: int, generator: torch.Generator) -> Tensor:
    """k of n rows, one from each of k equal slices, in random order: to permute all takes too long."""
    bounds = torch.arange(k + 1) * n // k
    rows = bounds[:-1] + (torch.rand(k, generator=generator, dtype=torch.float64) * bounds.diff()).long()
    return rows[torch.randperm(k, generator=generator)]


def _lloyd(points: _Points, start: Tensor, iterations: int, generator: torch.Generator) -> Clusters:
    """Steps from codewords start [K, d]; the generator draws where codewords without blocks go."""
    centroids = points.place(start)
    history: list[float] = []
    for _ in range(max(1, iterations)):
        codes, means, counts = points.assign(centroids)
        explained = _total(counts * (means - points.shift).square().sum(1))
        # one wait
        objective, n_empty = torch.stack([points.energy - explained, (counts == 0).sum().double()]).tolist()
        cancels = objective < CANCELS * float(points.energy)
        errors = _errors(points.x, codes, means) if cancels or n_empty else None
        if errors is not None and cancels:
            objective = float(_total(errors))
        if history and objective >= history[-1]:
            break
        best = codes, means
        history.append(objective)
        if objective == 0.0:
            break
        centroids = points.place(means)
        if n_empty:
            centroids[counts == 0] = points.place(
                _apart(points, int(n_empty), len(counts), generator, errors)
            )
    codes, means = best
    energy = float(points.energy + len(codes) * points.shift.square().sum())
    return Clusters(codes, means.float(), tuple(history), energy)


def _total(values: Tensor) -> Tensor:
    """The sum [] of values [n] in their order: that of torch's sum depends on the number of threads."""
    return values.cumsum(0)[-1]


def _errors(x: Tensor, codes: Tensor, means: Tensor) -> Tensor:
    """|x - mean of its code|^2 of each row, fp64 [n]."""
    parts = zip(x.split(CHUNK), codes.split(CHUNK))
    return torch.cat(
        [
            (part.double() - torch.nn.functional.embedding(chosen, means)).square_().sum(1)
            for part, chosen in parts
        ]
    )
