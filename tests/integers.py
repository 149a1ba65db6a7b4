"""A network that is trained for integers alone, and what sees to it that nothing else is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fairseq_qn

RULE = {
    "layers": ".*", "scheme": "integer", "bits": 8, "symmetric": True,
    "activations": {"bits": 8, "ranges": "static", "momentum": 0.5},
}  # fmt: skip


class IntegersAlone(TorchDispatchMode):
    """Raises where an operation reads, writes or is told a number that is no integer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
            assert not real and not isinstance(value, float), f"{func}: {value}"
        return result


def trained(
    model: nn.Module, x: Tensor, y: Tensor | None = None, steps: int = 20, batch: int = 200,
    rules: list[Any] | None = None, **rule: Any,
) -> nn.Module:  # fmt: skip
    """A model that has seen its inputs, in eval mode: floats, until it is frozen."""
    fairseq_qn.apply(model, {"version": 1, "rules": rules or [{**RULE, **rule}]})
    optimizer = torch.optim.Adam(model.train().parameters(), 1e-2)
    for step in range(steps):
        some = torch.arange(step * batch, step * batch + min(batch, len(x))) % len(x)
        answers = model(x[some])
        loss = answers.square().mean() if y is None else F.cross_entropy(answers, y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def loaded(model: nn.Module, path: Path, fresh: nn.Module, mode: str = "integer") -> nn.Module:
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, path, parts="float32")
    return fairseq_qn.load(path, mode, fresh)
