"""Under a fairseq optimizer: torch's own, and the fp32 masters that train in place of fp16 Parameters."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from fairseq_qn.modules.moments import Masters


def torch_optimizers(optimizer: Any) -> list[Optimizer]:
    """Those of torch that a fairseq optimizer runs: one, or several under --optimizer composite."""
    inner = optimizer.optimizer
    parts = getattr(inner, "optimizers", None)
    return [inner] if parts is None else [own for part in parts.values() for own in torch_optimizers(part)]


def masters_of(optimizer: Any) -> Masters:
    """fp16 Parameter -> (its fp32 master, where it begins in that); {} where the Parameters themselves are
    trained.

    Plain --fp16 flattens all masters into one, or one a device (pipeline parallelism), in the order of the
    Parameters; --fp16-no-flatten-grads lists them. --memory-efficient-fp16, --amp and fp32 have none.
    """
    # BMUF stands around the others
    while not hasattr(optimizer, "fp32_params") and hasattr(optimizer, "_optimizer"):
        optimizer = optimizer._optimizer
    masters = getattr(optimizer, "fp32_params", {})
    if isinstance(masters, list):
        return {half: (master, 0) for half, master in zip(optimizer.fp16_params, masters, strict=True)}
    placed, used = {}, dict.fromkeys(masters, 0)
    for half in optimizer.fp16_params if masters else ():
        device = half.device.index if len(masters) > 1 else next(iter(masters))
        placed[half] = masters[device], used[device]
        used[device] += half.numel()
    return placed
