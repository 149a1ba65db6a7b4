"""When noise is drawn anew: by whichever module is called outermost, in copies and moved parts, by an
optimizer's steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import Net, clock_of, loss, recipe
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules.view import views_of

FC = {
    "version": 1,
    "noise": {"kind": "proxy", "p": 0.5},
    "rules": [{"layers": ".*", "scheme": "product", "block_size": 2}],
}


def drawn(weight: Tensor) -> str:
    """Which blocks read as zero, as text."""
    return "".join("01"[int(z)] for z in weight.reshape(-1, 2).eq(0).all(1))


class Encoder(nn.Module):
    """Words to vectors and back by one table, which `forward` reads without calling its owner a second
    time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.seen: list[tuple[str, str]] = []

    def encode(self, ids: Tensor) -> Tensor:
        return self.fc(self.embed(ids))

    def score(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.score(self.encode(ids))


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, ids: Tensor) -> Tensor:
        return self.model(ids)


IDS2 = torch.arange(12).reshape(3, 4)
CALLS: dict[str, Callable[[Any], Tensor]] = {
    "root": lambda m: m(IDS2),
    "forward": lambda m: m.forward(IDS2),
    "encode": lambda m: m.encode(IDS2),
    "submodule": lambda m: m.fc(m.embed.weight),
    "wrapped": lambda m: Wrapper(m).training_step(IDS2),
    "sequential": lambda m: nn.Sequential(m.embed, m.fc)(IDS2),
    "root in eval": lambda m: m.train(False).fc.train()(torch.ones(1, 16)),
}


def watched(model: Encoder) -> list[tuple[str, str]]:
    """What `fc` and the table read when `fc` is called."""
    model.fc.register_forward_pre_hook(
        lambda m, _: model.seen.append((drawn(m.weight), drawn(model.embed.weight)))
    )
    return model.seen


def encoder(**options: Any) -> Encoder:
    model = Encoder().train()
    fairseq_qn.apply(model, FC, **options)
    return model


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["itself", "copied", "wrapped root"])
def test_every_way_of_calling_draws_anew(call: str, how: str) -> None:
    model = Encoder().train()
    fairseq_qn.apply(Wrapper(model) if how == "wrapped root" else model, FC)
    if how == "copied":
        model(IDS2)
        model = copy.deepcopy(model)
    seen = watched(model)
    for _ in range(5):
        CALLS[call](model)
    masks = [fc for fc, _ in seen]
    assert len(set(masks)) == 5 and all("1" in mask and "0" in mask for mask in masks)


@pytest.mark.parametrize("parts", [("encode", "score"), ("forward",)])
def test_a_table_read_by_several_calls_of_a_pass_has_one_mask(parts: tuple[str, ...]) -> None:
    """The root's hooks are passed by: the table is read by the embedding's call, then bare."""
    model, seen, tables = encoder(), [], []
    model.embed.register_forward_pre_hook(lambda m, _: seen.append(drawn(m.weight)))
    original = F.linear
    for _ in range(4):
        with pytest.MonkeyPatch.context() as patch:
            spy = lambda x, w, *b: (tables.append(drawn(w)), original(x, w, *b))[1]  # noqa: E731
            patch.setattr(F, "linear", spy)
            x = IDS2
            for part in parts:
                x = getattr(model, part)(x)
    assert tables[1::2] == seen and len(set(seen)) == 4  # the first of two is fc's


def test_a_moved_part_and_a_copied_part_have_noise_of_their_own() -> None:
    model = encoder()
    twin = copy.deepcopy(model.fc)
    other = nn.Sequential(model.embed, nn.ReLU(), twin)
    masks = []
    twin.register_forward_pre_hook(lambda m, _: masks.append(drawn(m.weight)))
    for _ in range(4):
        other(IDS2)
    assert len(set(masks)) == 4 and clock_of(twin) is not clock_of(model)
    before = clock_of(model).update
    twin(torch.ones(1, 16))
    assert clock_of(model).update == before


def test_a_part_called_within_a_pass_begins_none() -> None:
    model = encoder()
    for n in range(1, 4):
        model(IDS2)
        assert clock_of(model).update == n
    model.eval()(IDS2)
    assert clock_of(model).update == 3
    model.train()(IDS2)
    assert clock_of(model).update == 4
    model.encode(IDS2)
    assert clock_of(model).update == 5  # the embedding comes again


def test_a_module_that_calls_itself_is_one_pass() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, depth: int) -> Tensor:
            return self.fc(x) if depth == 0 else self(x, depth - 1) + self.fc(x)

    model = Tree().train()
    fairseq_qn.apply(model, FC)
    for n in range(1, 4):
        model(torch.ones(1, 8), 3)
        assert clock_of(model).update == n and clock_of(model).outer is None


