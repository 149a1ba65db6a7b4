"""quantization_aware around fairseq's criterions, and its distillation, against hand computation."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq_run import (
    CLASSES,
    LANGUAGE,
    MLM,
    PAIRS,
    VALUES,
    Built,
    Run,
    build,
    differing,
    recipe,
    train,
    write_recipe,
)
from hydra.core.config_store import ConfigStore

from fairseq_qn.cli import main
from fairseq_qn.criterions.options import Options
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.models import stock

HEAD = {"features_only": True, "classification_head_name": "sentence_classification_head"}
QUIET = {"--dropout": 0, "--attention-dropout": 0}
SMOOTH = {"--wrapped-criterion": "label_smoothed_cross_entropy", "--label-smoothing": 0.2}
CASES = {
    "masked_lm": ("lm", MLM, {}),
    "sentence_prediction": ("classes", CLASSES, {}),
    "cross_entropy": ("pairs", PAIRS, {}),
    "cross_entropy of a language model": ("lm", LANGUAGE, {}),
    "label_smoothed_cross_entropy": ("pairs", PAIRS, SMOOTH),
}


def loss_of(built: Built, training: bool = False) -> tuple[float, int, dict]:
    built.model.train(training)
    loss, size, log = built.criterion(built.model, built.sample)
    return float(loss), int(size), log


@pytest.mark.parametrize("name", CASES)
def test_wraps(name: str, data) -> None:
    """The same loss, sample size and figures as the criterion by itself."""
    kind, options, more = CASES[name]
    ours = build(getattr(data, kind), options, more)
    bare = {k: v for k, v in {**options, **more}.items() if k != "--wrapped-criterion"}
    stock = build(getattr(data, kind), {**bare, "--criterion": name.split()[0]})
    stock.model.load_state_dict(ours.model.state_dict())
    (loss, size, log), (expected, expected_size, expected_log) = loss_of(ours), loss_of(stock)
    assert (loss, size) == (expected, expected_size) and loss > 0
    assert {key: float(log[key]) for key in expected_log} == {
        key: float(value) for key, value in expected_log.items()
    }
    assert type(ours.criterion.wrapped) is type(stock.criterion)


def test_options_of_the_wrapped_criterion_arrive(data) -> None:
    """(1 - eps) nll + eps / (V - 1) * sum over the other words, by hand."""
    built = build(data.pairs, PAIRS, SMOOTH)
    model, sample = built.model.eval(), built.sample
    with torch.no_grad():
        log_p = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True).double().numpy()
    total, eps, words = 0.0, 0.2, log_p.shape[-1]
    for row, targets in zip(log_p, sample["target"].tolist()):
        for scores, target in zip(row, targets):
            if target != 1:  # padding
                other = eps / (words - 1)
                total -= (1 - eps - other) * scores[target] + other * scores.sum()
    assert loss_of(built)[0] == pytest.approx(total, rel=1e-5)
    assert loss_of(build(data.pairs, PAIRS, SMOOTH, {"--label-smoothing": 0}))[0] != pytest.approx(
        total, rel=1e-3
    )
    report = build(data.pairs, PAIRS, SMOOTH, "--report-accuracy")
    assert "n_correct" in loss_of(report)[2] and "n_correct" not in loss_of(built)[2]


def test_the_options_of_the_dataclass_are_those_everywhere() -> None:
    """fairseq-train's, Hydra's, and what an exported checkpoint leaves out."""
    args = ["data", "--task", "masked_lm", "--arch", "roberta", "--criterion", "quantization_aware"]
    parsed = options.parse_args_and_arch(options.get_training_parser(), args)
    node = ConfigStore.instance().repo["criterion"]["quantization_aware.yaml"].node
    own = {f.name: f.default for f in fields(Options)} | {"_name": "quantization_aware"}
    for name, default in own.items():
        assert node[name] == default
        if name != "_name":
            assert getattr(parsed, name) == default and name in stock._OPTIONS


def test_another_heads_name_arrives(data) -> None:
    built = build(data.classes, CLASSES, {"--classification-head-name": "mood"})
    assert list(built.model.classification_heads) == ["mood"]
    assert loss_of(built)[0] > 0


@pytest.mark.parametrize("name", ["no_such_criterion", "quantization_aware"])
def test_unknown_criterion(name: str, data) -> None:
    with pytest.raises(UnsupportedError, match="--wrapped-criterion"):
        build(data.lm, {**MLM, "--wrapped-criterion": name})


class Asking(FairseqCriterion):
    """A criterion whose loss is 0 and which calls its model in a way of its own."""

    def forward(
        self, model: torch.nn.Module, sample: dict, reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict]:
        self.ask(model, sample["net_input"])
        return torch.zeros((), requires_grad=True), 1, {"loss": 0, "sample_size": 1}


@register_criterion("qn_test_twice")
class Twice(Asking):
    def ask(self, model: torch.nn.Module, asked: dict) -> None:
        model(**asked, **HEAD)
        # the same tensor: who asks later is asked another thing
        asked["src_tokens"].copy_(asked["src_tokens"].flip(1))
        model(**asked, **HEAD)
        with torch.no_grad():
            model(**asked, **HEAD)  # trains nothing


@register_criterion("qn_test_dict")
class Dict(Asking):
    def ask(self, model: torch.nn.Module, asked: dict) -> None:
        with mock.patch.object(
            getattr(model, "model", model), "forward", lambda **_: {"logits": torch.zeros(2, 2)}
        ):
            model(**asked, **HEAD)


@register_criterion("qn_test_features")
class Features(Asking):
    def ask(self, model: torch.nn.Module, asked: dict) -> None:
        model(**asked, features_only=True)


@register_criterion("qn_test_never")
class Never(Asking):
    def ask(self, model: torch.nn.Module, asked: dict) -> None:
        model.encoder(**asked)


@pytest.fixture(scope="module")
def teachers(data, tmp_path_factory) -> dict[str, Path]:
    """A wider model: as a stock checkpoint, a qn_ checkpoint and a small file; a classifier, one of values;
    a translator.
    """
    folder = tmp_path_factory.mktemp("teachers")
    wide = {"--encoder-embed-dim": 48, "--max-update": 3, "--lr": 1e-2}
    stock = {k: v for k, v in MLM.items() if k != "--wrapped-criterion"}
    train(
        folder / "stock",
        data.lm,
        stock,
        wide,
        {"--task": "masked_lm", "--arch": "roberta", "--criterion": "masked_lm"},
    )
    path = {"--quant-recipe": write_recipe(folder / "r.yaml", recipe()), "--quant-stage-updates": "1,1,1"}
    train(folder / "qn", data.lm, MLM, wide, path)
    train(folder / "classes", data.classes, CLASSES, wide)
    train(folder / "values", data.values, VALUES, wide)
    train(folder / "pairs", data.pairs, PAIRS, {"--max-update": 2, "--lr": 1e-2})
    assert (
        main(["compress", str(folder / "qn" / "checkpoint_last.pt"), "-o", str(folder / "t.qn.safetensors")])
        == 0
    )
    found = {
        name: folder / name / "checkpoint_last.pt" for name in ("stock", "qn", "classes", "values", "pairs")
    }
    return {**found, "small": folder / "t.qn.safetensors"}


def distilled_by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """T^2 sum of q log(q / p), in numpy."""
    total = 0.0
    for a, b in zip(
        student.double().numpy().reshape(-1, student.shape[-1]),
        teacher.double().numpy().reshape(-1, teacher.shape[-1]),
    ):
        p, q = (np.exp(x / temperature) / np.exp(x / temperature).sum() for x in (a, b))
        total += float((q * np.log(q / p)).sum())
    return total * temperature**2


@pytest.mark.parametrize("temperature", [1, 3])
@pytest.mark.parametrize("kind", ["stock", "qn", "small"])
def test_distillation_by_hand(kind: str, temperature: float, data, teachers: dict[str, Path]) -> None:
    options = {
        "--teacher-checkpoint": teachers[kind],
        "--distill-weight": 0.3,
        "--distill-temperature": temperature,
    }
    built = build(data.lm, MLM, QUIET, options)
    teacher, sample = built.criterion.terms[0].teacher, built.sample
    masked = sample["target"].ne(1)
    with torch.no_grad():
        ours, theirs = (
            m(**sample["net_input"], masked_tokens=masked)[0] for m in (built.model.eval(), teacher)
        )
    hard = torch.nn.functional.cross_entropy(ours, sample["target"][masked], reduction="sum")
    soft = distilled_by_hand(ours, theirs, temperature)
    loss, size, log = loss_of(built, training=True)
    assert size == int(masked.sum()) and soft > 0.5
    assert loss == pytest.approx(0.7 * float(hard) + 0.3 * soft, rel=1e-4)
    assert float(log["qn_distill_loss"]) == pytest.approx(soft, rel=1e-3) and float(
        log["loss"]
    ) == pytest.approx(loss)
    evaluated, _, log = loss_of(built)
    assert evaluated == pytest.approx(float(hard), rel=1e-5) and "qn_distill_loss" not in log, (
        "not in validation"
    )


def test_distillation_of_a_classifier(data, teachers: dict[str, Path]) -> None:
    built = build(
        data.classes, CLASSES, QUIET, {"--teacher-checkpoint": teachers["classes"], "--distill-weight": 1}
    )
    teacher, sample = built.criterion.terms[0].teacher, built.sample
    call = {
        **sample["net_input"],
        "features_only": True,
        "classification_head_name": "sentence_classification_head",
    }
    with torch.no_grad():
        ours, theirs = (m(**call)[0] for m in (built.model.eval(), teacher))
    assert loss_of(built, training=True)[0] == pytest.approx(distilled_by_hand(ours, theirs, 1), rel=1e-3)


@pytest.mark.parametrize("temperature", [1, 3])
def test_distillation_of_a_value(temperature: float, data, teachers: dict[str, Path]) -> None:
    """The softmax of one output is 1 whatever it is: squared errors, summed as fairseq sums those to the
    targets.
    """
    options = {
        "--teacher-checkpoint": teachers["values"],
        "--distill-weight": 0.3,
        "--distill-temperature": temperature,
    }
    built = build(data.values, VALUES, QUIET, options)
    teacher, sample = built.criterion.terms[0].teacher, built.sample
    with torch.no_grad():
        ours, theirs = (
            m(**sample["net_input"], **HEAD)[0][:, 0].double() for m in (built.model.eval(), teacher)
        )
    hard, soft = (float((ours - other).square().sum()) for other in (sample["target"].flatten(), theirs))
    loss, _, log = loss_of(built, training=True)
    assert loss == pytest.approx(0.7 * hard + 0.3 * soft, rel=1e-4) and soft > 1e-3
    assert float(log["qn_distill_loss"]) == pytest.approx(soft, rel=1e-4)
    built.criterion.terms[0].weight = 1.0  # the teacher alone
    built.criterion(built.model, sample)[0].backward()
    head = built.model.classification_heads["sentence_classification_head"].out_proj
    assert float(head.bias.grad) == pytest.approx(2 * float((ours - theirs).sum()), rel=1e-4)


def test_every_call_is_distilled(data, teachers: dict[str, Path]) -> None:
    """Each against the teacher's answer to what was asked, though the criterion changes its batch in
    between.
    """
    options = {
        "--teacher-checkpoint": teachers["classes"],
        "--distill-weight": 1,
        "--wrapped-criterion": "qn_test_twice",
    }
    built = build(data.classes, CLASSES, QUIET, options)
    teacher, tokens = built.criterion.terms[0].teacher, built.sample["net_input"]["src_tokens"].clone()
    expected = []
    for asked in (tokens, tokens.flip(1)):
        with torch.no_grad():
            ours, theirs = (m(asked, **HEAD)[0] for m in (built.model.eval(), teacher))
        expected.append(distilled_by_hand(ours, theirs, 1))
    assert loss_of(built, training=True)[0] == pytest.approx(sum(expected), rel=1e-3)
    assert min(expected) > 1e-3 and expected[0] != pytest.approx(expected[1], rel=1e-2)


@pytest.mark.parametrize(
    ("how", "found"), [("dict", "dict"), ("features", "features"), ("never", "never called")]
)
def test_what_cannot_be_distilled_is_an_error(how: str, found: str, data, teachers: dict[str, Path]) -> None:
    criterion = {"--wrapped-criterion": f"qn_test_{how}"}
    assert loss_of(build(data.classes, CLASSES, criterion), training=True)[0] == 0, (
        "without a teacher it trains"
    )
    built = build(data.classes, CLASSES, criterion, {"--teacher-checkpoint": teachers["classes"]})
    with pytest.raises(UnsupportedError, match=rf"{found}.*drop --teacher-checkpoint") as error:
        loss_of(built, training=True)
    assert len(str(error.value)) <= 300
    assert loss_of(built)[0] == 0, "validation asks no teacher"


RDROP = {"--wrapped-criterion": "label_smoothed_cross_entropy_with_rdrop", "--rdrop-alpha": 1}


@pytest.mark.parametrize(("times", "criterion"), [(1, {}), (2, RDROP)])
def test_padding_does_not_distil(times: int, criterion: dict, data, teachers: dict[str, Path]) -> None:
    """Positions beyond the end of a target do not count, nor do those of a copy of the batch, which R-drop
    appends.
    """
    built = build(
        data.pairs,
        PAIRS,
        QUIET,
        criterion,
        {"--teacher-checkpoint": teachers["pairs"], "--distill-weight": 1},
    )
    teacher, sample = built.criterion.terms[0].teacher, built.sample
    real = sample["target"].ne(1)
    assert not bool(real.all())
    with torch.no_grad():
        ours, theirs = (m(**sample["net_input"])[0][real] for m in (built.model.eval(), teacher))
    assert loss_of(built, training=True)[0] == pytest.approx(
        times * distilled_by_hand(ours, theirs, 1), rel=1e-3
    )


def test_a_teacher_of_other_classes_is_an_error(data, teachers: dict[str, Path]) -> None:
    built = build(data.classes, CLASSES, {"--teacher-checkpoint": teachers["classes"]})
    built.model.register_classification_head("sentence_classification_head", 3)
    with pytest.raises(MismatchError, match="teacher: logits"):
        loss_of(built, training=True)


@pytest.mark.parametrize("options", [{"--distill-weight": 1.5}, {"--distill-temperature": 0}])
def test_weight_and_temperature_out_of_range(options: dict, data) -> None:
    with pytest.raises(UnsupportedError, match="distill"):
        build(data.lm, MLM, options)


@pytest.fixture(scope="module")
def distilled(data, teachers, tmp_path_factory) -> Run:
    pytest.importorskip("tensorboardX")
    folder = tmp_path_factory.mktemp("distilled")
    options = {
        "--teacher-checkpoint": teachers["qn"],
        "--tensorboard-logdir": folder / "board",
        "--max-update": 4,
    }
    options |= {
        "--quant-recipe": write_recipe(folder / "r.yaml", recipe()),
        "--quant-stage-updates": "1,2,3",
    }
    return train(folder, data.lm, MLM, options)


def test_the_teacher_is_neither_trained_nor_saved(distilled: Run) -> None:
    teacher = distilled.trainer.get_criterion().terms[0].teacher
    theirs = {id(parameter) for parameter in teacher.parameters()}
    groups = distilled.trainer.optimizer.param_groups
    trained = [parameter for group in groups for parameter in group["params"]]
    assert theirs and not theirs & {id(parameter) for parameter in trained}
    assert not teacher.training and not any(
        p.requires_grad or p.grad is not None for p in teacher.parameters()
    )
    state = distilled.state()
    assert set(state["model"]) == set(distilled.trainer.model.state_dict())
    assert not state.get("criterion"), "the criterion has no weights of its own"
    assert len(state["last_optimizer_state"]["state"]) == len(trained)


def test_the_teacher_stays_as_it_was(distilled: Run, teachers: dict[str, Path]) -> None:
    teacher = distilled.trainer.get_criterion().terms[0].teacher
    before = torch.load(teachers["qn"], weights_only=True)["model"]
    assert differing(dict(before), dict(teacher.state_dict())) == []


def test_distillation_is_logged(distilled: Run) -> None:
    logged = distilled.logged()
    assert all(figures["qn_distill_loss"] > 0 for figures in logged) and len(logged) == 4
    assert all(math.isfinite(figures["loss"]) for figures in logged)


def test_figures_are_in_tensorboard(distilled: Run) -> None:
    from fairseq.logging import progress_bar

    for writer in progress_bar._tensorboard_writers.values():
        writer.flush()  # its own thread writes when it likes, and at the end of the process
    found = {tag for path in (distilled.folder / "board").rglob("events*") for tag in tags(path)}
    wanted = {
        "qn_frozen_share",
        "qn_predicted_mb",
        "qn_distortion_ffn",
        "qn_distortion_emb",
        "qn_distortion_attn",
    }
    assert wanted | {"qn_distill_loss"} <= found


def tags(path: Path) -> Iterator[str]:
    """The names of the scalars in an event file."""
    from tensorboardX.proto.event_pb2 import Event

    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield from (
            value.tag for value in Event.FromString(content[at + 12 : at + 12 + length]).summary.value
        )
        at += length + 16  # the length and its checksum before, a checksum after
