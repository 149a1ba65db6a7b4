"""Compressed modules: a loaded model's layers that hold what the file stores instead of a dense weight.

They are made from dense modules by swapping the instance's class, so every attribute (stride, padding_idx,
bias, ...) stays, and `.weight` stands in for the dense weight when read, so that attention and tied heads,
which never call the layer, read it too: products with it are computed from what is stored where its scheme
knows how (lazy.py), and whatever else asks gets it decoded.
"""

from __future__ import annotations

import warnings
from functools import cache

from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.kernels import native
from fairseq_qn.modules.lazy import LazyWeight
from fairseq_qn.schemes.base import Stored


class Packed(nn.Module):
    """Mixin: a weight that is read, not trained. Its tensors are the module's buffers."""

    _qn_transposed = False  # the module's weight is [in, out], what is stored [out, in]

    @property
    def weight(self) -> Tensor:
        """The weight, decoded at once unless products with it may do without."""
        stored = self.qn_stored
        lazy = len(stored.shape) == 2 and stored.like.device.type == "cpu" and not native.watched()
        return LazyWeight(stored, self._qn_transposed) if lazy else self.decoded()

    @property
    def qn_stored(self) -> Stored:
        """What stands for the weight, with the tensors where they are now."""
        return self._qn_layout.holding(self._buffers)

    def decoded(self) -> Tensor:
        """The dense weight."""
        weight = self.qn_stored.dense()
        return weight.t() if self._qn_transposed else weight

    def train(self, mode: bool = True) -> Packed:
        """As of any module; training leaves a packed weight as it is, and says so."""
        if mode:
            warnings.warn(
                "packed weights do not train, only what is dense beside them (biases, norms, heads); "
                'to train all, load the file with mode="dense"',
                stacklevel=2,
            )
        return super().train(mode)

    def extra_repr(self) -> str:
        """As of the dense module, and what is stored."""
        return ", ".join(filter(None, (super().extra_repr(), self._qn_label)))


class PackedEmbedding(Packed):
    """An Embedding of which only the rows that are asked for are decoded."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the table: integers of any shape -> [..., embedding_dim]."""
        if self.max_norm is None:
            return self.qn_stored.rows(input)
        table, m = self.decoded(), self  # max_norm clips rows of the whole table
        return F.embedding(
            input, table, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse
        )


def pack(module: nn.Module, stored: Stored, label: str = "packed", transposed: bool = False) -> None:
    """Let `stored` take the place of a dense module's weight; its floating-point tensors take that one's
    dtype. transposed: the module's weight is the other way round.
    """
    base, dtype = type(module), module._parameters.pop("weight").dtype
    module.__class__ = _packed_class(base, stored.PREFIX)
    for name, tensor in stored.tensors().items():
        real = tensor is not None and tensor.is_floating_point()
        module.register_buffer(name, tensor.to(dtype) if real else tensor)
    module._qn_layout = stored.holding(dict.fromkeys(stored.TENSORS))
    module._qn_label = label
    if transposed:
        module._qn_transposed = True


def tie(module: nn.Module, attribute: str, packed: nn.Module) -> None:
    """Let `module.<attribute>` read the weight of a compressed module."""
    base = type(module)
    del module._parameters[attribute]
    module.__dict__["_qn_packed"] = packed  # past nn.Module.__setattr__: not a submodule
    module.__class__ = _tied_class(base, attribute)


@cache
def _packed_class(base: type[nn.Module], prefix: str) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _rebuild_packed, (base, prefix), self.__dict__

    mixin = PackedEmbedding if base.forward is nn.Embedding.forward else Packed
    return type(
        prefix + base.__name__, (mixin, base), {"__reduce_ex__": reduce, "__module__": base.__module__}
    )


@cache
def _tied_class(base: type[nn.Module], attribute: str) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: int) -> tuple:
        return _rebuild_tied, (base, attribute), self.__dict__

    body = {
        attribute: property(lambda self: self._qn_packed.weight),
        "__reduce_ex__": reduce,
        "__module__": base.__module__,
    }
    return type(base.__name__, (base,), body)


def _rebuild_packed(base: type[nn.Module], prefix: str) -> nn.Module:
    cls = _packed_class(base, prefix)
    return cls.__new__(cls)


def _rebuild_tied(base: type[nn.Module], attribute: str) -> nn.Module:
    cls = _tied_class(base, attribute)
    return cls.__new__(cls)
