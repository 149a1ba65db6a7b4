"""A layer of a loaded model on integers (Jacob et al. 2018, 2.1 to 2.4), and a transformer's Linears so.

    input     fp32 -> uint8, in the static range that the file has for it
    product   uint8 x int8 -> int32, with a bias in int32
    output    requantised to one scale, int32, and from there to fp32

What lies between a transformer's Linears stays fp32: softmax, LayerNorm, GELU, products of activations in
attention, tables of embeddings and what is tied to them, and Linears that its recipe left dense.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.activation_view import takes_numbers
from fairseq_qn.modules.packed import Packed
from fairseq_qn.quant import integer_ops
from fairseq_qn.quant.activations import affine
from fairseq_qn.quant.fixed_point import multiplier, rescale
from fairseq_qn.schemes.activation import Static


def input_range(name: str, module: nn.Module) -> tuple[float, int]:
    """(scale, zero) of what a layer reads. Raises UnsupportedError."""
    static = module.__dict__.get("_qn_activation")
    if not isinstance(static, Static) or static.bits != 8:
        raise UnsupportedError(
            f"mode integer: {name}: expected a static range of 8 bits for its input; its rule needs "
            "activations: {bits: 8, ranges: static}"
        )
    scale, zero = affine(torch.tensor(static.low), torch.tensor(static.high), 8)
    return float(scale), int(zero)


def levels_of(x: Tensor, scale: float, zero: int) -> Tensor:
    """fp32 -> uint8."""
    levels = (x.detach().float() / scale).round_().nan_to_num_(nan=0.0) + zero
    return levels.clamp_(0, 255).to(torch.uint8)


class Integers(NamedTuple):
    """scale, zero of what a layer reads; weight int8, bias int32 [out], scales [out] of its products."""

    scale: float
    zero: int
    weight: Tensor
    bias: Tensor
    sizes: Tensor


def integers_of(name: str, module: Any, norm: Any = None) -> Integers:
    """Of a packed layer, with the batch norm that follows it folded in. Raises UnsupportedError."""
    stored = module.qn_stored.signed() if isinstance(module, Packed) else None
    if stored is None:
        raise UnsupportedError(
            f"mode integer: {name}: expected symmetric integers over a tensor or channels; its rule has to "
            "say scheme: integer, symmetric: true, or scheme: product, codebook_bits: 8"
        )
    scale, zero = input_range(name, module)
    levels, sizes = stored
    bias = levels.new_zeros(len(levels), dtype=torch.float64)
    bias = bias if module.bias is None else module.bias.detach().double()
    gain, offset = _gain(norm, len(levels))
    sizes = (sizes.double() * scale).expand(len(levels))
    weight, whole, sizes = integer_ops.fold(levels, sizes, bias * gain + offset, gain)
    if not integer_ops.fits(weight, whole):
        raise UnsupportedError(f"mode integer: {name}: its sums may pass 32 bits; make it narrower")
    return Integers(scale, zero, weight, whole, sizes)


class IntegerLinear(nn.Module):
    """Of a packed Linear: fp32 in and out, integers between. It does not train."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.scale, self.zero, weight, bias, sizes = integers_of(name, module)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("levels", weight)
        self.register_buffer("bias", bias)
        self.by, self.step = multiplier(sizes / sizes.max()), float(sizes.max())

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        q = levels_of(x, self.scale, self.zero).reshape(-1, self.in_features)
        return (self.integers(q).to(x.dtype) * self.step).view(*x.shape[:-1], self.out_features)

    def integers(self, q: Tensor) -> Tensor:
        """uint8 [n, in] -> int32 [n, out], on integers alone."""
        return rescale(integer_ops.linear(q, self.zero, self.levels, self.bias), self.by)

    def extra_repr(self) -> str:
        """As of a Linear."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


@torch.no_grad()
def integer_linears(model: nn.Module) -> nn.Module:
    """A packed model, in place, with an IntegerLinear for each Linear that is quantised.

    Raises UnsupportedError where one has no symmetric integers, int8 codebook or static range of 8 bits, by
    its name, and where there is none.
    """
    found = {
        name: IntegerLinear(name, module)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Packed) and takes_numbers(module) and not isinstance(module, nn.Conv2d)
    }
    if not found:
        raise UnsupportedError("mode integer: none of the model's Linears is quantised")
    for name, module in found.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return model


def _gain(norm: Any, n: int) -> tuple[Tensor, Tensor]:
    """(gain, offset) float64 [n]: x -> gain x + offset; of no norm, 1 and 0."""
    gain, offset = torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    if norm is None:
        return gain, offset
    gain = gain / (norm.running_var.double() + norm.eps).sqrt()
    gain = gain if norm.weight is None else gain * norm.weight.detach().double()
    offset = offset if norm.bias is None else norm.bias.detach().double()
    return gain, offset - norm.running_mean.double() * gain
