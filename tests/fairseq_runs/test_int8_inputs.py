"""Weights, or codebooks, and inputs in int8, by fairseq's own loop, up to the answers of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import CLASSES, EACH, RESETS, STAGES, Run, differing, train, write_recipe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.modules.activations import placed
from fairseq_qn.modules.integer_layer import IntegerLinear
from fairseq_qn.modules.packed import Packed

LAYERS = {"ffn": r".*\.fc[12]|classification_heads.*", "emb": ".*embed_tokens", "attn": r".*attn\.\w+_proj"}
ENCODER = "encoder.sentence_encoder.layers.0"


SCHEMES = {
    "integer": {"scheme": "integer", "bits": 8, "symmetric": True},
    "product": {"scheme": "product", "block_size": 4, "n_centroids": 32, "codebook_bits": 8},
}


def recipe(activations: Any, p: float = 0.5, scheme: str = "integer") -> dict[str, Any]:
    rules = [
        {"layers": LAYERS[stage], **SCHEMES[scheme], "stage": stage, "activations": activations}
        for stage in STAGES
    ]
    return {
        "version": 1, "noise": {"kind": "proxy", "p": p}, "stages": [*STAGES],
        "rules": [{**rule, "optional": True} for rule in rules],
    }  # fmt: skip


@pytest.fixture(scope="module")
def static(request, data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Any]]:
    folder = tmp_path_factory.mktemp("static")
    lines = {"ranges": "static", "start": 2, "momentum": 0.9}
    content = recipe(lines, scheme=getattr(request, "param", "integer"))
    options = {"--quant-recipe": write_recipe(folder / "r.yaml", content), "--max-update": 8}
    words = [str(data.classes), CLASSES, options, {"--quant-stage-updates": "3,4,6"}]
    return train(folder / "run", words, EACH), words


@pytest.mark.parametrize("static", SCHEMES, indirect=True)
def test_a_resumed_run_ends_the_same_to_the_bit(static: tuple[Run, list[Any]], tmp_path: Path) -> None:
    run, words = static
    state = run.state()["model"]
    ranges = {key: value for key, value in state.items() if key.endswith("activation_range")}
    assert len(ranges) == 2 * (2 + 4) + 2 and all(bool((value > 0).any()) for value in ranges.values())
    for update in (2, 5):
        resumed = train(tmp_path / str(update), words, {"--restore-file": run.path(update)})
        assert differing(state, resumed.state()["model"]) == []
        assert differing(run.state()["last_optimizer_state"], resumed.state()["last_optimizer_state"]) == []


@pytest.mark.parametrize("static", SCHEMES, indirect=True)
@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_the_file_answers_as_the_trained_model(
    static: tuple[Run, list[Any]], mode: str, tmp_path: Path
) -> None:
    run, _ = static
    model, _, _ = hub.load_checkpoint(run.folder / "checkpoint_last.pt")
    fairseq_qn.save(model, tmp_path / "m.qn.safetensors", parts="float32", drop=["encoder.lm_head"])
    tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    with torch.no_grad():
        found = [
            m(tokens, features_only=True, classification_head_name="sentence_classification_head")[0]
            for m in (run.model, model.eval(), hub.load_interface(tmp_path / "m.qn.safetensors", mode).model)
        ]
        plain = hub.load_interface(tmp_path / "m.qn.safetensors", mode).model
        fc1 = plain.get_submodule(f"{ENCODER}.fc1")
        assert "int8 in" in repr(fc1) and isinstance(fc1, Packed) == (mode == "packed")
        q = plain.get_submodule(f"{ENCODER}.self_attn.q_proj")
        seen: list[torch.Tensor] = []
        q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        plain(tokens, features_only=True)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)
    assert len(seen) == 1 and len(seen[0].unique()) <= 256, "fairseq's attention calls its projections"


@pytest.mark.parametrize("static", SCHEMES, indirect=True)
def test_linears_on_integers(static: tuple[Run, list[Any]], tmp_path: Path) -> None:
    """All that the recipe quantises; the answers of the packed model but for rounding."""
    run, _ = static
    path = tmp_path / "m.qn.safetensors"
    model, _, _ = hub.load_checkpoint(run.folder / "checkpoint_last.pt")
    fairseq_qn.save(model, path, parts="float32")
    tokens = torch.tensor([[0, 5, 6, 7, 2], [0, 9, 2, 1, 1]])
    for mode in ("packed", "integer"):
        found = hub.load_interface(path, mode)
        answers = found.predict("sentence_classification_head", tokens, return_logits=True).detach()
        plain = found.model(tokens)[0].detach()
        if mode == "packed":
            expected, features = answers, plain
    assert sum(isinstance(module, IntegerLinear) for module in found.model.modules()) == 14
    assert not any(isinstance(m, Packed) and isinstance(m, torch.nn.Linear) for m in found.model.modules())
    torch.testing.assert_close(answers, expected, rtol=0, atol=0.02)  # of about 1
    torch.testing.assert_close(plain, features, rtol=0, atol=float(0.02 * features.abs().max()))


def test_other_recipes_go_on_from_its_checkpoint(static: tuple[Run, list[Any]], tmp_path: Path) -> None:
    """Without activations, and with them from a checkpoint without."""
    run, words = static
    last: Any = {"--restore-file": run.path(2)}
    for i, activations in enumerate([None, 8, {"ranges": "static"}]):
        options = {"--quant-recipe": write_recipe(tmp_path / f"{i}.yaml", recipe(activations))}
        again = train(tmp_path / str(i), words, options, last, RESETS, {"--max-update": 1})
        keys = [key for key in again.state()["model"] if key.endswith("activation_range")]
        assert len(keys) == (14 if i == 2 else 0)
        last = {"--restore-file": tmp_path / str(i) / "checkpoint_last.pt"}


def test_compress_quantises_the_inputs_of_any_checkpoint(
    static: tuple[Run, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, words = static
    output = tmp_path / "m.qn.safetensors"
    given = write_recipe(tmp_path / "dynamic.yaml", recipe(8))
    words = ["compress", str(run.path(2)), "-o", str(output), "--recipe"]
    assert main([*words, str(given)]) == 0
    assert {scheme.label for _, scheme in placed(fairseq_qn.load(output))} == {"int8 in"}
    capsys.readouterr()
    assert main(["inspect", str(output)]) == 0
    assert "int8 in, dynamic ranges: 14 layers" in capsys.readouterr().out
    assert main(["export-hf", str(output), "-o", str(tmp_path / "hf")]) == 1  # it carries no BPE
    assert "transformers' model computes with inputs as they are" in capsys.readouterr().err
    unseen = write_recipe(tmp_path / "static.yaml", recipe({"ranges": "static"}))
    stock = tmp_path / "stock.pt"
    assert main(["export-fairseq", str(run.path(2)), "-o", str(stock)]) == 0
    assert "computes with inputs as they are, this one rounds them" in capsys.readouterr().out
    assert main(["compress", str(stock), "-o", str(output), "--recipe", str(unseen)]) == 1
    assert "no input has been seen, and so no range" in capsys.readouterr().err
