"""What a model computes, as torch.fx records it: each node as the module that does the same."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from fairseq_qn.errors import UnsupportedError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
SAME = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in evaluation


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    """With the defaults of torch.flatten."""
    return nn.Flatten(start_dim, end_dim)


# functions and methods, as the modules that do the same
AS_MODULES: dict[Any, Callable[..., nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, "relu": nn.ReLU, F.relu6: nn.ReLU6,
    F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d, F.adaptive_avg_pool2d: nn.AdaptiveAvgPool2d,
    torch.flatten: _flatten, "flatten": _flatten,
}  # fmt: skip


class Graph:
    """nodes, in the order in which they are computed in evaluation.

    Raises UnsupportedError, which begins with `purpose`, for a model that torch.fx cannot record.
    """

    def __init__(self, model: nn.Module, purpose: str) -> None:
        training = [module for module in model.modules() if module.training]
        for module in training:  # not by eval(), which modules may override
            module.training = False
        try:
            self.nodes = list(_Tracer().trace(model).nodes)
        except Exception as error:  # whatever the model's own forward does with a stand-in for its input
            raise UnsupportedError(f"{purpose}: the model cannot be traced by torch.fx: {error}") from error
        finally:
            for module in training:
                module.training = True
        self.modules = dict(model.named_modules())

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node does; None for what no module does."""
        if node.op == "call_module":
            return self.modules[str(node.target)] if len(node.args) == 1 and not node.kwargs else None
        if node.target not in AS_MODULES or any(isinstance(x, fx.Node) for x in node.args[1:]):
            return None
        try:
            return AS_MODULES[node.target](*node.args[1:5], **node.kwargs) if len(node.args) < 5 else None
        except TypeError:
            return None

    def norm_after(self, node: fx.Node) -> nn.Module | None:
        """The batch norm with running statistics that alone reads a layer."""
        if not isinstance(self.module(node), (nn.Linear, nn.Conv2d)) or len(node.users) != 1:
            return None
        found = self.module(next(iter(node.users)))
        return found if isinstance(found, NORMS) and found.running_var is not None else None

    def convolutions(self) -> dict[nn.Module, nn.Module]:
        """Conv2d -> the batch norm that alone reads it, where both are called once."""
        called = Counter(self.modules[str(node.target)] for node in self.nodes if node.op == "call_module")
        pairs = ((self.module(node), self.norm_after(node)) for node in self.nodes)
        return {
            conv: norm for conv, norm in pairs
            if isinstance(conv, nn.Conv2d) and norm is not None and called[conv] == called[norm] == 1
        }  # fmt: skip

    def overwrites(self, node: fx.Node) -> bool:
        """Whether what a node changes in place is read by others."""
        changed: Any = node.args[0]
        while isinstance(changed, fx.Node):
            if len(changed.users) > 1:
                return True
            same = isinstance(self.module(changed), (*SAME, nn.Flatten))
            changed = changed.args[0] if same else None
        return False


class _Proxy(fx.Proxy):
    """torch.fx has x += y for x + y, though others may read x afterwards."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        """One that knows +=."""
        return _Proxy(node, self)
