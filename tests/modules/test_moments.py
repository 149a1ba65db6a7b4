"""Adam's moments after a freeze: those of the codewords, as an Adam whose Parameters are the codebooks would
hold them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import PAD, WORDS, D, Net, loss, recipe
from strategies import DTYPES, blocks_by_hand, weights_and_block_sizes
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.view import FLOAT, WeightView, views_of
from fairseq_qn.quant.product import Groups, project_moment

ADAMS: dict[str, Any] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.98)),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
OTHERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def clusters(
    codes: Tensor, block_size: int, shape: torch.Size, pad: int | None
) -> dict[int, list[list[tuple]]]:
    """code -> its blocks, each the indices of its elements, by a loop; the pad row left out."""
    found: dict[int, list[list[tuple]]] = {}
    for code, block in zip(
        codes.flatten().tolist(), blocks_by_hand(torch.empty(shape), block_size), strict=True
    ):
        if block[0][0] != pad:
            found.setdefault(code, []).append(block)
    return found


def mean_block(values: Tensor, blocks: list[list[tuple]]) -> Tensor:
    return (
        torch.stack([torch.stack([values[index] for index in block]) for block in blocks]).double().mean(0)
    )


@given(weights_and_block_sizes(DTYPES), st.integers(1, 5), st.booleans(), st.booleans(), st.integers(0, 99))
def test_projected_is_the_mean_of_the_cluster_over_its_size(
    drawn: tuple[Tensor, int], k: int, squared: bool, padded: bool, seed: int
) -> None:
    moment, block_size = drawn
    moment = moment.abs() if squared else moment
    pad = len(moment) // 2 if padded else None
    columns = moment[0].numel() // block_size
    codes = torch.randint(0, k, (len(moment), columns), generator=torch.Generator().manual_seed(seed)).byte()
    result = project_moment(moment, Groups.of(codes, k, pad), block_size, squared=squared)
    assert result.dtype == moment.dtype and result.shape == moment.shape
    if pad is not None:
        assert result[pad].equal(moment[pad])
    largest = moment.double().abs().max().item()
    for blocks in clusters(codes, block_size, moment.shape, pad).values():
        expected = mean_block(moment.double(), blocks) / (len(blocks) if squared else 1)
        for block in blocks:
            found = torch.stack([result[index] for index in block]).double()
            precision = torch.finfo(moment.dtype).eps if moment.dtype != torch.float32 else 1e-6
            torch.testing.assert_close(found, expected, rtol=2 * precision, atol=precision * largest + 1e-7)


class Table(nn.Module):
    """An embedding with a pad row and a layer that share nothing; `backward(gradients)` gives what they read
    those.
    """

    def __init__(self, k: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.line = nn.Embedding(WORDS, D, padding_idx=PAD), nn.Linear(12, 9, bias=False)
        rule = {"scheme": "product", "n_centroids": k}
        rules = [{"layers": "embed", "block_size": 4, **rule}, {"layers": "line", "block_size": 3, **rule}]
        fairseq_qn.apply(self, {"version": 1, "rules": rules})

    def backward(self, gradients: dict[str, Tensor]) -> None:
        self.zero_grad()
        sum((view.home.weight * gradients[view.name]).sum() for view in views_of(self)).backward()


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    torch.manual_seed(1000 + step)
    return {view.name: torch.randn_like(view.weight) + 0.2 for view in views_of(model)}


def trained(make: Any, steps: int = 12, k: int = 4) -> tuple[Table, torch.optim.Optimizer]:
    model = Table(k)
    optimizer = make(model.parameters())
    for step in range(steps):
        model.backward(gradients(model, step))
        optimizer.step()
    return model, optimizer


def codebooks(view: WeightView) -> dict[int, Tensor]:
    groups = clusters(view.buffer("codes"), view.scheme.block_size, view.weight.shape, view.padding_idx)
    return {code: mean_block(view.weight.detach(), blocks) for code, blocks in groups.items()}


@pytest.mark.parametrize("name", ADAMS)
def test_as_an_adam_whose_parameters_are_the_codebooks(name: str) -> None:
    """The reference holds each codeword as a Parameter; its moments are means by a loop; its gradients those
    of blocks.
    """
    model, optimizer = trained(ADAMS[name])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    fairseq_qn.freeze(model, optimizer=optimizer)
    for position, view in enumerate(views_of(model)):
        groups = clusters(view.buffer("codes"), view.scheme.block_size, view.weight.shape, view.padding_idx)
        words = {code: nn.Parameter(word.float()) for code, word in codebooks(view).items()}
        reference = ADAMS[name](words.values())
        for blocks, word in zip(groups.values(), words.values(), strict=True):
            reference.state[word] = state = {}
            for key, value in before[position].items():
                if "exp_avg" in key:
                    share = len(blocks) if key.endswith("_sq") else 1
                    state[key] = (mean_block(value, blocks) / share).float()
                else:
                    state[key] = copy.deepcopy(value)
        twin = copy.deepcopy(model)
        ours = ADAMS[name](twin.parameters())
        ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        mine = next(v for v in views_of(twin) if v.name == view.name)
        start = mine.weight.detach().clone()
        for step in range(12, 18):
            drawn = gradients(twin, step)
            twin.backward(drawn)
            for code, word in words.items():
                word.grad = mean_block(drawn[view.name], groups[code]).float()
            ours.step()
            reference.step()
        for code, found in codebooks(mine).items():
            torch.testing.assert_close(found.float(), words[code].detach(), rtol=1e-5, atol=1e-6)
        if name != "adamw":  # weight decay draws each block by its own size
            moved = (mine.weight.detach() - start).double()
            for blocks in groups.values():
                each = torch.stack([torch.stack([moved[index] for index in block]) for block in blocks])
                torch.testing.assert_close(each, each[:1].expand_as(each), rtol=0, atol=1e-6)


def test_moments_of_the_pad_row_stay() -> None:
    model, optimizer = trained(ADAMS["adam"])
    state = optimizer.state[model.embed.get_parameter("weight")]
    before = {key: state[key][PAD].clone() for key in ("exp_avg", "exp_avg_sq")}
    fairseq_qn.freeze(model, optimizer=optimizer)
    assert all(state[key][PAD].equal(row) and row.any() for key, row in before.items())
    assert not state["exp_avg"][PAD + 1].equal(before["exp_avg"])


def first_step(after: str) -> float:
    """Mean absolute first step of the codewords of a 256 x 64 weight, 64 blocks each, with what was chosen
    for the moments.

    In expectation 1, in learning rates, for a gradient that Adam has not seen before, without momentum.
    """
    torch.manual_seed(0)
    layer = nn.Linear(64, 256, bias=False)
    rule = {"layers": "", "scheme": "product", "block_size": 1, "n_centroids": 64}
    fairseq_qn.apply(layer, {"version": 1, "rules": [rule]})
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4, betas=(0.0, 0.999))

    def step() -> None:
        optimizer.zero_grad()
        (layer.weight * torch.randn(256, 64)).sum().backward()
        optimizer.step()

    for _ in range(50):
        step()
    fairseq_qn.freeze(layer, optimizer=[optimizer] if after == "projected" else ())
    if after == "fresh":
        optimizer.state.clear()
    before = layer.weight.detach().clone()
    step()
    return float((layer.weight.detach() - before).abs().mean() / 1e-4)


def test_the_first_step_is_neither_held_back_nor_wild() -> None:
    """E|N(0, 1)| = 0.80 of a learning rate; kept: 1 / sqrt(256) of it; fresh: all of one, whatever the
    gradient.
    """
    kept, proj, fresh = (first_step(after) for after in ("kept", "projected", "fresh"))
    assert 12 < proj / kept < 20, "256 blocks a codeword"
    assert 0.6 < proj < 1.0 and fresh == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_left_alone_and_it_is_said(name: str) -> None:
    model, optimizer = trained(OTHERS[name])
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.warns(UserWarning, match=f"{type(optimizer).__name__}: .*2 frozen layers"):
        fairseq_qn.freeze(model, optimizer=optimizer)
    assert str(optimizer.state_dict()) == str(before)


@pytest.mark.filterwarnings("error")
def test_no_moments_yet_and_integers_are_nothing_to_do() -> None:
    model = Table()
    optimizer = ADAMS["adam"](model.parameters())
    fairseq_qn.freeze(model, optimizer=optimizer)
    assert not optimizer.state
    whole = Net().train()
    fairseq_qn.apply(whole, recipe("block.fc1", scheme="integer", bits=4))
    optimizer = ADAMS["adam"](whole.parameters())
    loss(whole).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    fairseq_qn.freeze(whole, optimizer=optimizer)
    assert str(optimizer.state_dict()) == str(before)


def test_a_stage_is_projected_once_and_others_are_not() -> None:
    model = Net().train()
    fairseq_qn.apply(model, recipe(k=2))
    optimizer = ADAMS["adam"](model.parameters())
    loss(model).backward()
    optimizer.step()

    def moments() -> dict[str, Tensor]:
        return {view.name: optimizer.state[view.weight]["exp_avg_sq"].clone() for view in views_of(model)}

    seen = [moments()]
    for stage in ("ffn", None):
        fairseq_qn.freeze(model, stage, optimizer=optimizer)
        seen.append(moments())
    for view in views_of(model):
        same = [a[view.name].equal(b[view.name]) for a, b in zip(seen, seen[1:], strict=False)]
        assert same == ([False, True] if view.rule.stage == "ffn" else [True, False]), view.name


def test_several_optimizers_and_none_of_this_model() -> None:
    model = Table()
    both = [ADAMS["adam"](model.embed.parameters()), ADAMS["adamw"](model.line.parameters())]
    model.backward(gradients(model, 0))
    before = []
    for optimizer in both:
        optimizer.step()
        before.append(str(optimizer.state_dict()))
    with pytest.warns(UserWarning, match="2 frozen layers"):
        fairseq_qn.freeze(copy.deepcopy(model), optimizer=both)
    assert [str(optimizer.state_dict()) for optimizer in both] == before
    fairseq_qn.freeze(model, optimizer=both)
    assert all(str(optimizer.state_dict()) != text for optimizer, text in zip(both, before, strict=True))


def test_what_is_no_optimizer_is_refused_before_anything_is_frozen() -> None:
    model = Table()
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.Optimizer, found dict"):
        fairseq_qn.freeze(model, optimizer={})
    assert all(view.phase == FLOAT for view in views_of(model))
