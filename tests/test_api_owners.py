"""Who owns a weight: ties, modules under two names, modules that are left out, and models on the meta
device.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import IDS, MODES, Net, answers, assert_answers, frozen, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import UnsupportedError


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("matched", ["embed", "head"])
def test_a_tie_is_stored_once_and_restored(mode: str, matched: str, tmp_path: Path) -> None:
    model = Net()
    rule = {"layers": matched, "scheme": "product", "block_size": 4, "n_centroids": 5}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    manifest = fairseq_qn.inspect(tmp_path / "m")
    other = {"embed": "head", "head": "embed"}[matched]
    assert list(manifest["layers"]) == [f"{matched}.weight"] and manifest["ties"] == [
        [f"{matched}.weight", f"{other}.weight"]
    ]
    assert not [name for name in manifest["tensors"] if name.startswith(f"{other}.weight")]
    fresh = Net()
    fresh.head.weight = nn.Parameter(torch.zeros(20, 8))  # as a model built without the tie
    loaded = fairseq_qn.load(tmp_path / "m", mode, fresh)
    assert_answers(answers(loaded), answers(model.eval()), mode)
    if mode == "dense":
        assert loaded.head.weight is loaded.embed.weight
    else:
        assert not any("weight" in dict(owner.named_parameters()) for owner in (loaded.head, loaded.embed))
        assert torch.equal(loaded.head.weight, loaded.embed.weight)


def test_ties_of_dense_weights_are_stored_once_too(tmp_path: Path) -> None:
    model = Net()
    fairseq_qn.apply(model, recipe("block.fc1"))
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    manifest = fairseq_qn.inspect(tmp_path / "m")
    assert manifest["ties"] == [["embed.weight", "head.weight"]] and "head.weight" not in manifest["tensors"]
    loaded = fairseq_qn.load(tmp_path / "m", model=Net(5))
    assert loaded.head.weight is loaded.embed.weight and torch.equal(answers(loaded), answers(model.eval()))


class Shared(nn.Module):
    """One module under two names, and one Parameter in two modules of different kinds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)
        self.d = nn.Module()
        self.d.table = self.c.weight
        self.e = self.d

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.nn.functional.one_hot(ids, 20)[..., :8].float()
        return self.b(self.a(self.c(x))) @ self.d.table


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shared_modules_and_odd_owners(mode: str, device: str, tmp_path: Path) -> None:
    model = Shared()
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": "[bc]", "scheme": "product", "n_centroids": 5}]}
    )
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    manifest = fairseq_qn.inspect(tmp_path / "m")
    assert {name.split("/")[0] for name in manifest["tensors"]} == {
        "a.weight",
        "a.bias",
        "c.weight",
        "c.bias",
    }
    with torch.device(device):
        fresh = Shared()
    loaded = fairseq_qn.load(tmp_path / "m", mode, fresh)
    assert loaded.a is loaded.b
    assert_answers(answers(loaded), answers(model.eval()), mode)
    assert torch.equal(loaded.d.table, loaded.c.weight)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_the_meta_device_is_filled(mode: str, tmp_path: Path) -> None:
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    with torch.device("meta"):
        fresh = Net()
    loaded = fairseq_qn.load(tmp_path / "m", mode, fresh)
    assert_answers(answers(loaded), answers(model), mode)
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


@pytest.mark.parametrize("mode", MODES)
def test_a_model_that_is_a_single_layer(mode: str, tmp_path: Path) -> None:
    model = nn.Linear(8, 8)
    fairseq_qn.apply(model, {"version": 1, "rules": [{"layers": "", "scheme": "product", "n_centroids": 3}]})
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    loaded = fairseq_qn.load(tmp_path / "m", mode, nn.Linear(8, 8))
    x = torch.randn(3, 8)
    assert_answers(loaded(x), model(x), mode)


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.extra = Net(), nn.Sequential(nn.Linear(8, 8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids)


@pytest.mark.parametrize("mode", MODES)
def test_modules_can_be_left_out(mode: str, tmp_path: Path) -> None:
    model = Headed()
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": r".*fc1|net\.embed|extra\.0", "scheme": "product"}]}
    )
    fairseq_qn.freeze(model)
    whole = fairseq_qn.save(model, tmp_path / "whole", parts="float32")
    size = fairseq_qn.save(model, tmp_path / "m", parts="float32", drop=["extra", "net.head"])
    assert size.total < whole.total and size.total == fairseq_qn.predict_size(
        model, parts="float32", drop=["extra", "net.head"]
    )
    manifest = fairseq_qn.inspect(tmp_path / "m")
    assert manifest["dropped"] == ["extra", "net.head"] and manifest["ties"] == []
    assert not [name for name in manifest["tensors"] if name.startswith(("extra", "net.head"))]
    loaded = fairseq_qn.load(tmp_path / "m", mode, Headed())
    assert torch.equal(loaded.net.embed(IDS), model.net.embed(IDS))
    for module, name in ((loaded.extra, "extra"), (loaded.net.head, "net.head")):
        with pytest.raises(UnsupportedError, match=f"^{name}: was left out of the file when it was saved"):
            module(IDS)
    for wrong in ("exta", "", "net.head.weight"):
        with pytest.raises(UnsupportedError, match=f"drop: the model has no module '{wrong}'"):
            fairseq_qn.save(model, tmp_path / "n", drop=[wrong])
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("mode", MODES)
def test_leaving_out_the_matched_owner_keeps_the_weight_for_the_other(mode: str, tmp_path: Path) -> None:
    for build, drop, reader in ((Net, "embed", "head"), (Shared, "c", "d")):
        model = build()
        rule = {"layers": drop, "scheme": "product", "block_size": 4, "n_centroids": 5}
        fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
        fairseq_qn.freeze(model)
        fairseq_qn.save(model, tmp_path / "m", parts="float32", drop=[drop])
        loaded = fairseq_qn.load(tmp_path / "m", mode, build())
        attribute = "table" if reader == "d" else "weight"
        found, expected = (getattr(m.get_submodule(reader), attribute) for m in (loaded, model))
        assert torch.equal(found, expected)
