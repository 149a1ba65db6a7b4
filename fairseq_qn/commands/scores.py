"""Answers against labels: shares and correlations of plain lists; percent where it says so."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


def accuracy(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Percent of places that are alike.

    >>> accuracy("aab", "abb")
    66.66666666666667
    """
    return 100 * sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def macro_f1(found: Sequence[Hashable], expected: Sequence[Hashable]) -> float:
    """Mean over the classes of 2 TP / (2 TP + FP + FN), in percent; the classes are those that occur in
    either.

    >>> macro_f1("aab", "abb")
    66.66666666666667
    """
    hits = Counter(a for a, b in zip(found, expected, strict=True) if a == b)
    either = Counter(found) + Counter(expected)
    return 100 * sum(2 * hits[name] / count for name, count in either.items()) / len(either)


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one side is constant.

    >>> pearson([1, 2, 3], [2, 4, 6]), pearson([1, 1], [1, 2])
    (1.0, None)
    """
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [a - mean_x for a in x], [b - mean_y for b in y]
    spread = math.hypot(*dx) * math.hypot(*dy)
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / spread if spread else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's correlation of the ranks; equal values share their mean rank.

    >>> spearman([1, 2, 9], [1, 2, 3])
    1.0
    """
    return pearson(_ranks(x), _ranks(y))


def _ranks(x: Sequence[float]) -> list[float]:
    order = sorted(range(len(x)), key=x.__getitem__)
    ranks, start = [0.0] * len(x), 0
    while start < len(order):
        end = start
        while end < len(order) and x[order[end]] == x[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + end - 1) / 2
        start = end
    return ranks