def test_an_interrupted_pass_does_not_stop_the_clock() -> None:
    """KeyboardInterrupt is no Exception: torch runs no forward hook."""
    model = encoder()
    handle = model.fc.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(IDS2)
    handle.remove()
    masks = [drawn(model.fc.weight) for _ in range(3) if model(IDS2) is not None]
    assert len(set(masks)) == 3 and clock_of(model).outer is None and clock_of(model).values is None


# -- reads that no call covers


class Bare(nn.Module):
    """Its layer is only read, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


def bare(calls: int = 0) -> tuple[Bare, torch.optim.Optimizer]:
    model = Bare().train()
    fairseq_qn.apply(model, FC)
    optimizer = torch.optim.SGD([model.fc.weight], lr=0.1)  # who reads it before training gets the Parameter
    nn.init.normal_(model.fc.weight)
    for _ in range(calls):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("calls", [0, 1])
def test_training_on_bare_reads_raises(calls: int) -> None:
    model, _ = bare(calls)
    answer = model.forward(torch.ones(1, 8)).sum()
    with pytest.raises(
        ViewError, match=r"^fc.weight: trained by reads outside of any module's call.*fairseq_qn.follow"
    ):
        answer.backward()


def test_bare_reads_with_an_optimizer_to_follow_or_an_update_set() -> None:
    for how in ("follow", "set_update"):
        model, optimizer = bare()
        if how == "follow":
            fairseq_qn.follow(model, optimizer)
        masks = []
        for n in range(4):
            if how == "set_update":
                fairseq_qn.set_update(model, n)
            masks.append(drawn(model.fc.weight))
            model.forward(torch.ones(1, 8)).sum().backward()
            optimizer.step()
        assert len(set(masks)) == 4


def test_looking_at_a_weight_between_passes_does_nothing() -> None:
    model, optimizer = bare(2)
    first = drawn(model.fc.weight)
    assert drawn(model.fc.weight) == first == drawn(model.fc.weight.detach())
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()


# -- an optimizer's steps


def test_updates_are_the_steps_of_the_optimizer_that_is_followed() -> None:
    model = encoder()
    optimizer = torch.optim.Adam(model.parameters())
    fairseq_qn.follow(model, optimizer)
    times, masks = [], []
    for _ in range(3):
        for _ in range(2):  # micro-batches
            model(IDS2).sum().backward()
            times.append(clock_of(model).time())
            masks.append(drawn(model.fc.weight))
        optimizer.step()
    assert times == [(n, micro) for n in range(3) for micro in range(2)] and len(set(masks)) == 6
    twin = encoder()
    for (n, micro), mask in zip(times, masks, strict=True):
        fairseq_qn.set_update(twin, n, micro)
        twin(IDS2)
        assert drawn(twin.fc.weight) == mask  # those of a loop that says its updates


def test_knots_and_refreshes_go_by_steps() -> None:
    model = Net().train()
    fairseq_qn.apply(model, recipe(kind="exact", p=[[0, 0.0], [4, 1.0]], refresh=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    fairseq_qn.follow(model, optimizer)
    view, codes, noises = next(views_of(model)), [], []
    for _ in range(6):
        for _ in range(3):
            loss(model).backward()
        noises.append(view.noise.at(view.clock.update))
        codes.append(view.buffer("codes").clone())
        with torch.no_grad():
            view.weight.normal_()
        optimizer.step()
    assert noises == [0, 0.25, 0.5, 0.75, 1, 1]
    changed = [n for n in range(1, 6) if not torch.equal(codes[n], codes[n - 1])]
    assert changed == [2, 4]


def test_follow_again_takes_over_and_resumes() -> None:
    model = encoder()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    fairseq_qn.follow(model, first)
    handle = fairseq_qn.follow(model, second, update=7)
    model(IDS2).sum().backward()
    first.step()
    assert clock_of(model).time() == (7, 0)
    second.step()
    assert clock_of(model).time() == (8, 0)
    handle.remove()
    second.step()
    assert clock_of(model).update == 8
    with pytest.raises(
        UnsupportedError, match="^follow: expected a model that fairseq_qn.apply has given views"
    ):
        fairseq_qn.follow(nn.Linear(2, 2), first)
    with pytest.raises(UnsupportedError, match="^follow: .*and Tensor"):
        fairseq_qn.follow(model, torch.ones(1))


def test_torchs_seed_is_the_noises() -> None:
    def masks(seed: int | None) -> str:
        torch.manual_seed(seed)
        model = encoder()
        model(IDS2)
        return drawn(model.fc.weight)

    assert masks(1) == masks(1) != masks(2)
    torch.manual_seed(1)
    model = encoder(seed=0)
    model(IDS2)
    assert drawn(model.fc.weight) != masks(1)
