"""Shared, dropped and pruned layers through fairseq's own loop, and out into a small file."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import (
    CLASSES,
    EACH,
    LANGUAGE,
    MLM,
    PAIRS,
    Run,
    build,
    command,
    differing,
    recipe,
    train,
    write_recipe,
)
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.modules.view import FROZEN, views_of

DEEP = {"--encoder-layers": 4, "--encoder-layerdrop": 0.3}
DEEP_DECODER = {"--decoder-layers": 4, "--decoder-layerdrop": 0.3}
KINDS = {
    "roberta": ("lm", {**MLM, **DEEP}),
    "lm": ("lm", {**LANGUAGE, **DEEP_DECODER}),
    "mt": ("pairs", {**PAIRS, **DEEP, **DEEP_DECODER}),
}
LOOP = {"--quant-stage-updates": "2,3,5", "--update-freq": 2, "--max-update": 7}
SHARE = [{"layers": ".*layers", "chunk": 2}]
LAYERS = {
    "roberta": ["encoder.sentence_encoder.layers"],
    "lm": ["decoder.layers"],
    "mt": ["encoder.layers", "decoder.layers"],
}


@dataclass
class Shared:
    kind: str
    run: Run
    words: list[Any]
    sample: dict[str, Any]

    def stacks(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(name) for name in LAYERS[self.kind]]


@torch.no_grad()
def asked(model: nn.Module, sample: dict[str, Any]) -> Tensor:
    return model.eval()(**sample["net_input"])[0]


def weights(stack: nn.Module) -> list[int]:
    """Which fc1 each layer has: the number of the first layer with the same."""
    held = [id(layer.fc1._parameters["weight"]) for layer in stack._modules.values()]
    return [held.index(each) for each in held]


@pytest.fixture(scope="module", params=KINDS)
def shared(request, data, tmp_path_factory) -> Shared:
    """Layers share by twos, with LayerDrop and exact noise, through all stages."""
    folder = tmp_path_factory.mktemp(request.param)
    source, options = KINDS[request.param]
    path = write_recipe(folder / "r.yaml", recipe({"kind": "exact", "p": 0.2}, share=SHARE))
    words = [getattr(data, source), options, LOOP, {"--quant-recipe": path}]
    run = train(folder / "run", words, EACH)
    return Shared(request.param, run, words, build(getattr(data, source), options).sample)


def test_one_weight_for_two_layers(shared: Shared) -> None:
    assert [weights(stack) for stack in shared.stacks(shared.run.model)] == [[0, 0, 2, 2]] * len(
        LAYERS[shared.kind]
    )
    views = list(views_of(shared.run.model))
    assert all(view.phase == FROZEN for view in views)
    assert not [view.name for view in views if "layers.1." in view.name or "layers.3." in view.name]
    state = shared.run.state()
    trained = len(list(shared.run.model.parameters()))
    assert len(state["last_optimizer_state"]["state"]) == trained
    assert any("layers.3.fc1.weight" in key for key in state["model"])


def test_resumed_bit_for_bit(shared: Shared, tmp_path: Path) -> None:
    """From between the stages."""
    again = train(tmp_path, shared.words, {"--restore-file": shared.run.path(4)})
    for part in ("model", "last_optimizer_state"):
        assert differing(shared.run.at(7)[part], again.state()[part]) == [], part


def test_pruned_on_the_way_out(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Every other chunk, from the checkpoint, and read again in a process that knows nothing else."""
    path, out = tmp_path / "a.qn.safetensors", tmp_path / "out.pt"
    words = ["--prune", "every_other", "--parts", "float32", "--json"]
    assert main(["compress", str(shared.run.folder / "checkpoint_last.pt"), "-o", str(path), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kept"] == {name: [0, 1] for name in LAYERS[shared.kind]}
    size = report["size"]
    left = fairseq_qn.prune(shared.run.model, [0, 1])
    assert size["total"] == fairseq_qn.predict_size(left, parts="float32") == path.stat().st_size
    whole = fairseq_qn.predict_size(shared.run.model, parts="float32")
    assert size["total"] < whole
    source = fairseq_qn.inspect(path)["source"]["model"]
    assert {source[key] for key in source if key in ("encoder_layers", "decoder_layers")} == {2}
    model = fairseq_qn.load(path)
    assert [weights(stack) for stack in shared.stacks(model)] == [[0, 0]] * len(LAYERS[shared.kind])
    assert asked(model, shared.sample).equal(asked(left, shared.sample))
    if shared.kind != "mt":
        return
    torch.save(shared.sample["net_input"], tmp_path / "in.pt")
    code = "import sys, torch, fairseq_qn; torch.set_num_threads(1); model = fairseq_qn.load(sys.argv[1])\n"
    code += "with torch.no_grad(): torch.save(model(**torch.load(sys.argv[2]))[0], sys.argv[3])"
    done = command(sys.executable, "-c", code, path, tmp_path / "in.pt", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(out).equal(asked(left, shared.sample))


def test_prune_on_the_command_line(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """One stack alone; by the recipe; and what cannot be."""
    name = LAYERS[shared.kind][-1]
    words = [
        "compress",
        str(shared.run.folder / "checkpoint_last.pt"),
        "-o",
        str(tmp_path / "a.qn.safetensors"),
    ]
    assert main([*words, "--prune", f"{name.split('.')[0]}=1,2"]) == 0
    assert f"{name}: kept layers 1, 2\n" in capsys.readouterr().out
    depths = [len(stack) for stack in shared.stacks(fairseq_qn.load(words[-1]))]
    assert depths == [4, 2][-len(depths) :]
    lines = [{"layers": ".*layers", "keep": [3]}]
    data = recipe({"kind": "exact", "p": 0.2}, share=SHARE, prune=lines)
    assert main([*words, "--recipe", str(write_recipe(tmp_path / "r.yaml", data))]) == 0
    assert [len(stack) for stack in shared.stacks(fairseq_qn.load(words[-1]))] == [1] * len(depths)
    capsys.readouterr()
    assert main([*words, "--prune", "0,4"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "expected layers out of 0 to 3, found 4" in error
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--prune", "each"])


def test_pruned_by_fairseqs_own_options(shared: Shared) -> None:
    """The second layer of each chunk is kept, and with it what the first one held for both."""
    keep = {f"{side}_layers_to_keep": "1,3" for side in ("encoder", "decoder")}
    given = {key: value for key, value in keep.items() if key.split("_")[0] in str(LAYERS[shared.kind])}
    path = str(shared.run.folder / "checkpoint_last.pt")
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], given)
    assert [weights(stack) for stack in shared.stacks(model)] == [[0, 1]] * len(LAYERS[shared.kind])
    left = fairseq_qn.prune(shared.run.model, [1, 3])
    assert asked(model, shared.sample).equal(asked(left, shared.sample))


STUDENTS = {
    "roberta": ("classes", {**CLASSES, **DEEP}, {}, "encoder.sentence_encoder"),
    "roberta, shared": ("classes", {**CLASSES, **DEEP}, {"share": [{"layers": ".*layers", "chunk": 4}]},
                        "encoder.sentence_encoder"),
    "mt": ("pairs", {**PAIRS, **DEEP, **DEEP_DECODER}, {}, "encoder"),
}  # fmt: skip


@dataclass
class Student:
    folder: Path
    teacher: Run
    run: Run
    words: list[Any]
    sample: dict[str, Any]
    stack: str
    numbers: list[int]  # of the teacher's layers
    begun: list[dict[str, Tensor]]


@pytest.fixture(scope="module", params=STUDENTS)
def student(request, data, tmp_path_factory) -> Student:
    """Half of a dense teacher's layers, taught by the whole of it."""
    folder = tmp_path_factory.mktemp("student")
    source, options, lines, stack = STUDENTS[request.param]
    kept = {"--encoder-layers-to-keep": "0,2"}
    teacher = train(folder / "teacher", getattr(data, source), options, {"--max-update": 3})
    path = write_recipe(folder / "r.yaml", recipe(**lines))
    words = [
        getattr(data, source),
        options,
        kept,
        {"--quant-recipe": path, "--quant-stage-updates": "2,3,4"},
    ]
    words += [{"--finetune-from-model": teacher.path(3), "--teacher-checkpoint": teacher.path(3)}]
    words += [{"--distill-weight": 0.5}]
    begun: list[dict[str, Tensor]] = []

    def watch(trainer: Any) -> None:
        original = trainer.load_checkpoint

        def load(*args: Any, **kwargs: Any) -> Any:
            extra = original(*args, **kwargs)
            begun.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
            return extra

        trainer.load_checkpoint = load

    run = train(folder / "run", words, {"--max-update": 6}, watch=watch)
    sample = build(getattr(data, source), options).sample
    return Student(folder, teacher, run, words, sample, stack, [0, 0] if lines else [0, 2], begun)


def test_a_student_begins_as_the_layers_that_it_keeps(student: Student) -> None:
    theirs, ours = student.teacher.state()["model"], student.begun[0]
    layers = f"{student.stack}.layers"
    for i, number in enumerate(student.numbers):
        for part in ("fc1.weight", "fc2.bias", "self_attn.q_proj.weight"):
            assert ours[f"{layers}.{i}.{part}"].equal(theirs[f"{layers}.{number}.{part}"])
    assert weights(student.run.model.get_submodule(layers)) == [0, int(student.numbers[1] > 0)]
    logged = student.run.logged()
    assert len(logged) == 6 and all(figures["qn_distill_loss"] > 0 for figures in logged)
    teacher = student.run.trainer.get_criterion().terms[0].teacher
    assert weights(teacher.get_submodule(layers)) == [0, 1, 2, 3]


def test_a_student_is_resumed_by_its_own_command(student: Student) -> None:
    folder = student.folder / "halves"
    train(folder, student.words, {"--max-update": 3})
    again = train(folder, student.words, {"--max-update": 6})
    for part in ("model", "last_optimizer_state"):
        assert differing(student.run.state()[part], again.state()[part]) == []


def test_a_student_goes_out(student: Student, tmp_path: Path) -> None:
    checkpoint, path = student.run.folder / "checkpoint_last.pt", tmp_path / "a.qn.safetensors"
    assert main(["compress", str(checkpoint), "-o", str(path), "--parts", "float32", "--keep-head"]) == 0
    expected = asked(student.run.model, student.sample)
    assert asked(fairseq_qn.load(path), student.sample).equal(expected)
    note = hub.export_fairseq(checkpoint, tmp_path / "stock.pt")["note"]
    assert ("does not share" in note) == (student.numbers == [0, 0])
    (stock,), config, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "stock.pt")])
    assert torch.allclose(asked(stock, student.sample), expected, atol=1e-5)
    assert len(stock.get_submodule(f"{student.stack}.layers")) == 2
    assert config.model.encoder_layers_to_keep is None


def test_layers_that_the_checkpoint_has_not(data, tmp_path: Path) -> None:
    run = train(tmp_path / "run", data.lm, MLM, {"--max-update": 1})
    start = {"--finetune-from-model": run.folder / "checkpoint_last.pt", "--max-update": 1}
    with pytest.raises(Exception, match="architectures match") as error:
        train(tmp_path / "a", data.lm, MLM, start, {"--encoder-layers-to-keep": "0,3,5"})
    assert "layers.3: a layer to keep, but the checkpoint has 2 layers" in str(error.value.__context__)
    with pytest.raises(fairseq_qn.errors.UnsupportedError, match="--encoder-layers-to-keep.*once"):
        build(data.lm, MLM, {"--encoder-layers-to-keep": "0,0"})
