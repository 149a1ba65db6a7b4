"""The place of activations: what goes into a module goes through a scheme, in training and in a loaded
model.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, MODES, Net, recipe
from torch import Tensor

import fairseq_qn
from fairseq_qn.artifact import container
from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError
from fairseq_qn.modules.activations import place, placed
from fairseq_qn.schemes.activation import ACTIVATIONS, Activation, Dynamic, Static


@dataclass(frozen=True)
class Clip(Activation):
    """One that changes answers."""

    name = "clip"

    high: float = 0.1

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(max=self.high)

    @classmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        return None if type(entry.get("high")) is float else "expected a high"


@pytest.fixture(autouse=True)
def clip() -> Iterator[None]:
    ACTIVATIONS["clip"] = Clip
    yield
    del ACTIVATIONS["clip"]


def frozen(schemes: dict[str, Activation | None]) -> Net:
    model = Net().eval()
    fairseq_qn.apply(model, recipe("block.fc1", "block.fc2"))
    place(model, schemes)
    fairseq_qn.freeze(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", [Dynamic(8, 1), Dynamic(4, 3), Static(8, -0.5, 2.0), Clip(), Clip(0.5)])
def test_from_the_model_to_the_file_and_back(scheme: Activation, mode: str, tmp_path: Path) -> None:
    model, plain = frozen({"block.fc2": scheme, "conv": scheme}), frozen({})
    assert not torch.equal(model(IDS), plain(IDS))
    size = fairseq_qn.predict_size(model, parts="float32")
    assert fairseq_qn.save(model, tmp_path / "m", parts="float32").total == size
    content = fairseq_qn.inspect(tmp_path / "m")
    assert content["activations"]["conv"] == scheme.entry() and content["version"] == 3
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net(1))
    assert dict(placed(loaded)) == {"conv": scheme, "block.fc2": scheme}
    torch.testing.assert_close(loaded(IDS), model(IDS))
    assert scheme.label in repr(loaded.conv) and "forward" not in repr(loaded.conv)
    for twin in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(twin(IDS), loaded(IDS))


def test_without_any_the_file_says_nothing_of_them(tmp_path: Path) -> None:
    model = frozen({"conv": Clip()})
    place(model, {"conv": None})
    fairseq_qn.save(model, tmp_path / "m")
    assert "activations" not in fairseq_qn.inspect(tmp_path / "m")
    assert torch.equal(model(IDS), frozen({})(IDS))


def test_it_trains_through_them() -> None:
    model = frozen({"block.fc2": Clip(0.0)}).train()
    model(IDS).sum().backward()
    assert model.get_parameter("block.fc1.weight").grad is not None


def test_names_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="^activations: the model has no module 'fc9'"):
        place(Net(), {"fc9": Dynamic(8, 1)})
    fairseq_qn.save(frozen({"conv": Dynamic(8, 3)}), tmp_path / "m")
    tensors, content = container.read(tmp_path / "m")
    del content["tensors"]
    for name in ("conv.x", "embed", "block", ""):
        entries = {name: Dynamic(8, 1).entry()}
        container.write(tmp_path / "m", tensors, content | {"version": 3, "activations": entries})
        with pytest.raises(MismatchError, match=rf"^{name}: the file has activations of it"):
            fairseq_qn.load(tmp_path / "m", model=Net(1))


@pytest.mark.parametrize(
    "entries",
    [
        [], 3, {"conv": 3}, {"conv": {}}, {"conv": {"scheme": "unheard of"}},
        {"conv": {"scheme": ["dynamic"]}}, {"conv": {"scheme": "clip", "high": "x"}},
        *({"conv": {"scheme": "dynamic", "bits": 8, "axes": 1, **wrong}} for wrong in (
            {"more": 1}, {"bits": 1}, {"bits": 9}, {"bits": True}, {"bits": 8.0}, {"bits": None},
            {"axes": 0}, {"axes": 10**9}, {"axes": "1"}, {"name": "dynamic"})),
        *({"conv": {"scheme": "static", "bits": 8, "low": -1.0, "high": 1.0, **wrong}} for wrong in (
            {"low": 1.0}, {"high": -1.0}, {"low": "x"}, {"high": 10**400}, {"high": 1e39}, {"low": None},
            {"low": -1}, {"high": [1.0]}, {"bits": 0})),
    ],
)  # fmt: skip
def test_forged_entries(entries: Any, tmp_path: Path) -> None:
    fairseq_qn.save(frozen({}), tmp_path / "m")
    tensors, content = container.read(tmp_path / "m")
    del content["tensors"]
    container.write(tmp_path / "m", tensors, content | {"version": 3, "activations": entries})
    for read in (fairseq_qn.inspect, fairseq_qn.load):
        with pytest.raises(FormatError, match="activations"):
            read(tmp_path / "m")
