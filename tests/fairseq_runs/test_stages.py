"""qn_masked_lm trained for real, with a recipe in three stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fairseq_run import EACH, MLM, STAGES, Run, recipe, together, train, write_recipe
from torch import Tensor

from fairseq_qn.errors import QNError
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.quant import product

UPDATES = {"--quant-stage-updates": "3,4,8", "--max-update": 11}


@pytest.fixture(scope="module")
def staged(data, tmp_path_factory) -> Run:
    """Stages after 3, 4 and 8 updates; a checkpoint after each update."""
    folder = tmp_path_factory.mktemp("staged")
    return train(
        folder, data.lm, MLM, EACH, UPDATES, {"--quant-recipe": write_recipe(folder / "r.yaml", recipe())}
    )


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory) -> Run:
    """The same training with the noise but without any stage."""
    folder = tmp_path_factory.mktemp("plain")
    return train(
        folder,
        data.lm,
        MLM,
        {"--max-update": 11, "--quant-recipe": write_recipe(folder / "r.yaml", recipe())},
    )


def frozen_stages(state: dict) -> set[str]:
    """Stages all of whose layers a state dict holds as frozen."""
    named = {"ffn": "fc", "emb": "embed_tokens", "attn": "_proj"}
    phases = {key: int(value) for key, value in state["model"].items() if key.endswith("phase")}
    return {
        stage for stage, part in named.items() if all(v == FROZEN for k, v in phases.items() if part in k)
    }


def test_stages_at_their_updates(staged: Run) -> None:
    # frozen at the beginning of the update that follows, and so first seen in the checkpoint after it
    seen = {update: frozen_stages(staged.at(update)) for update in range(1, 12)}
    expected = {u: {s for s, boundary in zip(STAGES, (3, 4, 8)) if u > boundary} for u in range(1, 12)}
    assert seen == expected


def test_state_dict_keys_and_shapes_never_change(staged: Run) -> None:
    first = {key: (t.shape, t.dtype) for key, t in staged.at(1)["model"].items()}
    assert any(key.endswith("codes") for key in first)
    for update in (3, 4, 5, 8, 11):
        assert {key: (t.shape, t.dtype) for key, t in staged.at(update)["model"].items()} == first


def test_codes_of_a_frozen_stage_never_change(staged: Run) -> None:
    codes = {key for key in staged.at(4)["model"] if key.endswith("codes") and "fc" in key}
    assert len(codes) == 4
    for key in codes:
        assert staged.at(4)["model"][key].equal(staged.at(11)["model"][key])
        assert staged.at(4)["model"][key].max() > 0


def second_moments(run: Run, update: int) -> dict[str, Tensor]:
    """exp_avg_sq of each Parameter, by name, in the checkpoint after an update."""
    state = run.at(update)["last_optimizer_state"]["state"]
    return {name: state[i]["exp_avg_sq"] for i, (name, _) in enumerate(run.model.named_parameters())}


def held_back(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Parameters whose second moment is not Adam's next: v' = 0.999 v + 0.001 g^2 >= 0.999 v; a reset one is
    0.001 g^2.
    """
    return {name for name, v in before.items() if not bool((after[name] >= 0.99899 * v).all())}


def test_optimizer_runs_through(staged: Run) -> None:
    """Of what is frozen after update 8 the moments become those of the codewords, and go on from there; the
    rest goes on.
    """
    for update in range(1, 12):
        state = staged.at(update)["last_optimizer_state"]["state"]
        assert {int(parameter["step"]) for parameter in state.values()} == {update}
    before, after = second_moments(staged, 8), second_moments(staged, 9)
    attention = {view.name: view for view in views_of(staged.model) if view.rule.stage == "attn"}
    assert held_back(before, after) == {*attention} and len(attention) == 8
    for name, view in attention.items():
        sizes = (
            view.scheme.groups(view)
            .counts[view.buffer("codes").long()]
            .repeat_interleave(view.scheme.block_size, 1)
        )
        before[name] = (
            product.project(before[name], view.scheme.groups(view), view.scheme.block_size) / sizes
        )
    assert held_back(before, after) == set()
    assert sum(float(v.sum()) for v in before.values()) > 0
    for name, view in attention.items():
        assert [together(second_moments(staged, update)[name], view) for update in (8, 9, 11)] == [
            False,
            True,
            True,
        ]


