"""Batch norms folded while they train: as torch's own, into the file, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from integers import RULE
from torch import Tensor, nn
from torch.ao.nn.intrinsic.qat import ConvBn2d
from torch.ao.quantization import QConfig

import fairseq_qn
from fairseq_qn.errors import NoLayerMatched, RecipeError, UnsupportedError

GAINS = torch.tensor([1.0, -0.3, 8.0, 0.05])
FOLD = {**RULE, "bits": 4, "granularity": "tensor", "fold_batch_norm": True}
FOLD.pop("activations")


def net(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 2))
    with torch.no_grad():
        model[1].weight.copy_(GAINS)
        model[1].bias.uniform_(-1, 1)
        model[1].running_var.copy_(torch.tensor([0.5, 1.0, 4.0, 2.0]))
        model[1].running_mean.uniform_(-1, 1)
    return model


def folding(model: nn.Module, p: float = 1.0, **rule: Any) -> nn.Module:
    noise = {"kind": "proxy", "p": p}
    fairseq_qn.apply(model, {"version": 1, "noise": noise, "rules": [{**FOLD, **rule}]}, seed=0)
    return model


def images(n: int = 16) -> Tensor:
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.3


class Rounded(nn.Module):
    """Symmetric integers of 4 bits over the tensor, straight through; nothing for activations."""

    def forward(self, w: Tensor) -> Tensor:
        scale = w.detach().abs().max() / 7
        return w + ((w / scale).round() * scale - w).detach()


def test_it_trains_as_torch_s_own(seed: int = 0) -> None:
    """torch.ao's ConvBn2d, which rounds the folded weight and corrects by the batch's deviation."""
    ours, plain = folding(net()), net()
    theirs = ConvBn2d(2, 4, 3, bias=True, qconfig=QConfig(activation=nn.Identity, weight=Rounded))
    with torch.no_grad():
        theirs.weight.copy_(plain[0].weight)
        theirs.bias.copy_(plain[0].bias)
    theirs.bn = plain[1]
    pairs = [(ours[0], theirs), (ours[1], theirs.bn)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (nn.Sequential(*ours[:2]), theirs)]
    for step in range(4):
        x = images() * (1 + step)
        found, expected = ours[1](ours[0](x)), theirs(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for optimizer, y in zip(optimizers, (found, expected), strict=True):
            optimizer.zero_grad()
            (y.sin() * torch.linspace(0, 1, 4).view(-1, 1, 1)).sum().backward()
            optimizer.step()
        for own, other in pairs:
            for name, tensor in own.state_dict(keep_vars=True).items():
                if name not in ("phase", "digest"):
                    like = getattr(other, name)
                    torch.testing.assert_close(tensor, like, rtol=1e-4, atol=1e-4)
                    if tensor.requires_grad:
                        torch.testing.assert_close(tensor.grad, like.grad, rtol=1e-3, atol=1e-4)
    # with the moving statistics alone, what is read is eq. 14's
    ours[1].eval()
    norm: Any = ours[1]
    gain = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    w_fold = ours.get_parameter("0.weight") * gain
    torch.testing.assert_close(ours[0].weight * gain, Rounded()(w_fold))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_file_holds_the_integers_of_the_folded_weight(
    granularity: str, bias: bool, tmp_path: Path
) -> None:
    model = folding(net(bias), granularity=granularity)
    keys, x = set(net(bias).state_dict()), images()
    with torch.no_grad():
        model[1].weight[3] = 0
        gain = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
        w_fold = model.get_parameter("0.weight") * gain.view(-1, 1, 1, 1)
    over = w_fold.abs().amax((1, 2, 3), keepdim=True) if granularity == "channel" else w_fold.abs().max()
    fairseq_qn.freeze(model.eval())
    assert "int4 symmetric, folded, frozen" in repr(model[0]) and "folded" not in repr(model[3])
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    packed = fairseq_qn.load(tmp_path / "m", "packed", net(bias))
    levels, _ = packed[0].qn_stored.signed()
    assert torch.equal(levels.float(), (w_fold * 7 / over).nan_to_num(nan=0).round())
    expected = model(x)
    for found in (packed, fairseq_qn.load(tmp_path / "m", "dense", net(bias))):
        torch.testing.assert_close(found(x), expected, rtol=1e-5, atol=1e-5)
    assert set(found.state_dict()) == keys
    decoded = net(bias)
    decoded.load_state_dict(fairseq_qn.decoded_state_dict(model))
    torch.testing.assert_close(decoded.eval()(x), expected, rtol=1e-5, atol=1e-5)
    removed = fairseq_qn.remove(copy.deepcopy(model))
    torch.testing.assert_close(removed(x), expected, rtol=1e-5, atol=1e-5)
    # what trains on from the file is the same function of a batch
    found[1].weight.data[3] = 0
    removed.train(), found.train()
    torch.testing.assert_close(found(x), removed(x), rtol=1e-3, atol=1e-3)


def test_gains_of_nothing_and_nearly_nothing() -> None:
    model = folding(net()).train()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.0, 1e-20, 1e-39, -1.0]))
    y = model(images())
    y.square().sum().backward()
    assert y.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
    assert model[1].weight.grad[0] != 0, "a gain of 0 leaves 0"
    assert model[0].weight[3].unique().numel() <= 15 and torch.equal(
        model[0].weight[0], model.get_parameter("0.weight")[0]
    )


def test_state_and_copies_are_those_of_any_view() -> None:
    x, plain, model = images(), folding(net(), fold_batch_norm=False), folding(net(), p=0.5)
    assert model.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(model)
    outputs = [m.train()(x) for m in (model, twin)]
    assert torch.equal(*outputs) and not torch.equal(outputs[0], plain.train()(x))
    with torch.no_grad():
        twin[1].weight.mul_(2)  # its own batch norm, not the first one's
    assert not torch.equal(twin(x), model(x))
    fairseq_qn.apply(model, model._qn_recipe)
    assert "folded" in repr(model[0])


class Twice(nn.Module):
    """A convolution that two batch norms read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(2, 2, 1), nn.ModuleList(nn.BatchNorm2d(2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[1](self.conv(self.norms[0](self.conv(x))))


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else super().forward(x)


@pytest.mark.parametrize(
    ("model", "error", "found"),
    [
        (
            nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
            NoLayerMatched,
            "none of its layers is a Conv2d",
        ),
        (Twice(), NoLayerMatched, "rule '.*': fold_batch_norm: none of its layers"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, affine=False)), NoLayerMatched, "none of its"),
        (Branching(), UnsupportedError, "fold_batch_norm: the model cannot be traced by torch.fx: "),
    ],
)
def test_what_cannot_be_folded(model: nn.Module, error: type[Exception], found: str) -> None:
    before = model.state_dict().keys()
    with pytest.raises(error, match=found):
        folding(model)
    assert model.state_dict().keys() == before and all(m.training for m in model.modules())


def test_codes_of_blocks_are_not_folded() -> None:
    rule = {"layers": ".*", "scheme": "product", "block_size": 1, "n_centroids": 2, "fold_batch_norm": True}
    with pytest.raises(RecipeError, match=r"rules\[0\].fold_batch_norm: not of scheme product; take it out"):
        fairseq_qn.Recipe.load({"version": 1, "rules": [rule]})
