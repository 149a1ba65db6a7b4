"""Compressed modules: a loaded model's layers that hold codes and codebooks, or integers, instead of a dense
weight.

They are made from dense modules by swapping the instance's class, so every attribute (stride, padding_idx,
bias, ...) stays, and `.weight` stands in for the dense weight when read, so that attention and tied heads,
which never call the layer, read it too: products with it are computed from the codes (lazy.py), and whatever
else asks gets it decoded.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.kernels import lookup, native
from fairseq_qn.modules.lazy import LazyWeight
from fairseq_qn.quant.integer import Integers, dequantize
from fairseq_qn.quant.product import decode

CHUNK = 1 << 20  # weights that are de-quantised at a time: 4 MiB of fp32
MANY = 256  # rows of input from which de-quantising is a small part of the product


class Packed(nn.Module):
    """What both kinds share: a weight that is read, not trained."""

    def train(self, mode: bool = True) -> Packed:
        """As of any module; training leaves a packed weight as it is, and says so."""
        if mode:
            warnings.warn(
                "packed weights do not train, only what is dense beside them (biases, norms, heads); "
                'to train all, load the file with mode="dense"',
                stacklevel=2,
            )
        return super().train(mode)


class PQ(Packed):
    """Mixin: codes [out_features, blocks a row] and codebook [K, d] in place of the weight; pad_row, if
    there is one.
    """

    @property
    def weight(self) -> Tensor:
        """The weight, decoded at once unless products with it can be looked up."""
        lazy = len(self.qn_shape) == 2 and lookup.usable(self.codes, self.codebook)
        return LazyWeight(self, self.qn_shape, self.codebook) if lazy else self.decoded()

    def decoded(self) -> Tensor:
        """The dense weight."""
        return decode(self.codes, self.codebook, self.qn_shape, self.qn_padding_idx, self.pad_row)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias) by lookup, in x's dtype, which sums are rounded to; x [...,
        in_features]. Not recorded.
        """
        dtype, pad = x.dtype, self.qn_padding_idx
        bias = None if bias is None else bias.float()
        y = lookup.linear(x.float(), self.codes, self.codebook.to(dtype).float(), bias)
        if pad is not None:
            y[..., pad] = 0 if self.pad_row is None else x.float() @ self.pad_row.to(dtype).float()
            if bias is not None:
                y[..., pad] += bias[pad]
        return y.to(dtype)

    def pack(
        self,
        codes: Tensor,
        codebook: Tensor,
        shape: tuple[int, ...],
        padding_idx: int | None,
        pad: Tensor | None = None,
    ) -> None:
        """Take the place of the dense weight."""
        self.qn_shape, self.qn_padding_idx = shape, padding_idx
        self.register_buffer("codes", codes)
        self.register_buffer("codebook", codebook)
        self.register_buffer("pad_row", pad)


class Int(Packed):
    """Mixin: levels uint8 [n_ranges, values a range], scale and zero [n_ranges] in place of the weight."""

    @property
    def weight(self) -> Tensor:
        """The weight, de-quantised at once unless products with it can take it bit by bit."""
        lazy = len(self.qn_shape) == 2 and self.scale.device.type == "cpu" and not native.watched()
        return LazyWeight(self, self.qn_shape, self.scale) if lazy else self.decoded()

    def decoded(self) -> Tensor:
        """The dense weight."""
        return dequantize(Integers(self.levels, self.scale, self.zero), self.qn_shape, self.scale.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias) in x's dtype, some rows of the weight at a time, which a core's cache
        holds.

        x [..., in_features]. Not to be recorded: the rows lie in memory that the next kernel overwrites.
        """
        out, columns = self.qn_shape
        if x.numel() > MANY * columns:
            return F.linear(x, self.decoded().to(x.dtype), bias)
        step = max(1, CHUNK // columns)
        if step >= out:
            return F.linear(x, self._rows(0, out, x.dtype), bias)
        flat = x.reshape(-1, columns)
        y = flat.new_empty(len(flat), out)
        for begin in range(0, out, step):
            end = min(out, begin + step)
            torch.mm(flat, self._rows(begin, end, x.dtype).t(), out=y[:, begin:end])
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out)

    def _rows(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows begin .. end of the weight, in memory that the next kernel overwrites."""
        out, columns = self.qn_shape
        # 0: one range for all
        levels, ranges = self.levels.view(out, columns)[begin:end], len(self.scale) // out
        part = slice(begin * ranges, end * ranges) if ranges else slice(None)
        levels = levels.reshape(-1, self.levels.shape[1] if ranges else levels.numel())
        integers = Integers(levels, self.scale[part], self.zero[part])
        return dequantize(integers, (end - begin, columns), dtype, native.scratch(levels.numel()))

    def pack(self, integers: Integers, shape: tuple[int, ...]) -> None:
        """Take the place of the dense weight."""
        self.qn_shape = shape
        self.register_buffer("levels", integers.levels)
        self.register_buffer("scale", integers.scale)
        self.register_buffer("zero", integers.zero)


def swap(module: nn.Module, mixin: type, special: dict[type, type]) -> None:
    """Turn a dense module into its compressed kind, without its weight: `special` for its own type, else the
    mixin over it.
    """
    base = type(module)
    del module._parameters["weight"]
    module.__class__ = special.get(base) or _packed_class(base, mixin)


def tie(owner: nn.Module, attribute: str, home: nn.Module) -> None:
    """Let `owner.<attribute>` read the weight of a compressed module."""
    base = type(owner)
    del owner._parameters[attribute]
    owner.__dict__["_qn_home"] = home  # past nn.Module.__setattr__: not a submodule
    owner.__class__ = _tied_class(base, attribute)


@cache
def _packed_class(base: type[nn.Module], mixin: type) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _rebuild_packed, (base, mixin), self.__dict__

    return type(
        mixin.__name__ + base.__name__,
        (mixin, base),
        {"__reduce_ex__": reduce, "__module__": base.__module__},
    )


@cache
def _tied_class(base: type[nn.Module], attribute: str) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _rebuild_tied, (base, attribute), self.__dict__

    body = {
        attribute: property(lambda self: self._qn_home.weight),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), body)


def _rebuild_packed(base: type[nn.Module], mixin: type) -> nn.Module:
    cls = _packed_class(base, mixin)
    return cls.__new__(cls)


def _rebuild_tied(base: type[nn.Module], attribute: str) -> nn.Module:
    cls = _tied_class(base, attribute)
    return cls.__new__(cls)
