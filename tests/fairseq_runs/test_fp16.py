"""The fp16 path, as far as a CPU can show it: fairseq's two fp16 optimizers over a model in half precision.

Plain `--fp16` asks for a CUDA device in order to flatten its fp32 master weights, so it mostly runs here
with `--fp16-no-flatten-grads`, and once with that device feigned; `--memory-efficient-fp16` has no masters.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fairseq_run import EACH, MLM, Run, differing, recipe, together, train, write_recipe

from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.quant import product
from fairseq_qn.tasks.optimizers import masters_of, torch_optimizers

STAGED = {"--quant-stage-updates": "2,3,6", "--max-update": 9, "--update-freq": 2}
MASTERS = {"--fp16": None, "--fp16-no-flatten-grads": None, "--fp16-init-scale": 4}
# the loss scale doubles after each update until one overflows, which is skipped and tried again at half the
# scale
OVERFLOWING = {
    "--fp16": None,
    "--memory-efficient-fp16": None,
    "--fp16-scale-window": 1,
    "--fp16-init-scale": 2**12,
}


@pytest.fixture(scope="module", params=["proxy", "exact"])
def runs(request, data, tmp_path_factory) -> tuple[Run, Run]:
    """The same staged training with fp16 weights over fp32 masters, and in fp32."""
    folder = tmp_path_factory.mktemp("half")
    path = {"--quant-recipe": write_recipe(folder / "r.yaml", recipe({"kind": request.param, "p": 0.2}))}
    return train(folder / "fp16", data.lm, MLM, STAGED, path, MASTERS), train(
        folder / "fp32", data.lm, MLM, STAGED, path
    )


def test_stages_and_losses_as_in_fp32(runs: tuple[Run, Run]) -> None:
    half, full = runs
    assert type(half.trainer.optimizer).__name__ == "FP16Optimizer"
    assert {p.dtype for p in half.model.parameters()} == {torch.float16}
    assert all(view.phase == FROZEN for view in views_of(half.model))
    for key in ("loss", "qn_frozen_share", "qn_distortion_attn"):
        ours, theirs = ([figures.get(key, 0) for figures in run.logged()] for run in runs)
        assert ours == pytest.approx(theirs, abs=0.05), key
    keys = {
        name: [(k, t.shape) for k, t in run.state()["model"].items()]
        for name, run in (("half", half), ("full", full))
    }
    assert keys["half"] == keys["full"]


def test_masters_move_the_codebooks(runs: tuple[Run, Run]) -> None:
    """What the model reads is the mean, taken in fp32, of the blocks of its fp16 weights; the masters hold
    them finer.
    """
    half, _ = runs
    masters = {
        id(p16): p32
        for p16, p32 in zip(half.trainer.optimizer.fp16_params, half.trainer.optimizer.fp32_params)
    }
    for view in views_of(half.model):
        master = masters[id(view.weight)]
        assert (
            master.dtype == torch.float32
            and master.half().equal(view.weight)
            and not master.equal(view.weight.float())
        )
        codebook = product.codebook_of(view.weight.float(), view.scheme.groups(view), view.scheme.block_size)
        expected = product.decode(view.buffer("codes"), codebook, view.weight.shape).half()
        if view.padding_idx is not None:
            expected[view.padding_idx] = view.weight[view.padding_idx].detach()
        assert view.home.weight.equal(expected)


MODES = {
    "fp32": {},
    "masters": MASTERS,
    "one flat master": {"--fp16": None, "--fp16-init-scale": 4},
    "none": {"--fp16": None, "--memory-efficient-fp16": None, "--fp16-init-scale": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_moments_of_frozen_layers_are_those_of_codewords(
    mode: str, data, tmp_path: Path, monkeypatch
) -> None:
    """All blocks of a codeword share their moments, wherever those are; and masters move together in every
    block.
    """
    # where the masters are flattened to: the CPU
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    path = write_recipe(tmp_path / "r.yaml", recipe())
    run = train(
        tmp_path,
        data.lm,
        MLM,
        MODES[mode],
        {"--quant-recipe": path, "--quant-stage-updates": "2,3,9"},
        {"--max-update": 6},
    )
    wrapper, (adam,) = run.trainer.optimizer, torch_optimizers(run.trainer.optimizer)
    placed = masters_of(wrapper)
    masters = {"masters": len(placed), "one flat master": 1}
    assert len({id(master) for master, _ in placed.values()}) == masters.get(mode, 0)
    for view in views_of(run.model):
        master, offset = placed.get(view.weight, (view.weight, 0))
        for key, own in adam.state[master].items():
            if key.startswith("exp_avg"):
                moment = own.flatten()[offset : offset + view.weight.numel()].view(view.weight.shape)
                assert moment.any() and together(moment, view) == (view.phase == FROZEN), view.name


def test_resume_with_overflows_is_bit_identical(data, tmp_path: Path, monkeypatch) -> None:
    """A checkpoint may fall between an update that overflowed and its repetition, whose noise is another."""
    # fairseq puts the norm of an overflow on the GPU
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    path = write_recipe(tmp_path / "r.yaml", recipe({"kind": "exact", "p": 0.2, "refresh": 2}))
    words = [data.lm, MLM, STAGED, OVERFLOWING, {"--quant-recipe": path}]
    straight = train(tmp_path / "straight", words, EACH)
    skipped = [text for _, text in straight.lines if "overflow detected" in text]
    assert len(skipped) > 2, "some updates overflowed"
    expected = straight.at(9)
    wrong = {}
    for update in (2, 3, 4, 6, 8):
        resumed = train(tmp_path / str(update), words, {"--restore-file": straight.path(update)}).state()
        wrong[update] = [differing(expected[key], resumed[key]) for key in ("model", "last_optimizer_state")]
    assert wrong == {update: [[], []] for update in wrong}
