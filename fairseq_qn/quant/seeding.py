"""Rows that lie apart, for k-means to start from and to move codewords to that no block chose.

Greedy k-means++ (Arthur & Vassilvitskii 2007): rows are drawn one after another, in proportion to the
squared distance from those drawn before, and of a few such rows the one that leaves the least is kept. A
copy of a row kept is never drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = 6364136223846793005  # odd and large: Knuth's, of MMIX
PART = 1 << 18  # rows at a time, which bounds what is held beside them


def keys(x: Tensor) -> Tensor:
    """int64 [n], equal for equal rows of x fp32 [n, d] and hardly ever for others.

    >>> a, b, c = keys(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])).tolist()
    >>> a == b, a == c
    (True, False)
    """
    factors = torch.full((x.shape[1],), FACTOR, device=x.device).cumprod(0)  # int64, which wraps around
    found = []
    for part in x.split(PART):
        mixed = (part + 0.0).view(torch.int32) * factors  # -0 + 0 is 0
        found.append((mixed ^ (mixed >> 32)).sum(1))
    return torch.cat(found)


def distinct(x: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """Which of the distinct rows of x [n, d] each row is, int32 [n], and those rows; None if they are more
    than `most`.

    >>> x = torch.tensor([[5.0], [7.0], [5.0]])
    >>> codes, rows = distinct(x, most=2)
    >>> len(rows), rows[codes.long()].tolist(), distinct(x, most=1)
    (2, [[5.0], [7.0], [5.0]], None)
    """
    found, codes = keys(x).unique(return_inverse=True)
    if len(found) > most:
        return None
    places = torch.arange(len(x), device=x.device)
    rows = x[places.new_full((len(found),), len(x)).scatter_reduce_(0, codes, places, "amin")]
    return (codes.int(), rows) if torch.equal(rows[codes], x) else None


def sample(mass: Tensor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows int64 [size], drawn in proportion to mass fp64 [n], and how many each stands for; all n if they
    are no more.

    >>> mass = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    >>> [found.tolist() for found in sample(mass, 2, torch.Generator())]
    [[2, 2], [0.5, 0.5]]
    """
    if len(mass) <= size:
        return torch.arange(len(mass), device=mass.device), torch.ones_like(mass)
    steps, running = (
        torch.arange(size) + torch.rand(size, generator=generator, dtype=torch.float64),
        mass.cumsum(0),
    )
    chosen = _at(running, steps.to(mass.device) / size)
    return chosen, (running[-1] / size / mass[chosen]).clamp_(max=1e30)


def apart(
    x: Tensor, weights: Tensor, count: int, generator: torch.Generator, errors: Tensor | None = None
) -> Tensor:
    """Places int64 [count], or fewer where no row is left that differs, of rows of x fp32 [n, d], in [-1,
    1], that lie apart.

    weights fp64 [n]: of the rows. errors fp32 [n]: squared distances from codewords there are already.
    """
    columns, tries = x.t().contiguous(), 2 + int(math.log(count))
    # no two rows are farther apart
    errors = x.new_full((len(x),), 4.0 * x.shape[1]) if errors is None else errors
    single, differences = weights.float(), x.new_empty(x.shape[1], tries, len(x))
    chosen, left = [], []
    for draws in torch.rand(count, tries, generator=generator, dtype=torch.float64).to(x.device):
        mass = (errors * weights).cumsum(0)
        left.append(mass[-1])
        places = _at(mass, draws)
        torch.sub(columns[:, None], columns[:, places, None], out=differences)
        reached = differences.square_().sum(0).minimum(errors)  # [tries, n]
        best = (reached * single).sum(1).argmin()
        errors = reached[best]
        chosen.append(places[best])
    return torch.stack(chosen)[torch.stack(left) > 0]


def _at(mass: Tensor, shares: Tensor) -> Tensor:
    """The rows where the running total mass [n] passes these shares, in [0, 1), of it."""
    return torch.searchsorted(mass, shares * mass[-1], right=True).clamp_(max=len(mass) - 1)
