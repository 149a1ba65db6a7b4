"""learned_bits: sizes that agree, exact files at every width, what is read when, refusal of forgeries."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import one_line
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, MODES, Net, loss
from strategies import weights
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.artifact import container
from fairseq_qn.artifact.container import spec_of
from fairseq_qn.errors import BlockSizeError, FormatError, NonFiniteWeight, RecipeError, UnsupportedError
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.quant.bitpack import pack
from fairseq_qn.quant.learned_bits import pack_groups, stream_bytes
from fairseq_qn.recipe import Recipe
from fairseq_qn.schemes.learned_bits import LearnedBits


def applied(model: nn.Module, layers: str = ".*", p: float = 1.0, **lines: Any) -> nn.Module:
    rule = {"layers": layers, "scheme": "learned_bits", **lines}
    recipe = {"version": 1, "noise": {"kind": "proxy", "p": p}, "rules": [rule]}
    fairseq_qn.apply(model, recipe, seed=0)
    return model


def spread(model: nn.Module, deviation: float = 2.0, seed: int = 0) -> None:
    """Logits as far apart as long training makes them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for view in views_of(model):
            logits = view.parameter("bit_logits")
            logits.copy_(torch.randn(logits.shape, generator=generator) * deviation)


@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_three_sizes_agree(deviation: float, seed: int, tmp_path: Path) -> None:
    model = applied(nn.Linear(1024, 512, bias=False))
    spread(model, deviation, seed)
    real = float(fairseq_qn.size_penalty(model, rounded=False).detach()) * 2**20
    penalty = float(fairseq_qn.size_penalty(model).detach()) * 2**20
    predicted = fairseq_qn.predict_size(model)
    fairseq_qn.freeze(model)
    assert fairseq_qn.predict_size(model) == predicted
    written = fairseq_qn.save(model, tmp_path / "m").total
    assert predicted == written == (tmp_path / "m").stat().st_size
    assert real == pytest.approx(written, rel=0.01) and penalty == pytest.approx(written, rel=0.01)
    assert float(fairseq_qn.size_penalty(model)) * 2**20 == pytest.approx(penalty, abs=1)
    tensors, manifest = container.read(tmp_path / "m")
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert penalty - 1 <= stored <= penalty + 14
    entry = manifest["layers"]["weight"]
    of_width = (entry["max_bits"] - entry["min_bits"]).bit_length()
    assert of_width == (4 if deviation > 0.1 else 3) or deviation == 0.1
    assert tensors["weight/widths"].numel() == 1024 * 512 // 16 * of_width // 8


def test_sizes_agree_at_the_floor(tmp_path: Path) -> None:
    """Logits that a penalty drives down in step all round to the same side; the gradient is the paper's."""
    model = applied(nn.Linear(1024, 512, bias=False))
    (view,) = views_of(model)
    with torch.no_grad():
        view.parameter("bit_logits").fill_(-2.8)  # 2.75 bits
    slopes, sizes = [], []
    for rounded in (True, False):
        size = fairseq_qn.size_penalty(model, rounded=rounded)
        slopes.append(torch.autograd.grad(size, view.parameter("bit_logits"))[0])
        sizes.append(float(size.detach()) * 2**20)
    assert torch.equal(*slopes) and slopes[0].min() > 0 and sizes[0] > 1.08 * sizes[1]
    fairseq_qn.freeze(model)
    written = fairseq_qn.save(model, tmp_path / "m").total
    assert sizes[0] == pytest.approx(written, rel=0.01)
    tensors = container.read(tmp_path / "m")[0]
    assert "weight/widths" not in tensors, "one width for all takes none"


def test_the_penalty_is_of_the_logits_alone_and_of_what_is_not_frozen() -> None:
    model = applied(Net(), granularity="channel")
    fairseq_qn.size_penalty(model).backward()
    for key, p in model.named_parameters():
        assert (p.grad is not None) is key.endswith("bit_logits"), key
    view = next(view for view in views_of(model) if view.name == "block.fc1.weight")
    slope = view.parameter("bit_logits").grad  # 16 rows of 8 weights at 8 of 2 to 15 bits
    share = 6 / 13
    torch.testing.assert_close(slope, torch.full((16,), 8 * 13 * share * (1 - share) / 8 / 2**20))
    fairseq_qn.freeze(model)
    assert not fairseq_qn.size_penalty(model).requires_grad
    with pytest.raises(UnsupportedError, match="no layer learns its size"):
        fairseq_qn.size_penalty(Net())


GROUPS = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 4}, {"group_size": 1}]


