"""Building a model without drawing the initial weights that nobody will read."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

_DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"}
_FILLS = {"cpu", "fill_", "zero_", "copy_"}


class Undrawn(TorchFunctionMode):
    """While entered, tensors are not drawn; `places` notes where in memory they lie.

    Those on the meta device are left as they are altogether: there is nothing to fill, and the CPU, where
    fairseq draws, has no room. torch's own normal_ of a meta tensor would do, but imports its compiler:
    0.9 s and 100 MB.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _DRAWS or name in _FILLS:
            target = args[0] if args else kwargs["tensor"]  # torch.nn.init names its argument
            if target.is_meta:
                return target
            if name in _DRAWS:
                self.places.add(place(target))
                return target
        return func(*args, **kwargs)


def place(tensor: Tensor) -> int:
    """Where in memory a tensor lies."""
    return tensor.untyped_storage().data_ptr()
