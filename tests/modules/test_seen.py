"""Writes through `.weight` of a view: where it shows the Parameter itself they work, elsewhere they are
refused by name.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from small import IDS, Net, loss, noisy, recipe
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import ViewError


def in_phase(phase: str) -> Net:
    """`fc1.weight` of this model is not the Parameter."""
    if phase != "frozen":
        model = noisy(noise=phase)
        model(IDS)
        return model
    model = Net().train()
    fairseq_qn.apply(model, recipe())
    fairseq_qn.freeze(model)
    return model


PHASES = ["proxy", "int4", "exact", "frozen"]


def set_data(layer: nn.Linear) -> None:
    layer.weight.data = torch.zeros(16, 8)


def no_grad(write: Callable[[nn.Linear], object]) -> Callable[[nn.Linear], None]:
    def call(layer: nn.Linear) -> None:
        with torch.no_grad():
            write(layer)

    return call


def item(layer: nn.Linear) -> None:
    layer.weight[0] = 0


def augmented(layer: nn.Linear) -> None:
    weight = layer.weight
    weight *= 2


WRITES: dict[str, Callable[[nn.Linear], object]] = {
    **{
        name: lambda layer, name=name: getattr(nn.init, f"{name}_")(layer.weight)
        for name in """normal uniform trunc_normal xavier_normal xavier_uniform kaiming_normal
            kaiming_uniform zeros ones orthogonal""".split()
    },
    "constant": lambda layer: nn.init.constant_(layer.weight, 1),
    "sparse": lambda layer: nn.init.sparse_(layer.weight, 0.5),
    "a row": lambda layer: nn.init.zeros_(layer.weight[3]),
    "some rows": lambda layer: nn.init.zeros_(layer.weight[2:5]),
    "transposed": lambda layer: nn.init.normal_(layer.weight.t()),
    "data": set_data,
    "data.copy_": lambda layer: layer.weight.data.copy_(torch.zeros(16, 8)),
    "data.normal_": lambda layer: layer.weight.data.normal_(),
    "data[...]": lambda layer: layer.weight.data[1].fill_(0),
    "data[...] =": lambda layer: layer.weight.data.__setitem__(slice(3), 0),
    "data.view": lambda layer: layer.weight.data.view(-1).mul_(2),
    "data.T": lambda layer: layer.weight.data.T.mul_(2),
    "detach": lambda layer: layer.weight.detach().clamp_(-0.01, 0.01),
    "mul_": no_grad(lambda layer: layer.weight.mul_(2)),
    "copy_": no_grad(lambda layer: layer.weight.copy_(torch.zeros(16, 8))),
    "row": no_grad(lambda layer: layer.weight[0].fill_(0)),
    "item": no_grad(item),
    "*=": no_grad(augmented),
    "with grad": augmented,
    "reset_parameters": lambda layer: layer.reset_parameters(),
}  # fmt: skip


@pytest.mark.parametrize("phase", ["proxy", "frozen"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_that_no_parameter_would_see_is_refused(write: str, phase: str) -> None:
    model = in_phase(phase)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ViewError, match=r"^block.fc1.weight: .* writes to what a view gave to read.*get_parameter"
    ) as error:
        WRITES[write](model.block.fc1)
    assert len(str(error.value)) <= 300
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    F.linear(torch.ones(1, 8), model.block.fc1.weight).sum().backward()  # what is read computes as ever


@pytest.mark.parametrize(
    "write", [name for name in WRITES if name not in ("with grad", "item", "orthogonal")]
)
def test_a_write_to_the_parameter_itself_is_one(write: str) -> None:
    model = noisy().eval()
    before = model.block.fc1.get_parameter("weight").detach().clone()
    WRITES[write](model.block.fc1)
    assert not torch.equal(model.state_dict()["block.fc1.weight"], before)


@pytest.mark.parametrize("phase", PHASES)
def test_what_the_error_says_to_do_works(phase: str) -> None:
    model = in_phase(phase)
    for stored in (model.get_parameter("block.fc1.weight"), model.block.get_parameter("fc1.weight"),
                   model.block.fc1.get_parameter("weight"),
                   copy.deepcopy(model).get_parameter("block.fc1.weight"),
                   pickle.loads(pickle.dumps(model)).get_parameter("block.fc1.weight")):  # fmt: skip
        assert isinstance(stored, nn.Parameter) and torch.equal(
            stored, model.block.fc1._parameters["weight"]
        )
    assert model.get_parameter("block.fc1.weight") is model.block.fc1._parameters["weight"]
    assert model.get_parameter("block.norm.weight") is model.block.norm.weight
    nn.init.zeros_(model.get_parameter("block.fc1.weight"))
    assert not model.block.fc1.weight.any()
    model.block.fc2.weight.detach().clone().zero_()
    with pytest.raises(AttributeError, match="nothing"):
        model.get_parameter("block.nothing")


def test_what_is_computed_from_a_weight_is_an_ordinary_tensor() -> None:
    model = in_phase("proxy")
    weight = model.block.fc1.weight
    for value in (
        weight * 2,
        weight.clone(),
        weight + 0,
        weight[torch.tensor([1, 2])],
        weight.detach().clone(),
        weight.sum(0),
        F.linear(torch.ones(1, 8), weight),
        weight.to(torch.float64),
        torch.cat([weight, weight]),
    ):
        assert type(value) is Tensor
    scaled = weight[torch.tensor([0, 3])]
    scaled *= 2  # a copy
    x = F.embedding(IDS, model.embed.weight)
    x += 1


def test_a_parameter_made_of_a_weight_is_an_ordinary_one() -> None:
    model = in_phase("frozen")
    seen = model.block.fc1.weight
    for made in (nn.Parameter(seen.data), nn.Parameter(seen.detach()[:3]), nn.Parameter(seen.clone())):
        assert type(made) is nn.Parameter and made.is_leaf and made.requires_grad
        nn.init.zeros_(made)
        made.sum().backward()
    assert not isinstance(model.block.fc1.weight, nn.Parameter)


def test_weights_are_saved_and_copied_as_ordinary_tensors() -> None:
    seen = in_phase("frozen").block.fc1.weight
    file = io.BytesIO()
    torch.save({"w": seen.detach()}, file)
    file.seek(0)
    found = torch.load(file, weights_only=True)["w"]
    assert type(found) is Tensor and torch.equal(found, seen)
    for twin in (copy.deepcopy(seen.detach()), pickle.loads(pickle.dumps(seen.detach()))):
        assert type(twin) is Tensor and torch.equal(twin, seen)
        twin.zero_()
    assert torch.equal(torch.from_numpy(seen.detach().numpy()), found)
    torch.testing.assert_close(seen, found)


def test_max_norm_clips_what_is_read() -> None:
    model = nn.Sequential(nn.Embedding(8, 4, max_norm=0.1)).train()
    rule = {"layers": "0", "scheme": "product", "block_size": 2}
    fairseq_qn.apply(model, {"version": 1, "noise": {"kind": "proxy", "p": 0.5}, "rules": [rule]})
    before = model.get_parameter("0.weight").clone()
    assert float(model(torch.arange(8)).norm(dim=1).max()) <= 0.1001 and torch.equal(
        model.get_parameter("0.weight"), before
    )


def test_training_is_not_disturbed() -> None:
    model, optimizer = in_phase("proxy"), None
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        loss(model).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