@pytest.mark.parametrize("lines", GROUPS, ids=str)
@pytest.mark.parametrize("width", [*range(2, 16), None])
def test_every_width_round_trips(width: int | None, lines: dict[str, Any], tmp_path: Path) -> None:
    """A width for all, and widths of all kinds side by side; a group of the whole tensor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 5, bias=False))
    applied(model, **lines, **({} if width is None else {"min_bits": width, "max_bits": width}))
    spread(model)
    fairseq_qn.freeze(model)
    model.eval()
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    for mode in MODES:
        loaded = fairseq_qn.load(
            tmp_path / "m", mode, nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 5, False))
        )
        for view, module in zip(views_of(model), loaded):
            weight = module.weight if mode == "dense" else module.decoded()
            assert torch.equal(weight, view.quantized())
        ids = torch.tensor([[0, 8], [3, 3]])
        assert torch.equal(loaded[0](ids), model[0](ids))


@given(weights(shape=st.tuples(st.integers(1, 6), st.just(8))), st.integers(0, 99), st.sampled_from(GROUPS))
def test_hostile_weights_round_trip(w: Tensor, seed: int, lines: dict[str, Any]) -> None:
    layer = nn.Linear(*w.shape[::-1], bias=False)
    layer.weight.data.copy_(w)
    applied(layer, **lines)
    spread(layer, seed=seed)
    fairseq_qn.freeze(layer)
    (view,) = views_of(layer)
    entry, parts = view.scheme.encode(w, view, torch.float32)
    assert view.scheme.check_entry(entry) is None
    assert torch.equal(view.scheme.decode(entry, parts).dense(), view.quantized())


def test_what_is_read_when() -> None:
    """Pseudo-noise in training, on the share that is drawn and no padding row; rounded in evaluation."""
    torch.manual_seed(0)
    table = nn.Embedding(400, 16, padding_idx=1)
    applied(table, p=0.25)
    (view,) = views_of(table)
    fairseq_qn.set_update(table, 1)
    w = table.get_parameter("weight").detach()
    moved = (table.weight - w).detach()
    assert float((moved != 0).float().mean()) == pytest.approx(0.25, abs=0.02) and not moved[1].any()
    step = (float(w.max()) - float(w.min())) / 255
    assert float(moved[moved != 0].std()) == pytest.approx(step / 2, rel=0.05)
    table.eval()
    assert torch.equal(table.weight, view.quantized()) and not torch.equal(table.weight, w)
    spread(table, 3.0)
    coarse = view.quantized().clone()
    fairseq_qn.freeze(table)
    assert torch.equal(table.train().weight, coarse)
    with torch.no_grad():
        view.parameter("bit_logits").fill_(9.0)
    assert torch.equal(table.weight, coarse), "the widths are fixed"
    table.weight.sum().backward()
    assert table.get_parameter("weight").grad is not None and view.parameter("bit_logits").grad is None


def test_a_penalty_makes_it_smaller(tmp_path: Path) -> None:
    sizes = {}
    for weight in (0.0, 20.0, 2000.0):
        model = applied(Net(), granularity="channel").train()
        groups = fairseq_qn.parameter_groups(model, lr=0.05)
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        fairseq_qn.follow(model, optimizer)
        for _ in range(60):
            optimizer.zero_grad()
            (loss(model) + weight * fairseq_qn.size_penalty(model)).backward()
            optimizer.step()
        fairseq_qn.freeze(model)
        sizes[weight] = fairseq_qn.save(model, tmp_path / "m").parts["codes"]
    assert sizes[0.0] > sizes[20.0] > sizes[2000.0]


def test_learning_rates_of_their_own() -> None:
    """As groups of an optimizer, which it moves by its own rate and does not decay."""
    model = applied(Net(), granularity="channel")
    rest, own = fairseq_qn.parameter_groups(model, lr=0.5)
    assert {id(p) for p in own["params"]} == {id(v.parameter("bit_logits")) for v in views_of(model)}
    assert own["lr"] == 0.5 and own["weight_decay"] == 0.0 and rest.keys() == {"params"}
    assert len(rest["params"]) + len(own["params"]) == len([*model.parameters()])
    (group,) = fairseq_qn.parameter_groups(Net())
    assert len(group["params"]) == len([*Net().parameters()])


def forged(path: Path, tmp_path: Path, change: Any) -> Path:
    tensors, manifest = container.read(path)
    manifest = {key: value for key, value in manifest.items() if key != "tensors"}
    change(tensors, manifest["layers"]["weight"])
    container.write(tmp_path / "forged", tensors, manifest)
    return tmp_path / "forged"


def test_forgeries(tmp_path: Path) -> None:
    model = applied(nn.Linear(64, 8, bias=False), min_bits=3, max_bits=9)
    spread(model)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m")
    assert fairseq_qn.inspect(tmp_path / "m")["version"] == 3, "readers of 2 know no such scheme"

    def shorter(tensors: dict[str, Tensor], entry: dict[str, Any]) -> None:
        tensors["weight/levels"] = tensors["weight/levels"][:-1]
        entry["bytes"] -= 1

    changes = {
        "bytes of the widths": lambda t, e: t["weight/widths"].zero_(),
        "expected at most 9 bits": lambda t, e: t["weight/widths"].fill_(0b1000_0111),
        "finite ends": lambda t, e: t["weight/ends"].fill_(float("nan")),
        "ends in order": lambda t, e: t["weight/ends"].copy_(t["weight/ends"].flip(0)),
        r"ends in order, found \[-inf": lambda t, e: t["weight/ends"][:1].fill_(-float("inf")),
        "field is missing": lambda t, e: e.update(grid="none"),
        "or out of range": lambda t, e: e.update(zero_row=8),
        r"range: expected F32 \[2\], found none": lambda t, e: e.pop("grid"),
        r"levels: expected \d+ bytes of the widths": shorter,
        "those of 512 weights of 3 to 9 bits": lambda t, e: e.update(bytes=10**9),
        "of 9 to 3 bits": lambda t, e: e.update(min_bits=9, max_bits=3),
    }
    for match, change in changes.items():
        with pytest.raises(FormatError, match=match) as error:
            fairseq_qn.load(forged(tmp_path / "m", tmp_path, change), model=nn.Linear(64, 8, bias=False))
        one_line(error.value)


def test_files_of_before_have_a_level_of_zero() -> None:
    """By hand: (q - zero) step over a range that holds 0, its zero rounded."""
    torch.manual_seed(0)
    ends, widths = torch.tensor([-1.0, 2.5]), [2, 3, 5, 2]
    levels = [[random.randrange(2**b) for _ in range(4)] for b in widths]
    entry = {
        "scheme": "learned_bits", "shape": [2, 8], "granularity": "group", "group_size": 4, "min_bits": 2,
        "max_bits": 15, "bytes": stream_bytes(torch.tensor(widths), 4),
    }  # fmt: skip
    assert LearnedBits.check_entry(entry) is None
    parts = {
        "levels": pack_groups(torch.tensor(levels), torch.tensor(widths)),
        "widths": pack(torch.tensor(widths) - 2, 4), "range": ends,
    }  # fmt: skip
    assert {n: spec_of(t.dtype, t.shape) for n, t in parts.items()} == LearnedBits.layout(entry, "float16")
    expected = []
    for row, b in zip(levels, widths):
        step = 3.5 / (2**b - 1)
        zero = round(1.0 / step)
        expected += [(q - zero) * step for q in row]
    found = LearnedBits.decode(entry, parts).dense()
    torch.testing.assert_close(found.flatten(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_a_padding_row_of_zeros_stays_so(tmp_path: Path) -> None:
    """No level need be 0; a row that training has moved is rounded as all others."""
    ids = torch.tensor([1, 3])
    for moved in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(40, 16, padding_idx=1)
        with torch.no_grad():
            table.weight[1] = 0.3 * moved
        applied(table, max_bits=3)
        fairseq_qn.freeze(table)
        table.eval()
        assert bool(table(ids)[0].any()) is moved and table(ids)[1].all()
        predicted = fairseq_qn.predict_size(table)
        assert predicted == fairseq_qn.save(table, tmp_path / "m").total
        for mode in MODES:
            loaded = fairseq_qn.load(tmp_path / "m", mode, nn.Embedding(40, 16, padding_idx=1))
            assert torch.equal(loaded(ids), table(ids))
            assert torch.equal(loaded.weight if mode == "dense" else loaded.decoded(), table.weight)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"max_bits: expected a whole number from 9 to 15, found 4"):
        rule = {"layers": ".*", "scheme": "learned_bits", "min_bits": 9, "max_bits": 4}
        Recipe.load({"version": 1, "rules": [rule]})
    with pytest.raises(BlockSizeError, match="group_size has to divide the 24 weights of a row, found 16"):
        applied(nn.Linear(24, 8))
    model = applied(nn.Linear(32, 8))
    with torch.no_grad():
        model.bit_logits[0] = float("nan")
    with pytest.raises(
        NonFiniteWeight, match=r"^weight: its bit_logits hold NaN or Inf; nothing was frozen"
    ):
        fairseq_qn.freeze(model)
    assert not any(view.phase == FROZEN for view in views_of(model))


def test_it_answers(tmp_path: Path) -> None:
    """Conv, attention, tied head: all of a net, in half precision too."""
    model = applied(Net(), granularity="channel", pseudo_noise="uniform")
    spread(model)
    fairseq_qn.freeze(model)
    model.eval()
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    for mode in MODES:
        half = fairseq_qn.load(tmp_path / "m", mode, Net(1), dtype=torch.bfloat16)
        torch.testing.assert_close(half(IDS).float(), model(IDS), rtol=0.1, atol=0.1)
