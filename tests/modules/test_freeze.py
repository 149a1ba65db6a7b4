"""Freezing: stages, gradients of frozen layers, and an error that leaves everything as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, LAYERS, PAD, STAGES, Net, loss, recipe
from strategies import blocks_by_hand
from torch import Tensor

import fairseq_qn
from fairseq_qn.errors import NonFiniteWeight, RecipeError, UnsupportedError
from fairseq_qn.modules.view import FLOAT, FROZEN, WeightView, views_of
from fairseq_qn.quant.integer import fake_quantize
from fairseq_qn.recipe import Recipe


def applied(**rule: Any) -> Net:
    model = Net().train()
    fairseq_qn.apply(model, recipe(**rule))
    return model


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def means(view: WeightView, values: Tensor) -> dict[int, Tensor]:
    """code -> mean of the blocks of `values` that have it, by a loop; the pad row left out."""
    blocks = blocks_by_hand(view.weight, view.scheme.block_size)
    flat = view.buffer("codes").flatten().tolist()
    return {
        code: torch.stack(
            [
                torch.stack([values[index] for index in block])
                for have, block in zip(flat, blocks)
                if have == code and block[0][0] != view.padding_idx
            ]
        ).mean(0)
        for code in sorted({c for c, block in zip(flat, blocks) if block[0][0] != view.padding_idx})
    }


def codebook(view: WeightView) -> dict[int, Tensor]:
    """code -> what the network reads for it now."""
    seen = view.home.weight.detach()
    blocks = blocks_by_hand(seen, view.scheme.block_size)
    rows = {
        c: b for c, b in zip(view.buffer("codes").flatten().tolist(), blocks) if b[0][0] != view.padding_idx
    }
    return {code: torch.stack([seen[index] for index in block]) for code, block in sorted(rows.items())}


def test_the_report_of_an_int8_codebook_has_its_rounding_in_it() -> None:
    model = applied(codebook_bits=8, k=65_536)  # every block its own codeword
    for report in fairseq_qn.freeze(model):
        view = next(v for v in views_of(model) if v.name == report.name)
        lost = (view.weight.detach() - view.home.weight.detach()).pow(2).sum() / view.weight.detach().pow(
            2
        ).sum()
        assert report.error == pytest.approx(float(lost), rel=1e-4) and report.error > 0


def test_every_reader_sees_cluster_means_and_the_pad_row_as_it_is() -> None:
    model = applied()
    with torch.no_grad():
        model.embed.get_parameter("weight")[PAD] = 7  # however it came about
    reports = fairseq_qn.freeze(model)
    assert {report.name for report in reports} == {f"{name}.weight" for name in LAYERS}
    for view in views_of(model):
        expected = means(view, view.weight.detach())
        assert 1 < len(expected) <= view.scheme.n_codewords(view)
        for code, row in codebook(view).items():
            torch.testing.assert_close(row, expected[code])
        seen, stored = view.home.weight.detach(), view.weight.detach()
        report = next(r for r in reports if r.name == view.name)
        assert report.error == pytest.approx(
            float((stored - seen).pow(2).sum() / stored.pow(2).sum()), rel=1e-4
        )
        assert not torch.equal(seen, stored) and view.phase == FROZEN
    assert (model.embed.weight[PAD] == 7).all() and torch.equal(model.embed.weight, model.head.weight)


def dense_twin(model: Net) -> Net:
    """An ordinary model whose weights are what the network reads in `model`."""
    twin = Net().train()
    with torch.no_grad():
        for name in LAYERS:
            twin.get_submodule(name).weight.copy_(model.get_submodule(name).weight)
    return twin


def test_the_gradient_of_a_codeword_is_the_mean_of_its_blocks_gradients_and_sgd_moves_it_by_that() -> None:
    model = applied()
    fairseq_qn.freeze(model)
    loss(model).backward()
    twin = dense_twin(model)
    loss(twin).backward()
    before = {view.name: codebook(view) for view in views_of(model)}
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    for view in views_of(model):
        gradient = twin.get_submodule(view.name.removesuffix(".weight")).weight.grad
        expected = means(view, gradient)
        for code, row in means(view, view.weight.grad).items():
            torch.testing.assert_close(row, expected[code], rtol=1e-4, atol=1e-7)
        for code, row in codebook(view).items():
            torch.testing.assert_close(
                row, before[view.name][code] - 0.5 * expected[code], rtol=1e-4, atol=1e-6
            )
        spread = [
            view.weight.grad[index]
            for block in blocks_by_hand(view.weight, view.scheme.block_size)
            for index in block
        ]
        assert any(spread), view.name
    # the tied head reads the pad row, and trains it as it would dense
    learned = model.embed.get_parameter("weight").grad[PAD]
    assert learned.any()
    torch.testing.assert_close(learned, twin.embed.weight.grad[PAD])


def seen_codebooks(model: Net) -> dict[str, Tensor]:
    return {view.name: torch.stack([*codebook(view).values()]) for view in views_of(model)}


def test_an_int8_codebook_trains_straight_through_its_rounding() -> None:
    """The gradient is that of the means, and steps too small to be seen at once add up."""
    models = applied(), applied(codebook_bits=8)
    for model in models:
        fairseq_qn.freeze(model)
    plain, int8 = map(seen_codebooks, models)
    first = seen_codebooks(models[1])
    for view in views_of(models[1]):
        step = plain[view.name].abs().max() / 127
        levels = int8[view.name] / step
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert 0 < (int8[view.name] - plain[view.name]).abs().max() <= 0.5001 * step
        grad = torch.randn(view.weight.shape, generator=torch.Generator().manual_seed(0))
        other = next(v for v in views_of(models[0]) if v.name == view.name)
        for v in (view, other):
            v.weight.grad = None
            (v.home.weight * grad).sum().backward()
        assert view.weight.grad.any() and torch.equal(view.weight.grad, other.weight.grad)
    optimizer = torch.optim.SGD(models[1].parameters(), lr=1e-3)
    view = next(v for v in views_of(models[1]) if v.name == "block.fc1.weight")
    level = first[view.name].abs().max() / 127
    for _ in range(60):
        optimizer.zero_grad()
        (view.home.weight * torch.sign(first[view.name][0, 0])).sum().backward()
        view.weight.grad.mul_(20 * level)  # 0.02 of a step
        optimizer.step()
    assert not torch.equal(seen_codebooks(models[1])[view.name], first[view.name])


def test_codes_learned_for_one_codebook_serve_another(tmp_path: Path) -> None:
    """iPQ first, int8 codebooks after: a checkpoint goes on with either."""
    plain, int8 = applied(), applied(codebook_bits=8)
    fairseq_qn.freeze(plain)
    int8.load_state_dict(plain.state_dict())
    assert all(view.phase == FROZEN for view in views_of(int8))
    twin = applied(codebook_bits=8)
    fairseq_qn.freeze(twin)
    for name, seen in seen_codebooks(int8).items():
        assert torch.equal(seen, seen_codebooks(twin)[name])


def test_other_parameters_get_their_ordinary_gradient() -> None:
    model = applied()
    fairseq_qn.freeze(model)
    loss(model).backward()
    twin = dense_twin(model)
    loss(twin).backward()
    others = [name for name, _ in twin.named_parameters() if name.removesuffix(".weight") not in LAYERS]
    assert len(others) > 5
    for name in others:
        torch.testing.assert_close(model.get_parameter(name).grad, twin.get_parameter(name).grad, msg=name)


def test_codes_stay_and_codebooks_learn() -> None:
    model = applied()
    fairseq_qn.freeze(model)
    codes = {view.name: view.buffer("codes").clone() for view in views_of(model)}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first = float(loss(model))
    for _ in range(30):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert float(loss(model)) < first - 0.1
    for view in views_of(model):
        assert torch.equal(view.buffer("codes"), codes[view.name])
        assert len(codebook(view)) <= view.scheme.n_codewords(view)
        seen = view.home.weight.detach()
        coded = torch.cat([seen[:PAD], seen[PAD + 1 :]]) if view.padding_idx is not None else seen
        assert len(coded.reshape(-1, view.scheme.block_size).unique(dim=0)) <= view.scheme.n_codewords(view)


def test_frozen_integers() -> None:
    model = applied(scheme="integer", bits=3)
    fairseq_qn.freeze(model)
    for name in LAYERS:
        module = model.get_submodule(name)
        assert torch.equal(module.weight, fake_quantize(module.get_parameter("weight").detach(), 3))
    loss(model).backward()
    twin = dense_twin(model)
    loss(twin).backward()
    torch.testing.assert_close(
        model.block.fc1.get_parameter("weight").grad, twin.block.fc1.weight.grad
    )  # straight through


def test_stages_freeze_one_by_one_in_any_order() -> None:
    model = applied(kind="proxy", p=0.5)
    names = {stage: {n for n in LAYERS if STAGES.get(n, "ffn") == stage} for stage in ("ffn", "emb", "conv")}
    done: set[str] = set()
    for stage in ("conv", "ffn", "emb"):
        before = snapshot(model)
        reports = fairseq_qn.freeze(model, stage)
        assert {r.name.removesuffix(".weight") for r in reports} == names[stage] and {
            r.stage for r in reports
        } == {stage}
        done |= names[stage]
        changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
        assert changed == {f"{n}.{buffer}" for n in names[stage] for buffer in ("phase", "codes", "digest")}
        assert {v.name.removesuffix(".weight") for v in views_of(model) if v.phase == FROZEN} == done
        assert fairseq_qn.freeze(model, stage) == []
        model(IDS)
        frozen_reads = {n: model.get_submodule(n).weight.detach() for n in done}
        model(IDS)
        # no noise on them
        assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in frozen_reads.items())
    assert fairseq_qn.freeze(model) == []


def test_frozen_is_the_same_in_training_and_evaluation() -> None:
    model = applied(kind="proxy", p=0.5)
    fairseq_qn.freeze(model)
    assert torch.equal(model.train()(IDS), model.eval()(IDS))


def test_codes_are_those_of_the_seed() -> None:
    codes = []
    for seed in (0, 0, 1):
        model = Net()
        fairseq_qn.apply(model, recipe(), seed=seed)
        torch.manual_seed(len(codes))
        fairseq_qn.freeze(model)
        codes.append({view.name: view.buffer("codes") for view in views_of(model)})
    assert all(torch.equal(codes[0][n], codes[1][n]) for n in codes[0])
    assert any(not torch.equal(codes[0][n], codes[2][n]) for n in codes[0])


def test_exact_noise_hands_its_codebook_on() -> None:
    model = applied(kind="exact", p=0.5)
    fairseq_qn.refresh(model)
    errors = {r.name: r.error for r in fairseq_qn.refresh(model)}
    assert all(
        r.error <= errors[r.name] * (1 + 1e-5) + 1e-12 for r in fairseq_qn.freeze(model, iterations=1)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", ["product", "integer"])
def test_nan_names_the_layer_and_nothing_is_changed(value: float, scheme: str) -> None:
    model = applied(scheme=scheme)
    with torch.no_grad():
        model.mix.get_parameter("weight").view(-1)[3] = value  # not the first layer to be looked at
    before = snapshot(model)
    for stage in (None, "conv"):
        with pytest.raises(
            NonFiniteWeight, match=r"^mix.weight: 1 of 12 weights are NaN or Inf; nothing was frozen$"
        ):
            fairseq_qn.freeze(model, stage)
        after = model.state_dict()
        assert all(torch.equal(t, after[n]) or n == "mix.weight" for n, t in before.items())
        assert all(view.phase == FLOAT for view in views_of(model))
    fairseq_qn.freeze(model, "emb")  # the others can still be frozen


def test_refresh_refuses_nan_too() -> None:
    model = applied(kind="exact", p=0.5)
    with torch.no_grad():
        model.block.fc1.get_parameter("weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteWeight, match="^block.fc1.weight: "):
        fairseq_qn.refresh(model)


def test_unknown_stages_and_models_without_a_recipe() -> None:
    model = applied()
    with pytest.raises(
        RecipeError, match=r"^freeze: stage: expected one of \['emb', 'conv', 'ffn'\], found 'attn'$"
    ):
        fairseq_qn.freeze(model, "attn")
    for verb in (fairseq_qn.freeze, fairseq_qn.refresh, fairseq_qn.predict_size):
        with pytest.raises(UnsupportedError, match=r"the model carries no recipe; call fairseq_qn.apply"):
            verb(Net())


def test_progress_sees_each_layer_once() -> None:
    model, seen = applied(), []

    def progress(views: Any) -> Any:
        for view in views:
            yield view
            seen.append(view.name)

    fairseq_qn.freeze(model, progress=progress)
    assert sorted(seen) == sorted(f"{name}.weight" for name in LAYERS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_freezes_as_its_fp32_values(dtype: torch.dtype) -> None:
    half = Net().to(dtype)
    full = Net()
    full.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    for model in (half, full):
        fairseq_qn.apply(model, Recipe.load(recipe()))
        fairseq_qn.freeze(model)
    for a, b in zip(views_of(half), views_of(full)):
        assert torch.equal(a.buffer("codes"), b.buffer("codes"))
        assert a.home.weight.dtype == dtype and torch.equal(a.home.weight, b.home.weight.to(dtype))
    half.embed.weight.sum().backward()
    assert half.embed.get_parameter("weight").grad.dtype == dtype
