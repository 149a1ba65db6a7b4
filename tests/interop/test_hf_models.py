"""Models of transformers with the API: the ready recipes by their names, and GPT-2's Conv1D."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.config_dir import config_dir
from fairseq_qn.errors import FormatError, MismatchError
from fairseq_qn.modules import restore
from fairseq_qn.modules.match import match
from fairseq_qn.recipe import Recipe

RECIPES = config_dir() / "recipes"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BERT = {**SIZES, "vocab_size": 120, "max_position_embeddings": 40}
ROBERTA = {**BERT, "pad_token_id": 1}
DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "vocab_size": 120}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120, "bos_token_id": 0, "eos_token_id": 0}
TYPES = "token_type_embeddings"
# class -> (its config, recipe, layers that it takes, modules with matrices that stay dense)
MODELS = {
    "BertModel": (BERT, "bert-hf", 13, {TYPES, "pooler"}),
    "BertForSequenceClassification": (BERT, "bert-hf", 13, {TYPES, "pooler", "classifier"}),
    "BertForMaskedLM": (BERT, "bert-hf", 13, {TYPES, "transform"}),
    "RobertaForMaskedLM": (ROBERTA, "roberta-hf", 13, {TYPES, "lm_head"}),
    "RobertaForSequenceClassification": (ROBERTA, "roberta-hf", 13, {TYPES, "classifier"}),
    "DistilBertForMaskedLM": (DISTIL, "bert-hf", 13, {"vocab_transform"}),
    "GPT2LMHeadModel": (GPT2, "gpt2-hf", 9, set()),
}
CONFIGS = {"Bert": "BertConfig", "Robe": "RobertaConfig", "Dist": "DistilBertConfig", "GPT2": "GPT2Config"}
IDS = torch.tensor([[5, 7, 90, 33, 8, 2], [5, 41, 6, 2, 17, 3]])


def build(transformers: Namespace, name: str, seed: int = 0) -> nn.Module:
    """A small model of transformers, with the initial weights of its own and noise on them all."""
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS[name[:4]])(**MODELS[name][0])
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


def with_k(name: str, n_centroids: int) -> Recipe:
    """A ready recipe with codebooks for small models."""
    data = Recipe.load(RECIPES / f"{name}.yaml").to_dict()
    for rule in data["rules"]:
        rule["n_centroids"] = n_centroids
    return Recipe.load(data)


@pytest.mark.parametrize("name", MODELS)
def test_a_ready_recipe_takes_the_layers_of_its_model(name: str, transformers: Namespace) -> None:
    model = build(transformers, name)
    _, recipe, layers, dense = MODELS[name]
    _, coverage = match(model, Recipe.load(RECIPES / f"{recipe}.yaml"))
    assert len(coverage.matched) == layers
    matrices = [key for key in coverage.left if model.get_parameter(key).dim() > 1]
    assert {part for part in dense for key in matrices if part in key} == dense
    assert all(any(part in key for part in dense) for key in matrices), matrices
    assert all("position_embeddings" in key or "wpe" in key for key in coverage.kept)
    if "LM" in name:  # the head follows the table
        assert [tied for first, tied in coverage.ties.items() if "embeddings" in first or "wte" in first]


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_freezes_and_answers_from_its_file(
    name: str, transformers: Namespace, tmp_path: Path
) -> None:
    model, path = build(transformers, name), tmp_path / "small.qn.safetensors"
    fairseq_qn.apply(model, with_k(MODELS[name][1], 16), seed=1)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    stages = fairseq_qn.Stages(model, optimizer, updates=[1, 2, 3])
    for _ in range(5):
        model(input_ids=IDS)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    del stages
    expected = answer(model.eval())
    fairseq_qn.save(model, path, parts="float32")
    for mode in ("dense", "packed"):
        loaded = fairseq_qn.load(path, mode, model=build(transformers, name, seed=3))
        torch.testing.assert_close(answer(loaded), expected, atol=1e-5, rtol=1e-4)

    cls = getattr(transformers, name)
    model.save_pretrained(tmp_path / "hf", state_dict=fairseq_qn.decoded_state_dict(model))
    torch.testing.assert_close(
        answer(cls.from_pretrained(tmp_path / "hf").eval()), expected, atol=1e-5, rtol=1e-4
    )
    fairseq_qn.remove(model).save_pretrained(tmp_path / "removed")
    torch.testing.assert_close(
        answer(cls.from_pretrained(tmp_path / "removed").eval()), expected, atol=1e-5, rtol=1e-4
    )


def twins(transformers: Namespace, scheme: dict) -> tuple[nn.Module, nn.Module]:
    """A Conv1D and the Linear that computes the same, under one recipe, name and seed."""
    conv = build(transformers, "GPT2LMHeadModel").transformer.h[0].attn.c_attn.train()
    linear = nn.Linear(32, 96)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.t())
        linear.bias.copy_(conv.bias)
    pair = nn.ModuleDict({"layer": conv}), nn.ModuleDict({"layer": linear})
    for model in pair:
        rule = {"layers": "layer", "module": "Linear", **scheme}
        noise = {"kind": "exact", "p": 0.5}
        fairseq_qn.apply(model, {"version": 1, "noise": noise, "rules": [rule]}, seed=1)
    return pair


SCHEMES = [
    {"scheme": "product", "block_size": 8, "n_centroids": 16},
    {"scheme": "integer", "bits": 4, "granularity": "group", "group_size": 16},
    {"scheme": "integer", "bits": 8, "granularity": "channel"},
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=["product", "groups", "channel"])
def test_a_conv1d_is_the_linear_of_the_transposed_weight(
    scheme: dict, transformers: Namespace, tmp_path: Path
) -> None:
    """Blocks along the input, masks, gradients, codes, moments, file: all as of a Linear."""
    models = twins(transformers, scheme)
    x = torch.randn(3, 5, 32)
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-2) for model in models]
    for step in range(4):
        if step == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                fairseq_qn.freeze(model, optimizer=optimizer)
        if step < 2:
            for model in models:
                fairseq_qn.refresh(model)
        for model, optimizer in zip(models, optimizers, strict=True):
            fairseq_qn.set_update(model, step)
            model.layer(x).square().sum().backward()
            optimizer.step()
        conv, linear = (model.layer for model in models)
        torch.testing.assert_close(conv.weight.t(), linear.weight)
        stored, other = (layer._parameters["weight"] for layer in (conv, linear))
        torch.testing.assert_close(stored.grad.t(), other.grad, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(stored.t(), other)
    if "codes" in conv._buffers:
        assert torch.equal(conv.codes, linear.codes) and conv.codes.shape == (96, 4)
    paths = [tmp_path / "conv", tmp_path / "linear"]
    for model, path in zip(models, paths, strict=True):
        fairseq_qn.save(model.eval(), path, parts="float32")
    entries = [fairseq_qn.inspect(path)["layers"]["layer.weight"] for path in paths]
    assert entries[0].pop("transposed") is True and entries[0].keys() == entries[1].keys()
    assert entries[0]["shape"] == entries[1]["shape"] == [96, 32]


def test_a_packed_conv1d_computes_with_what_is_stored(
    transformers: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = build(transformers, "GPT2LMHeadModel"), tmp_path / "small"
    fairseq_qn.apply(model, with_k("gpt2-hf", 16), seed=1)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, path, parts="float32")
    loaded = fairseq_qn.load(path, "packed", model=build(transformers, "GPT2LMHeadModel", seed=2))
    layer = loaded.transformer.h[0].attn.c_attn
    assert layer.weight.shape == (32, 96)
    torch.testing.assert_close(layer.decoded(), model.transformer.h[0].attn.c_attn.weight.detach())
    x = torch.randn(2, 4, 32)
    expected = x @ layer.decoded() + layer.bias
    monkeypatch.setattr(type(layer.qn_stored), "dense", lambda *_: pytest.fail("decoded"))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


def test_a_file_that_turns_a_weight_wrongly_is_refused(transformers: Namespace, tmp_path: Path) -> None:
    model, path = build(transformers, "GPT2LMHeadModel"), tmp_path / "small"
    fairseq_qn.apply(model, with_k("gpt2-hf", 16), seed=1)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, path)
    file = restore.read(path)
    entry = file.manifest["layers"]["transformer.h.0.attn.c_attn.weight"]
    entry["transposed"] = False
    with pytest.raises(MismatchError, match=r"expected \[32, 96\], found \[96, 32\]"):
        file.load(model=build(transformers, "GPT2LMHeadModel"))
    for value in (1, "yes", None, [True]):
        entry["transposed"] = value
        with pytest.raises(FormatError, match="transposed"):
            restore.check(file.manifest, "file")


def test_other_modules_of_the_name_are_left_alone() -> None:
    class Conv1D(nn.Module):  # no nf
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 8))

    rules = [{"layers": ".*", "scheme": "integer", "optional": True}]
    _, coverage = match(
        nn.ModuleDict({"a": Conv1D()}), Recipe.load({"version": 1, "rules": rules}), strict=False
    )
    assert not coverage.matched