def test_moments_can_be_kept(data, tmp_path: Path) -> None:
    options = {**UPDATES, "--max-update": 9, "--quant-keep-moments": None}
    run = train(
        tmp_path,
        data.lm,
        MLM,
        EACH,
        options,
        {"--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe())},
    )
    assert held_back(second_moments(run, 8), second_moments(run, 9)) == set()


@pytest.mark.parametrize("optimizer", ["sgd", "nag", "adafactor"])
def test_other_optimizers_are_left_alone_and_it_is_said_once(optimizer: str, data, tmp_path: Path) -> None:
    options = {"--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe()), "--optimizer": optimizer}
    run = train(tmp_path, data.lm, MLM, options, {"--quant-stage-updates": "1,2,3", "--max-update": 4})
    assert all(view.phase == FROZEN for view in views_of(run.model))
    said = [text for name, text in run.lines if "no moments of Adam" in text]
    assert len(said) == 1 and said[0].lower().startswith(optimizer) and "4 frozen layers" in said[0]
    assert not any("moments of Adam projected" in text for _, text in run.lines)


def test_learning_rate_runs_through(staged: Run, plain: Run) -> None:
    curve = [figures["lr"] for figures in staged.logged()]
    assert len(curve) == 11
    assert curve == [figures["lr"] for figures in plain.logged()]
    assert len(set(curve)) == 11, "a schedule that moves at each update"


def test_losses_differ_only_from_the_first_stage_on(staged: Run, plain: Run) -> None:
    ours, theirs = ([figures["loss"] for figures in run.logged()] for run in (staged, plain))
    assert ours[:3] == theirs[:3]
    assert ours[3:] != theirs[3:]


def test_figures_are_logged(staged: Run) -> None:
    logged = staged.logged()
    shares = [figures["qn_frozen_share"] for figures in logged]
    assert shares[:3] == [0] * 3 and shares[-1] == 1 and shares == sorted(shares)
    assert len(set(shares)) == 4
    assert "qn_distortion_attn" not in logged[7] and 0 < logged[8]["qn_distortion_attn"] < 1
    assert all(0 < figures["qn_predicted_mb"] < 1 for figures in logged)
    valid = staged.logged("valid")[-1]
    assert valid["valid_qn_frozen_share"] == 1 and 0 < valid["valid_qn_distortion_ffn"] < 1


@pytest.mark.parametrize("where", ["options", "recipe"])
def test_stages_at_the_beginning_of_epochs(where: str, data, tmp_path: Path) -> None:
    stages = [{"name": name, "epoch": epoch} for name, epoch in zip(STAGES, (2, 3, 3))]
    content = recipe(stages=stages) if where == "recipe" else recipe()
    chosen = {} if where == "recipe" else {"--quant-stage-epochs": "2,3,3"}
    chosen["--quant-recipe"] = write_recipe(tmp_path / "r.yaml", content)
    run = train(tmp_path, data.lm, MLM, chosen, {"--max-epoch": 3})
    assert frozen_stages(run.state("checkpoint1.pt")) == set()
    assert frozen_stages(run.state("checkpoint2.pt")) == {"ffn"}
    assert frozen_stages(run.state("checkpoint3.pt")) == set(STAGES)
    first_of_two = next(figures for figures in run.logged() if figures["epoch"] == 2)
    assert first_of_two["qn_frozen_share"] > 0, "from the first update of the epoch"


def test_the_head_stays_tied(staged: Run) -> None:
    for update in (1, 4, 9):
        model = staged.at(update)["model"]
        assert model["encoder.sentence_encoder.embed_tokens.weight"].equal(model["encoder.lm_head.weight"])
    encoder = staged.model.encoder
    assert encoder.lm_head.weight.equal(encoder.sentence_encoder.embed_tokens.weight)
    stored = encoder.sentence_encoder.embed_tokens.get_parameter("weight")
    assert encoder.lm_head.get_parameter("weight") is stored
    assert not encoder.lm_head.weight.equal(stored)
    assert all(view.phase == FROZEN for view in views_of(staged.model))


@pytest.fixture
def refused(data, tmp_path: Path) -> Callable[..., str]:
    """The message with which a training is refused before it begins."""

    def run(*parts: object) -> str:
        options = {"--max-update": 1, "--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe())}
        with pytest.raises(QNError) as error:
            train(tmp_path, data.lm, MLM, options, *parts)
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


def test_ema_is_refused(refused: Callable[..., str]) -> None:
    assert "--store-ema" in refused("--store-ema")


def test_fairseqs_own_quantiser_is_refused(refused: Callable[..., str]) -> None:
    assert "--quant-recipe" in refused({"--quantization-config-path": "x.yaml"})


@pytest.mark.parametrize(
    ("options", "late"),
    [
        ({"--quant-stage-updates": "1,2,3", "--max-update": 3}, ["attn"]),
        ({"--quant-stage-updates": "1,1,2", "--max-update": 3}, []),
        ({"--quant-stage-epochs": "1,2,2", "--max-epoch": 1, "--max-update": 1}, ["emb", "attn"]),
    ],
)
def test_a_stage_after_the_end_is_warned_of(options: dict, late: list[str], data, tmp_path: Path) -> None:
    run = train(
        tmp_path, data.lm, MLM, options, {"--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe())}
    )
    warned = [
        text.split()[1].rstrip(":") for _, text in run.lines if "not before the end of training" in text
    ]
    assert warned == late
    assert (run.logged()[-1]["qn_frozen_share"] < 1) == bool(late)


def test_fully_sharded_is_refused(refused: Callable[..., str]) -> None:
    assert "fully_sharded" in refused({"--ddp-backend": "fully_sharded"})


@pytest.mark.parametrize("stages", ["3,4", "4,3,8", "3,4,x", "3,4,8,9"])
def test_stage_numbers_that_do_not_fit(stages: str, refused: Callable[..., str]) -> None:
    assert "--quant-stage-updates" in refused({"--quant-stage-updates": stages})


def test_updates_and_epochs_at_once(refused: Callable[..., str]) -> None:
    assert "one of the two" in refused({"--quant-stage-updates": "1,2,3", "--quant-stage-epochs": "1,2,3"})
