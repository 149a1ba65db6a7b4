"""The penalty on the size of what learns its bits (Defossez et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fairseq_qn import api
from fairseq_qn.criterions.options import Options
from fairseq_qn.criterions.terms import Term
from fairseq_qn.errors import UnsupportedError


class Size(Term):
    """loss + sample_size * weight * MiB: fairseq divides by the sample size."""

    def __init__(self, weight: float) -> None:
        self.weight = weight

    @classmethod
    def of(cls, options: Options, task: Any) -> Size | None:
        """With a weight above 0."""
        weight = float(options.size_weight)
        if not 0 <= weight < float("inf"):
            raise UnsupportedError(f"quantization_aware: expected size_weight of 0 or more, found {weight}")
        return cls(weight) if weight else None

    def add(
        self, loss: Tensor, model: Any, sample: dict[str, Any], sample_size: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises UnsupportedError where no layer learns its size."""
        size = api.size_penalty(model)
        with torch.no_grad():
            real = api.size_penalty(model, rounded=False)
        figures = {"qn_size_mib": size.detach(), "qn_real_size_mib": real}
        return loss + sample_size * self.weight * size, figures
