"""Where fairseq keeps the moments of each Parameter: its own optimizers, alone, under half precision and
side by side.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

pytest.importorskip("fairseq")

from fairseq.optim import FairseqBMUF, FP16Optimizer, MemoryEfficientFP16Optimizer
from fairseq.optim.adam import Adam, FairseqAdam
from fairseq.optim.composite import CompositeOptimizer
from omegaconf import OmegaConf

from fairseq_qn.tasks.optimizers import masters_of, torch_optimizers

ADAM = {"_name": "adam", "lr": [0.1], "adam_betas": "(0.9, 0.999)", "adam_eps": 1e-8, "weight_decay": 0.0,
        "fp16_adam_stats": False}  # fmt: skip
COMMON = {
    "fp16_init_scale": 4,
    "fp16_scale_window": 8,
    "fp16_scale_tolerance": 0.0,
    "threshold_loss_scale": None,
    "min_loss_scale": 1e-4,
    "fp16_no_flatten_grads": False,
    "tpu": False,
}
BMUF = {
    "global_sync_iter": 1,
    "block_momentum": 0.9,
    "block_lr": 1,
    "warmup_iterations": 1,
    "use_nbm": False,
    "average_sync": False,
    "distributed_world_size": 1,
}


def config(**common: object) -> OmegaConf:
    return OmegaConf.create({"optimizer": ADAM, "common": {**COMMON, **common}, "bmuf": BMUF})


@pytest.fixture
def halves(monkeypatch) -> list[nn.Parameter]:
    # where fairseq flattens to; None: the CPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).half()) for shape in ((3, 4), (5,), (2, 2, 3))]


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("around", [lambda inner: inner, lambda inner: FairseqBMUF(config().bmuf, inner)])
def test_masters_hold_their_parameters(flatten: bool, around, halves: list[nn.Parameter]) -> None:
    optimizer = around(FP16Optimizer.build_optimizer(config(fp16_no_flatten_grads=not flatten), halves))
    (inner,) = torch_optimizers(optimizer)
    assert isinstance(inner, Adam)
    placed = masters_of(optimizer)
    assert [*placed] == halves
    trained = {id(p) for group in inner.param_groups for p in group["params"]}
    assert len(trained) == (1 if flatten else 3)
    for half, (master, offset) in placed.items():
        assert id(master) in trained and master.dtype == torch.float32
        found = master.flatten()[offset : offset + half.numel()].view(half.shape)
        assert found.equal(half.float())


def test_masters_of_several_devices() -> None:
    """Pipeline parallelism: one flat tensor a device. Tensors of devices that are not here, as far as they
    are asked.
    """
    halves = [
        Mock(**{"numel.return_value": n, "device.index": device}) for n, device in ((3, 0), (4, 1), (5, 0))
    ]
    found = masters_of(SimpleNamespace(fp16_params=halves, fp32_params={0: "first", 1: "second"}))
    assert [found[half] for half in halves] == [("first", 0), ("second", 0), ("first", 3)]


def test_without_masters(halves: list[nn.Parameter]) -> None:
    for optimizer in (
        FairseqAdam(config().optimizer, halves),
        MemoryEfficientFP16Optimizer.build_optimizer(config(), halves),
    ):
        (inner,) = torch_optimizers(optimizer)
        assert masters_of(optimizer) == {} and inner.param_groups[0]["params"] == halves


def test_side_by_side(halves: list[nn.Parameter]) -> None:
    parts = {str(i): FairseqAdam(config().optimizer, [half]) for i, half in enumerate(halves)}
    found = torch_optimizers(SimpleNamespace(optimizer=CompositeOptimizer(parts)))
    assert found == [part.optimizer for part in parts.values()]
