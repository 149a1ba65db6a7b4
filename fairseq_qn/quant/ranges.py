"""Ranges of integers, by what they may lose.

minmax          nothing: they hold every weight (Jacob et al. 2018)
percentile      0.1% of the weights at each end
histogram       the least square error over the weights, in BINS bins where a range has more
least_squares   the same over the weights themselves

affine     zero is one of the levels 0 .. 2^bits - 1, where the range puts it
symmetric  zero is 2^(bits - 1), 127 at 8 bits: -127 .. 127 (Jacob et al. 2018)
ternary    -scale, 0, scale (Li and Liu 2016, whose problem `least_squares` solves)
1 bit      -scale, scale; the mean size of the weights has the least square error (Rastegari et al. 2016)

A square error is worst where an outlier is clipped: to keep one weight of 50 it would give up all others of
0.02. So weights beyond OUTLIER times the percentile of the sizes are left out of the error.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairseq_qn.quant.integer import Ranges, minmax, steps_of

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("minmax", "percentile", "histogram", "least_squares")
TERNARY = "ternary"
SHARE, OUTLIER, BINS = 0.999, 4.0, 2048
FACTORS = [i / 20 for i in range(20, 0, -1)]  # by which ends are tried
CHUNK = 1 << 20  # weights at a time: few enough that temporaries stay in a cache
Ends = tuple["Tensor", "Tensor"]


def zero_and_top(bits: int | str, symmetric: bool) -> tuple[int | None, int]:
    """(level of zero, or None where each range has its own; the highest level).

    >>> zero_and_top(4, False), zero_and_top(4, True), zero_and_top(8, True), zero_and_top(1, True)
    ((None, 15), (8, 15), (127, 254), (1, 2))
    """
    if bits == TERNARY or bits == 1:
        return 1, 2
    whole = int(bits)
    return (
        (2 ** (whole - 1) - (whole == 8), 2**whole - 1 - (whole == 8)) if symmetric else (None, 2**whole - 1)
    )


def find(rows: Tensor, method: str, bits: int | str, symmetric: bool) -> Ranges:
    """The ranges of fp32 [n_ranges, values a range] by one of METHODS; 1 bit has one of its own.

    >>> rows = torch.tensor([[-0.1, 0.0, 0.1, 0.3] * 100 + [50.0]])
    >>> [round(float(find(rows, method, 4, True).scale), 3) for method in METHODS]
    [7.143, 0.043, 0.044, 0.044]
    """
    zero, top = zero_and_top(bits, symmetric)
    if bits == 1:
        size = torch.linalg.vector_norm(rows, 1, dim=1, keepdim=True, dtype=torch.float64) / rows.shape[1]
        return Ranges(size.float(), torch.ones_like(size, dtype=torch.float32), top, signs=True)
    if method == "minmax":
        return minmax(rows, int(bits)) if zero is None else _over(_largest(rows), zero, top, holding=True)
    if method == "percentile":
        return _over(_tails(rows, symmetric), zero, top)
    parts = [_least_squares(part, zero, top, method) for part in rows.split(max(1, CHUNK // rows.shape[1]))]
    return Ranges(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]), top)


def _over(ends: Ends, zero: int | None, top: int, holding: bool = False) -> Ranges:
    """Ranges from end to end; the ends of symmetric ones are as far from zero."""
    low, high = ends
    scale = high / top - low / top if zero is None else high / (top - zero)
    scale = scale.clamp_(min=torch.finfo(torch.float32).tiny)
    at = (-low / scale).round_().clamp_(0, top) if zero is None else torch.full_like(scale, zero)
    return Ranges(scale, at, top, holding=holding)


def _largest(rows: Tensor) -> Ends:
    size = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
    return -size, size


def _tails(rows: Tensor, symmetric: bool) -> Ends:
    """The ends of what SHARE of the weights do not exceed, at least all but one at each end."""
    k = 1 + int(SHARE * (rows.shape[1] - 1))
    if symmetric:
        size = rows.abs().kthvalue(k, 1, keepdim=True).values
        low, high = -size, size
    else:
        low = -(-rows).kthvalue(k, 1, keepdim=True).values.clamp_(min=0)
        high = rows.kthvalue(k, 1, keepdim=True).values.clamp_(min=0)
    largest = _largest(rows) if symmetric else _both(rows)
    empty = high == low  # almost all weights are zero: the others are what there is
    return torch.where(empty, largest[0], low), torch.where(empty, largest[1], high)


def _both(rows: Tensor) -> Ends:
    return rows.amin(1, keepdim=True).clamp_(max=0), rows.amax(1, keepdim=True).clamp_(min=0)


def _least_squares(rows: Tensor, zero: int | None, top: int, method: str) -> Ranges:
    values, counts = rows.masked_fill(rows.abs() > OUTLIER * _tails(rows, True)[1], 0), None  # an error of 0
    size = _largest(values)[1].clamp_(min=torch.finfo(torch.float32).tiny)
    values /= size  # so that no square overflows
    ends = _both(values) if zero is None else _largest(values)
    if method == "histogram" and rows.shape[1] > BINS:
        values, counts = _histogram(values, *ends)
    ranges = _searched(values, counts, ends, zero, top)
    scale = (ranges.scale * size).clamp_(min=torch.finfo(torch.float32).tiny)
    return Ranges(scale, ranges.zero, top)


def _histogram(values: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """(centres, counts) of BINS bins, both [n_ranges, BINS]."""
    width = ((high - low) / BINS).clamp_(min=torch.finfo(torch.float32).tiny)
    counts = values.new_zeros(len(values), BINS)
    for part in values.split(max(1, CHUNK // len(values)), 1):
        bins = ((part - low) / width).long().clamp_(0, BINS - 1)
        counts.scatter_add_(1, bins, values.new_ones(()).expand_as(part))
    return low + width * (torch.arange(BINS, device=values.device) + 0.5), counts


def _searched(values: Tensor, counts: Tensor | None, ends: Ends, zero: int | None, top: int) -> Ranges:
    """The ranges of least square error: both ends by FACTORS, then each, then the scale in closed form."""
    low, high = ends
    best = _over(ends, zero, top)
    least = _error(values, counts, best)
    for moves_low, moves_high in [(1, 1)] if zero is not None else [(1, 1), (1, 0), (0, 1)]:
        first = low, high
        for factor in FACTORS:
            shrunk = first[0] * factor**moves_low, first[1] * factor**moves_high
            error = _error(values, counts, _over(shrunk, zero, top))
            better = error < least
            least = torch.where(better, error, least)
            low, high = torch.where(better, shrunk[0], low), torch.where(better, shrunk[1], high)
    best = _over((low, high), zero, top)
    for moved in (0,) if zero is not None else (0, -1, 1):
        tried = Ranges(best.scale, (best.zero + moved).clamp_(0, top), top)
        for _ in range(4):  # the best scale of the levels, the best levels of the scale
            tried = Ranges(_best_scale(values, counts, tried), tried.zero, top)
        error = _error(values, counts, tried)
        better, least = error < least, torch.minimum(error, least)
        scale = torch.where(better, tried.scale, best.scale)
        best = Ranges(scale, torch.where(better, tried.zero, best.zero), top)
    return best


def _best_scale(values: Tensor, counts: Tensor | None, ranges: Ranges) -> Tensor:
    """Of the levels that these ranges give, by regression."""
    steps = steps_of(values, ranges)
    weighted = steps if counts is None else steps * counts
    scale = (weighted * values).sum(1, keepdim=True) / (weighted * steps).sum(1, keepdim=True)
    return torch.where(scale > 0, scale, ranges.scale)  # NaN where all levels are zero


def _error(values: Tensor, counts: Tensor | None, ranges: Ranges) -> Tensor:
    errors = steps_of(values, ranges).mul_(ranges.scale).sub_(values).square_()
    return (errors if counts is None else errors.mul_(counts)).sum(1, keepdim=True)
