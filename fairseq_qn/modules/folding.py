"""A batch norm folded into the convolution before it, while both train.

    w_fold = gain w,  gain = gamma / sqrt(EMA(var) + eps), by output channel   (Jacob et al. 2018, eq. 14)

is what the scheme sees: its noise and its ranges are those of the weight that the folded network has. The
convolution reads phi(w_fold) / gain, and the batch norm stays where it is. In evaluation, and in training
with norm.eval(), it multiplies by the gain again, which leaves phi(w_fold), as published. In training it
divides by the deviation of the batch instead of the moving one: the correction of Krishnamoorthi (2018,
3.2.2), without which scales jump from batch to batch. The statistics of the batch, and so the moving ones,
are those of the convolution with the weight that is read. gamma gets its gradient through both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Fold:
    """The batch norm that follows a layer; it has a weight and running statistics."""

    norm: Any

    def gain(self, dtype: torch.dtype) -> Tensor:
        """[out], differentiable in gamma; 0 where it is too small to divide by."""
        norm = self.norm
        gain = (norm.weight.float() / (norm.running_var.float() + norm.eps).sqrt()).to(dtype)
        return torch.where(gain.abs() > torch.finfo(dtype).tiny, gain, 0)

    def into(self, weight: Tensor) -> Tensor:
        """w_fold, as of this weight [out, ...]."""
        return weight * _by_channel(self.gain(weight.dtype), weight)

    def through(self, weight: Tensor, phi: Callable[[Tensor], Tensor]) -> Tensor:
        """phi(w_fold) / gain; the weight itself where the gain is 0, and hides it."""
        gain = _by_channel(self.gain(weight.dtype), weight)
        none = gain == 0
        return torch.where(none, weight, phi(weight * gain) / torch.where(none, 1, gain))

    @torch.no_grad()
    def moved(self, layer: nn.Module) -> dict[int, Tensor]:
        """The gain moved from the batch norm into the layer: id of a tensor -> what stands in its place
        beside w_fold. The two compute the same as before, in training too.
        """
        norm, gain = self.norm, self.gain(torch.float32)
        var = norm.running_var.float() * gain.square()
        found = {
            id(norm.weight): nn.Parameter((var + norm.eps).sqrt()),  # a gain of 1
            id(norm.running_mean): norm.running_mean.float() * gain,
            id(norm.running_var): var,
        }
        bias: Any = layer.bias
        return found if bias is None else {**found, id(bias): nn.Parameter(bias.float() * gain)}


def _by_channel(gain: Tensor, weight: Tensor) -> Tensor:
    return gain.view(-1, *[1] * (weight.dim() - 1))
