"""What a view gives to read: a tensor to compute with, which refuses writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError, ViewError

REPARAMETRISED = (
    "weight_norm, spectral_norm, parametrize and prune take the Parameter away that a view reads; do "
    "without them here, or keep this layer dense"
)
# Methods that end in _ and do not write to the values.
_HARMLESS = {"requires_grad_", "detach_", "retain_grad", "share_memory_", "rename_"}
_OPERATORS = [
    f"__i{name}__" for name in "add and floordiv lshift mod mul or pow rshift sub truediv xor".split()
]
_WRITERS = [n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n not in _HARMLESS]
_WRITERS += ["__setitem__", *_OPERATORS]
_VIEWS = (
    "detach view view_as reshape flatten unflatten t transpose permute swapaxes movedim squeeze unsqueeze "
    "narrow select expand expand_as diagonal unfold __getitem__"
).split()


def _refuse(seen: Tensor, what: str) -> NoReturn:
    name = getattr(seen, "_qn_name", "weight")
    if what == "set_":  # parametrize's
        raise UnsupportedError(f"{name}: {REPARAMETRISED}")
    raise ViewError(
        f"{name}: {what} writes to what a view gave to read, which no Parameter sees; write to the stored "
        f"one, model.get_parameter({name!r}), or to a clone"
    )


class SeenWeight(Tensor):
    """A weight as a view shows it. What is computed from it is an ordinary tensor, but for slices."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        """The values, which refuse writes as well."""
        return _as_seen(Tensor.data.__get__(self), self)

    @data.setter
    def data(self, value: Any) -> None:
        _refuse(self, ".data =")

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        """nn.Parameter(layer.weight.data) says this last; what it makes is nobody's view."""
        self.__class__ = nn.Parameter

    def __reduce_ex__(self, protocol: int) -> Any:
        """Pickled as an ordinary tensor."""
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


def show(value: Tensor, weight: nn.Parameter, name: str) -> Tensor:
    """`value` as a view's of the Parameter `weight`, which is what assigning it to an attribute assigns."""
    if type(value) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(value):
        value.__class__ = SeenWeight
        value._qn_name = name
    value._qn_parameter = weight
    return value


def _as_seen(value: Tensor, source: Tensor) -> Tensor:
    if value.untyped_storage()._cdata == source.untyped_storage()._cdata:  # not a copy, as of indices
        value.__class__ = SeenWeight
        value._qn_name = getattr(source, "_qn_name", "weight")
    return value


def _writer(name: str) -> Callable[..., NoReturn]:
    return lambda self, *args, **kwargs: _refuse(self, name)


def _viewing(name: str) -> Callable[..., Tensor]:
    method = getattr(Tensor, name)
    return lambda self, *args, **kwargs: _as_seen(method(self, *args, **kwargs), self)


for _name in _WRITERS:
    setattr(SeenWeight, _name, _writer(_name))
for _name in _VIEWS:
    setattr(SeenWeight, _name, _viewing(_name))
SeenWeight.T = property(lambda self: _as_seen(Tensor.T.__get__(self), self))
SeenWeight.mT = property(lambda self: _as_seen(Tensor.mT.__get__(self), self))
