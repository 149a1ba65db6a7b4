"""The noise of a recipe: data, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq_qn.errors import RecipeError
from fairseq_qn.lines import one_of, only

KINDS = ("none", "proxy", "exact")


@dataclass(frozen=True)
class Noise:
    """Quantisation noise: which phi, and with which probability at which update (Fan et al. 2020, eq. 4).

    `p` is a number, or knots [[update, p], ...] between which p is interpolated and outside which it is
    held. `refresh`: when the codebooks of exact noise are learned anew: "epoch", or a number of updates.
    """

    kind: str = "none"
    p: tuple[tuple[int, float], ...] = ((0, 0.0),)
    refresh: str | int = "epoch"

    def at(self, update: int) -> float:
        """The noise probability at an update.

        >>> noise = Noise("proxy", p=((0, 0.0), (100, 0.5)))
        >>> [noise.at(update) for update in (0, 50, 100, 900)]
        [0.0, 0.25, 0.5, 0.5]
        """
        before = [knot for knot in self.p if knot[0] <= update]
        after = [knot for knot in self.p if knot[0] > update]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (u0, p0), (u1, p1) = before[-1], after[0]
        return p0 + (p1 - p0) * (update - u0) / (u1 - u0)

    @classmethod
    def parse(cls, data: Any, where: str) -> Noise:
        """The `noise` lines of a recipe. Raises RecipeError."""
        if data is None:
            return cls()
        only(data, ("kind", "p", "refresh"), where)
        kind = data.get("kind")
        one_of(kind, KINDS, f"{where}.kind")
        if kind != "none" and "p" not in data:
            raise RecipeError(f"{where}.p: expected the probability of {kind} noise, found none")
        p, refresh = data.get("p", 0.0), data.get("refresh", "epoch")
        knots = p if isinstance(p, (list, tuple)) else [[0, p]]
        try:
            if any(isinstance(number, (bool, str)) for knot in knots for number in knot):
                raise TypeError
            knots = tuple((int(update), float(value)) for update, value in knots)
        except (TypeError, ValueError, OverflowError):
            raise RecipeError(f"{where}.p: expected a number or [[update, p], ...], found {p!r}") from None
        if not knots or not all(0 <= value <= 1 for _, value in knots) or [*knots] != sorted(knots):
            raise RecipeError(f"{where}.p: expected probabilities in [0, 1] at rising updates, found {p!r}")
        if refresh != "epoch" and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
            raise RecipeError(f"{where}.refresh: expected `epoch` or a number of updates, found {refresh!r}")
        return cls(kind, knots, refresh)
