"""Two processes: each layer is learned by one of them, and both hold the codes that a single process
would.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import LAYERS, Net, recipe
from torch import nn

import fairseq_qn
from fairseq_qn.modules.view import FROZEN, views_of

WORLD = 2


class Wide(nn.Module):
    """The small model, and layers whose codes take more than 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.wide, self.wider = nn.Linear(40, 40), nn.Linear(256, 130)


def frozen(kind: str) -> tuple[Wide, list[Any]]:
    data = recipe(kind=kind, p=0.5)
    for rule in data["rules"]:
        rule["layers"] = r"net\." + rule["layers"]
    for name, k in (("wide", 300), ("wider", 33_000)):
        data["rules"].append(
            {"layers": name, "scheme": "product", "block_size": 1, "n_centroids": k, "stage": "wide"}
        )
    model = Wide()
    fairseq_qn.apply(model, data)
    fairseq_qn.refresh(model)
    return model, fairseq_qn.freeze(model, iterations=2)


def gradient_under_ddp(rank: int) -> torch.Tensor:
    """Of one frozen layer, whose buffers torch's DDP broadcasts, for inputs that differ by rank."""
    torch.manual_seed(0)
    layer = nn.Linear(40, 40)
    rule = {"layers": "", "scheme": "product", "block_size": 1, "n_centroids": 300}
    fairseq_qn.apply(layer, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(layer, iterations=2)
    parallel = nn.parallel.DistributedDataParallel(layer) if torch.distributed.is_initialized() else layer
    parallel(torch.full((1, 40), rank + 1.0)).pow(2).sum().backward()
    return layer.get_parameter("weight").grad


def work(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/init", rank=rank, world_size=WORLD
    )
    result: dict[str, Any] = {}
    for kind in ("proxy", "exact"):
        model, reports = frozen(kind)
        result[kind] = {
            "state": model.state_dict(),
            "seen": {view.name: view.home.weight.detach() for view in views_of(model)},
            "learned": {report.name for report in reports if report.seconds > 0},
            "errors": {report.name: report.error for report in reports},
            "frozen": all(view.phase == FROZEN for view in views_of(model)),
        }
    noisy = Net().train()
    fairseq_qn.apply(noisy, recipe(kind="proxy", p=0.5))
    fairseq_qn.set_update(noisy, 4)
    result["mask"] = noisy.block.fc1.weight.detach()
    result["gradient"] = gradient_under_ddp(rank)
    torch.save(result, f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(directory),), nprocs=WORLD)
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("kind", ["proxy", "exact"])
def test_all_hold_the_codes_of_a_single_process(kind: str, ranks: list[dict[str, Any]]) -> None:
    single, reports = frozen(kind)
    assert {view.buffer("codes").dtype for view in views_of(single)} == {torch.uint8, torch.int32}
    for rank in (found[kind] for found in ranks):
        assert rank["frozen"] and rank["errors"] == {report.name: report.error for report in reports}
        assert all(torch.equal(tensor, rank["state"][name]) for name, tensor in single.state_dict().items())
        assert all(torch.equal(view.home.weight, rank["seen"][view.name]) for view in views_of(single))


@pytest.mark.parametrize("kind", ["proxy", "exact"])
def test_the_layers_are_shared_out(kind: str, ranks: list[dict[str, Any]]) -> None:
    first, second = (found[kind]["learned"] for found in ranks)
    assert not first & second and first | second == {f"net.{name}.weight" for name in LAYERS} | {
        "wide.weight",
        "wider.weight",
    }
    assert "wider.weight" in first and "wide.weight" in second  # the largest, and the next


def test_each_draws_masks_of_its_own(ranks: list[dict[str, Any]]) -> None:
    assert not torch.equal(ranks[0]["mask"], ranks[1]["mask"])


def test_gradients_are_averaged_by_ddp(ranks: list[dict[str, Any]]) -> None:
    expected = (gradient_under_ddp(0) + gradient_under_ddp(1)) / 2
    for rank in ranks:
        torch.testing.assert_close(rank["gradient"], expected)
