"""Everything composes: recipes drawn from all schemes, activations, noises, coders, shared and pruned
layers, each trained, frozen in stages, saved and loaded.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, PAD, WORDS, Block, D, loss
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.modules.packed import Packed
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.activation import ACTIVATIONS

CODERS = [None, "ans"] if importlib.util.find_spec("constriction") else [None]


class Conv1D(nn.Module):
    """Of the name and the layout of transformers': x @ weight + bias."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Stack(nn.Module):
    """A tied table, convolutions of all kinds, and blocks."""

    def __init__(self, seed: int, depth: int = 3) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, D, padding_idx=PAD), nn.Linear(D, WORDS)
        self.head.weight = self.embed.weight
        self.conv, self.mix = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.blocks, self.turned = nn.ModuleList(Block() for _ in range(depth)), Conv1D(D, D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(self.depthwise(self.conv(x.unsqueeze(1)).relu())).squeeze(1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.turned(x))


# layers -> weights in a row; those that are read, not called, see no input of a static range
ROWS = {
    "embed": D, "conv": 9, "depthwise": 9, "mix": 6, "turned": D,
    r"blocks\.\d\.fc1": D, r"blocks\.1\.fc1": D, r"blocks\.\d\.fc2": 16, r"blocks\.\d\.attn\..*": D,
}  # fmt: skip
READ = "attn"


def sizes(row: int) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in range(1, row + 1) if row % n == 0])


CENTROIDS = st.sampled_from([2, 5, 256, 300])


@st.composite
def product(draw: st.DrawFn, row: int) -> dict[str, Any]:
    bits = draw(st.sampled_from([1, 6, 8, 16]))
    return {"block_size": draw(sizes(row)), "n_centroids": draw(CENTROIDS), "codebook_bits": bits}


@st.composite
def kernel(draw: st.DrawFn, row: int) -> dict[str, Any]:
    return {"n_centroids": draw(CENTROIDS), "codebook_bits": draw(st.integers(1, 8))}


@st.composite
def integer(draw: st.DrawFn, row: int) -> dict[str, Any]:
    bits = draw(st.sampled_from([1, 2, 4, 8, "ternary"]))
    known = ["least_squares", "learned"] + ["minmax", "percentile", "histogram"] * (bits in (2, 4, 8))
    lines = {"bits": bits, "ranges": draw(st.sampled_from(known)), **draw(grouped(row))}
    free = bits in (2, 4, 8) and lines["ranges"] != "learned"
    return lines | ({"symmetric": draw(st.booleans())} if free else {})


@st.composite
def learned_bits(draw: st.DrawFn, row: int) -> dict[str, Any]:
    widths = sorted(draw(st.tuples(st.integers(2, 15), st.integers(2, 15))))
    return {"min_bits": widths[0], "max_bits": widths[1], **draw(grouped(row))}


def grouped(row: int) -> st.SearchStrategy[dict[str, Any]]:
    kinds = st.sampled_from(["tensor", "channel", "group"])
    return st.fixed_dictionaries({"granularity": kinds, "group_size": sizes(row)})


LINES = {"product": product, "integer": integer, "learned_bits": learned_bits, "kernel": kernel}
NOISE = st.fixed_dictionaries(
    {"kind": st.sampled_from(["none", "proxy", "exact"]), "p": st.sampled_from([0.0, 0.3, 1.0])}
)


@st.composite
def inputs(draw: st.DrawFn, layers: str) -> Any:
    """The line `activations`; a tied head is called, a table is not."""
    ranges = draw(st.sampled_from([None, *ACTIVATIONS]))
    if ranges is None or (ranges == "static" and READ in layers):
        return None
    momentum = {"momentum": 0.5} if ranges == "static" else {}
    return {"bits": draw(st.integers(2, 8)), "ranges": ranges, "start": draw(st.integers(0, 3)), **momentum}


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    rules = []
    for layers in draw(st.lists(st.sampled_from([*ROWS]), min_size=1, unique=True)):
        scheme = draw(st.sampled_from([*LINES]))
        rule = {"layers": layers, "scheme": scheme, **draw(LINES[scheme](ROWS[layers])), "optional": True}
        rule |= {"stage": draw(st.sampled_from("abc")), "activations": draw(inputs(layers))}
        rules.append(rule | ({"noise": draw(NOISE)} if draw(st.booleans()) else {}))
    structure = {
        "share": draw(st.sampled_from([[], [{"layers": "blocks", "chunk": 2}]])),
        "prune": draw(st.sampled_from([[], *([{"layers": "blocks", "keep": keep}] for keep in KEEP)])),
    }
    return {"version": 1, "noise": draw(NOISE), "rules": rules, **structure}


KEEP = ["every_other", [0], [1], [1, 2], [0, 1, 2]]


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(found[key], value)] == []


def test_every_scheme_is_drawn() -> None:
    assert [*LINES] == [*SCHEMES]


@given(recipes(), st.sampled_from(CODERS), st.sampled_from(["float16", "float32"]))
def test_any_recipe_from_noise_to_file(recipe: dict[str, Any], coder: str | None, parts: str) -> None:
    model = Stack(0).train()
    fairseq_qn.apply(model, recipe, seed=1)
    fairseq_qn.refresh(model)
    fairseq_qn.set_update(model, 2)
    twin = copy.deepcopy(model)
    first = loss(model)
    assert torch.isfinite(first) and torch.equal(first, loss(twin)), "the same update, the same noise"
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fairseq_qn.follow(model, optimizer)
    for stage in fairseq_qn.api.recipe_of(model).stages:
        step(model, optimizer)
        fairseq_qn.freeze(model, stage.name, iterations=3, optimizer=optimizer)
        step(model, optimizer)
    assert all(view.phase == FROZEN for view in views_of(model))
    model.eval()
    again = Stack(1).eval()
    fairseq_qn.apply(again, recipe, seed=1)
    again.load_state_dict(model.state_dict())
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        assert torch.equal(again(IDS), model(IDS))
        left = fairseq_qn.prune(model)
        answers, path = left(IDS), Path(folder) / "m"
        assert torch.isfinite(answers).all()
        predicted = fairseq_qn.predict_size(model, parts=parts, coder=coder)
        total = fairseq_qn.save(model, path, parts=parts, coder=coder).total
        assert total == path.stat().st_size
        assert predicted == total if coder is None else predicted >= total
        depth = len(left.blocks)
        dense, packed = (fairseq_qn.load(path, mode, Stack(2, depth)) for mode in ("dense", "packed"))
        for name, module in packed.named_modules():
            if isinstance(module, Packed):
                assert torch.equal(module.decoded(), dense.get_submodule(name).weight), name
        if parts == "float32":
            assert_same(dense.state_dict(), fairseq_qn.decoded_state_dict(left))
            assert torch.equal(dense(IDS), answers)
        # sums in another order, after which an input may be rounded to the next of four levels
        close = 1e-5 if all(rule["activations"] is None for rule in recipe["rules"]) else 0.5
        assert (packed(IDS) - dense(IDS)).abs().max() <= close * answers.abs().max()
