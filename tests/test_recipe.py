"""Recipes: what is legal, how each error reads, round trips, and fairseq's own YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fairseq_qn
from fairseq_qn.config_dir import config_dir
from fairseq_qn.errors import NoLayerMatched, RecipeError
from fairseq_qn.recipe import Noise, Recipe, Rule, Stage, short_recipe
from fairseq_qn.schemes.integer import GRANULARITIES, Integer
from fairseq_qn.schemes.product import Product

RULE = {"layers": ".*fc1", "scheme": "product"}


def recipe(**changes: Any) -> dict[str, Any]:
    data = {"version": 1, "rules": [dict(RULE)]} | changes
    return {key: value for key, value in data.items() if value is not ...}


def with_rule(**changes: Any) -> dict[str, Any]:
    return recipe(rules=[RULE | changes])


def integers(**changes: Any) -> dict[str, Any]:
    return with_rule(scheme="integer", **changes)


def proxy(p: Any, **more: Any) -> dict[str, Any]:
    return recipe(noise={"kind": "proxy", "p": p, **more})


LEGAL = [
    (recipe(), Recipe((Rule(".*fc1", Product(), "all"),), (Stage("all"),))),
    (recipe(keep=["a", "b"]), Recipe((Rule(".*fc1", Product(), "all"),), (Stage("all"),), ("a", "b"))),
    (
        recipe(keep=None, stages=None, noise=None),
        Recipe((Rule(".*fc1", Product(), "all"),), (Stage("all"),)),
    ),
    (
        recipe(noise={"kind": "proxy", "p": 0.1}, stages=[{"name": "all", "update": 0}]),
        Recipe(
            (Rule(".*fc1", Product(), "all"),), (Stage("all", update=0),), (), Noise("proxy", ((0, 0.1),))
        ),
    ),
    (
        recipe(
            noise={"kind": "exact", "p": [[0, 0], [100, 0.5]], "refresh": 7},
            stages=[{"name": "all", "epoch": 3}],
        ),
        Recipe(
            (Rule(".*fc1", Product(), "all"),),
            (Stage("all", epoch=3),),
            (),
            Noise("exact", ((0, 0.0), (100, 0.5)), 7),
        ),
    ),
    (
        with_rule(
            scheme="integer", bits=4, granularity="group", group_size=32, stage=5, noise={"kind": "none"}
        ),
        Recipe(
            (Rule(".*fc1", Integer(4, "group", 32), "5", noise=Noise()),),
            (Stage("5"),),
        ),
    ),
    (
        with_rule(
            module="Conv2d", where={"kernel_size": [3, 3]}, optional=True, n_centroids=65_536, block_size=9
        ),
        Recipe(
            (
                Rule(
                    ".*fc1",
                    Product(9, 65_536),
                    "all",
                    module="Conv2d",
                    where={"kernel_size": [3, 3]},
                    optional=True,
                ),
            ),
            (Stage("all"),),
        ),
    ),
    (
        recipe(rules=[RULE | {"stage": "b"}, RULE | {"stage": "a"}, RULE | {"stage": "b"}]),
        Recipe(tuple(Rule(".*fc1", Product(), s) for s in "bab"), (Stage("b"), Stage("a"))),
    ),
]


@pytest.mark.parametrize(("data", "expected"), LEGAL)
def test_legal_recipes_and_their_round_trips(data: dict[str, Any], expected: Recipe, tmp_path: Path) -> None:
    loaded = Recipe.load(data)
    assert loaded == expected
    plain = loaded.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    for source in (
        plain,
        loaded.to_json(),
        yaml.safe_dump(plain),
        tmp_path / "r.yaml",
        str(tmp_path / "r.yaml"),
    ):
        assert Recipe.load(source) == loaded


SCHEMES = st.builds(Product, st.integers(1, 4096), st.integers(2, 65_536)) | st.builds(
    Integer, st.integers(2, 8), st.sampled_from(GRANULARITIES), st.integers(1, 65_536)
)
NOISES = st.builds(Noise, st.sampled_from(["none", "proxy", "exact"]), st.just(((0, 0.5),)))
RULES = st.builds(
    Rule, st.sampled_from(["a", ".*"]), SCHEMES, st.just("s"), st.none() | NOISES,
    st.sampled_from([None, "Linear"]), optional=st.booleans(),
)  # fmt: skip


@given(
    st.builds(
        Recipe,
        st.lists(RULES, min_size=1, max_size=3).map(tuple),
        st.builds(Stage, st.just("s"), st.none() | st.integers(0, 9)).map(lambda s: (s,)),
        st.sampled_from([(), ("x", "y.*")]),
        st.builds(
            Noise, st.just("exact"), st.just(((0, 0.0), (5, 0.25))), st.just("epoch") | st.integers(1, 99)
        ),
    )
)
def test_every_recipe_survives_its_own_text(built: Recipe) -> None:
    assert Recipe.load(built.to_dict()) == built and Recipe.load(built.to_json()) == built


def test_a_checkpoints_recipe_of_before_lines_of_other_schemes_were_refused() -> None:
    """As to_json wrote it, which left defaults out."""
    text = (
        '{"version":1,"noise":{"kind":"none","p":[[0,0.1]],"refresh":"epoch"},"rules":[{"layers":".*fc1",'
        '"scheme":"product","stage":"all","bits":4},{"layers":"x","scheme":"integer","stage":"all","block_size":4}],'
        '"keep":[],"stages":["all"]}'
    )
    rules = (Rule(".*fc1", Product(), "all"), Rule("x", Integer(), "all"))
    assert Recipe.load(text) == Recipe(rules, (Stage("all"),), (), Noise(p=((0, 0.1),)))
    with pytest.raises(RecipeError, match=r"rules\[0\]: bits: not of scheme product"):
        Recipe.load(json.loads(text))


ILLEGAL = [
    (recipe(version=2), "version: expected 1, found 2"),
    (recipe(version=...), "version: expected 1, found None"),
    (recipe(ruels=[]), "recipe: unknown ruels; known: version, noise, rules, keep, stages"),
    (recipe(rules=...), "rules: expected a list, found None"),
    (recipe(rules=[]), "rules: expected at least one rule, found none"),
    (recipe(rules={"layers": "x"}), "rules: expected a list, found {'layers': 'x'}"),
    (recipe(rules=["x"]), "rules[0]: expected a mapping, found 'x'"),
    (recipe(rules=[RULE, {"scheme": "product"}]), "rules[1]: `layers` is missing"),
    (recipe(rules=[{"layers": "x"}]), "rules[0]: `scheme` is missing"),
    (with_rule(blocksize=8), "rules[0]: unknown blocksize; known: layers, scheme, stage, block_size"),
    (
        with_rule(scheme="pq"),
        "rules[0].scheme: expected one of ['product', 'integer', 'learned_bits', 'kernel'], found 'pq'",
    ),
    (with_rule(layers="fc[12"), "rules[0].layers: not a regular expression: 'fc[12'"),
    (with_rule(layers=5), "rules[0].layers: not a regular expression: 5"),
    (with_rule(layers=b"fc1"), "rules[0].layers: not a regular expression: b'fc1'"),
    (with_rule(layers="a{99999999999}"), "rules[0].layers: not a regular expression: 'a{99999999999}'"),
    (with_rule(block_size=0), "rules[0].block_size: expected a whole number from 1 to 4096, found 0"),
    (with_rule(block_size="8"), "rules[0].block_size: expected a whole number from 1 to 4096, found '8'"),
    (with_rule(block_size=8.0), "rules[0].block_size: expected a whole number from 1 to 4096, found 8.0"),
    (with_rule(n_centroids=1), "rules[0].n_centroids: expected a whole number from 2 to 65536, found 1"),
    (
        with_rule(n_centroids=65_537),
        "rules[0].n_centroids: expected a whole number from 2 to 65536, found 65537",
    ),
    (integers(bits=True), "rules[0].bits: expected a whole number from 1 to 8 or ternary, found True"),
    (integers(bits=9), "rules[0].bits: expected a whole number from 1 to 8 or ternary, found 9"),
    (integers(bits=None), "rules[0].bits: expected a whole number from 1 to 8 or ternary, found None"),
    (integers(group_size=0), "rules[0].group_size: expected a whole number from 1 to 65536, found 0"),
    (
        integers(granularity="row"),
        "rules[0].granularity: expected one of ['tensor', 'channel', 'group'], found 'row'",
    ),
    (
        with_rule(module="Linaer"),
        "rules[0].module: expected one of ['Linear', 'Embedding', 'Conv2d'], found 'Linaer'",
    ),
    (with_rule(where=["in_features"]), "rules[0].where: expected a mapping, found ['in_features']"),
    (with_rule(optional="yes"), "rules[0].optional: expected true or false, found 'yes'"),
    (with_rule(noise="proxy"), "rules[0].noise: expected a mapping, found 'proxy'"),
    (
        with_rule(noise={"kind": "pq"}),
        "rules[0].noise.kind: expected one of ['none', 'proxy', 'exact'], found 'pq'",
    ),
    (recipe(noise={"prob": 0.1}), "noise: unknown prob; known: kind, p, refresh"),
    (proxy(1.5), "noise.p: expected probabilities in [0, 1] at rising updates, found 1.5"),
    (proxy(-0.1), "noise.p: expected probabilities in [0, 1] at rising updates, found -0.1"),
    (proxy(float("nan")), "noise.p: expected probabilities in [0, 1] at rising updates, found nan"),
    (proxy([]), "noise.p: expected probabilities in [0, 1] at rising updates, found []"),
    (proxy([[5, 0.1], [0, 0.2]]), "noise.p: expected probabilities in [0, 1] at rising updates"),
    (proxy("0.1"), "noise.p: expected a number or [[update, p], ...], found '0.1'"),
    (proxy([0.1, 0.2]), "noise.p: expected a number or [[update, p], ...], found [0.1, 0.2]"),
    (proxy([[float("inf"), 0.1]]), "noise.p: expected a number or [[update, p], ...], found [[inf, 0.1]]"),
    (proxy(0.1, refresh=0), "noise.refresh: expected `epoch` or a number of updates, found 0"),
    (proxy(0.1, refresh="update"), "noise.refresh: expected `epoch` or a number of updates, found 'update'"),
    (proxy(True), "noise.p: expected a number or [[update, p], ...], found True"),
    (proxy([[0, True]]), "noise.p: expected a number or [[update, p], ...], found [[0, True]]"),
    (proxy([["0", 0.1]]), "noise.p: expected a number or [[update, p], ...], found [['0', 0.1]]"),
    (proxy(None), "noise.p: expected a number or [[update, p], ...], found None"),
    (recipe(noise={"p": 0.1}), "noise.kind: expected one of ['none', 'proxy', 'exact'], found None"),
    (recipe(noise={"refresh": 3}), "noise.kind: expected one of ['none', 'proxy', 'exact'], found None"),
    (recipe(noise={"kind": "proxy"}), "noise.p: expected the probability of proxy noise, found none"),
    (
        with_rule(noise={"kind": "exact", "refresh": 3}),
        "rules[0].noise.p: expected the probability of exact noise, found none",
    ),
    (with_rule(bits=4), "rules[0]: bits: not of scheme product; take it out, or change the scheme"),
    (
        with_rule(granularity="group", group_size=8),
        "rules[0]: granularity, group_size: not of scheme product",
    ),
    (integers(block_size=8), "rules[0]: block_size: not of scheme integer"),
    (integers(n_centroids=256), "rules[0]: n_centroids: not of scheme integer"),
    (recipe(keep=".*embed"), "keep: expected a list, found '.*embed'"),
    (recipe(keep=["("]), "keep[0]: not a regular expression: '('"),
    (recipe(stages="all"), "stages: expected a list, found 'all'"),
    (recipe(stages=["all", "all"]), "stages: each name once, found ['all', 'all']"),
    (recipe(stages=["ffn"]), "rules[0].stage: expected one of ['ffn'], found 'all'"),
    (
        recipe(stages=["all", "emb"]),
        "stages: no rule belongs to stage 'emb'; name it in a rule or take it out",
    ),
    (
        recipe(stages=[{"update": 5}]),
        "stages[0]: expected a name, or {name: , update: N} or {name: , epoch: N}",
    ),
    (recipe(stages=[{"name": "all", "update": 1, "epoch": 2}]), "stages[0]: expected a name, or"),
    (recipe(stages=[{"name": "all", "update": -1}]), "stages[0]: expected a name, or"),
    (recipe(stages=[{"name": "all", "update": "5"}]), "stages[0]: expected a name, or"),
    (recipe(stages=[{"name": "all", "at": 5}]), "stages[0]: unknown at; known: name, update, epoch"),
]


@pytest.mark.parametrize(("data", "words"), ILLEGAL)
def test_errors_say_what_where_expected_and_found(data: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load(data)
    assert str(error.value).startswith(f"recipe: {words}") and "\n" not in str(error.value)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        Recipe.load(tmp_path / "r.yaml")
    assert str(error.value).startswith(f"recipe {tmp_path / 'r.yaml'}: ")  # the file is named


@pytest.mark.parametrize("text", ["{version: 1", "a:\n\tb", "- 1\n- 2", "5\n", "\n", "{1}"])
def test_text_that_is_no_recipe(text: str) -> None:
    with pytest.raises(RecipeError, match="^recipe: ") as error:
        Recipe.load(text)
    assert "\n" not in str(error.value)


def test_a_ready_recipe_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Recipe.load("roberta") == Recipe.load(config_dir() / "recipes" / "roberta.yaml")
    with pytest.raises(
        RecipeError, match="^recipe robrta: .*no such file.*; those are .*int4, .*int8, .*roberta"
    ):
        Recipe.load("robrta")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roberta").write_text((config_dir() / "recipes" / "int8.yaml").read_text())
    assert Recipe.load("roberta") == Recipe.load("int8")  # a file goes before a name


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in ("no such file", tmp_path, tmp_path / "binary"):
        with pytest.raises(RecipeError, match=f"^recipe {path}: cannot be read: "):
            Recipe.load(path)


# The example that ships with fairseq, in structure: doubled backslashes, sizes by part of the name or by
# attribute.
FAIRSEQ = r"""
n_centroids:
    Linear: {key: in_features, value: {"*": 16}}
    Embedding: {key: embedding_dim, value: {"*": 16}}
block_sizes:
    Linear: {key: fuzzy_name, value: {fc: 8, attn: 4, emb: 4}}
    Embedding: {key: fuzzy_name, value: {emb: 8}}
layers_to_quantize:
    - decoder\\.layers\\.\d+\\.fc[12]
    - decoder\\.embed_tokens\\.embeddings\\.[012]\\.[01]
    - decoder\\.layers\\.\d+\\.self_attn\\.(k_proj|v_proj|q_proj|out_proj)
"""


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(16, 16) for _ in range(4))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.fc1, self.fc2 = Attention(), nn.Linear(16, 32), nn.Linear(32, 16)
        self.fc10, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)


def language_model() -> nn.Module:
    """Named as fairseq's transformer language model with adaptive inputs."""
    model = nn.Module()
    model.decoder = nn.Module()
    model.decoder.layers = nn.ModuleList([Layer(), Layer()])
    model.decoder.embed_tokens = nn.Module()
    pairs = [nn.Sequential(nn.Embedding(20, d), nn.Linear(d, 16, bias=False)) for d in (16, 8, 8)]
    model.decoder.embed_tokens.embeddings = nn.ModuleList(pairs)
    return model


def test_fairseqs_own_yaml_matches_every_layer_that_it_names() -> None:
    loaded = Recipe.load(FAIRSEQ)
    assert [stage.name for stage in loaded.stages] == ["step0", "step1", "step2"]
    model = language_model()
    coverage = fairseq_qn.apply(model, loaded)
    found = {
        name: (rule.stage, rule.scheme.block_size, rule.scheme.n_centroids)
        for name, (rule, _) in coverage.matched.items()
    }
    expected = {}
    for i in range(2):
        expected |= {f"decoder.layers.{i}.{fc}.weight": ("step0", 8, 16) for fc in ("fc1", "fc2")}
        expected |= {
            f"decoder.layers.{i}.self_attn.{p}_proj.weight": ("step2", 4, 16) for p in ("k", "v", "q", "out")
        }
    for i in range(3):
        expected[f"decoder.embed_tokens.embeddings.{i}.0.weight"] = ("step1", 8, 16)
        expected[f"decoder.embed_tokens.embeddings.{i}.1.weight"] = ("step1", 4, 16)
    assert found == expected and len(found) == 18
    assert {name for name in coverage.left if "fc" in name and "weight" in name} == {
        f"decoder.layers.{i}.fc10.weight" for i in range(2)
    }
    fairseq_qn.freeze(model, "step1")
    assert Recipe.load(loaded.to_json()) == loaded


def test_fairseqs_yaml_by_attribute() -> None:
    data = yaml.safe_load(FAIRSEQ)
    data["block_sizes"]["Linear"] = {"key": "in_features", "value": {"*": 4, 32: 16}}
    data["n_centroids"]["Linear"] = {"key": "fuzzy_name", "value": {"fc2": 7, "*": 5}}
    del data["n_centroids"]["Embedding"]
    matched = fairseq_qn.apply(language_model(), data).matched
    sizes = {
        name.removeprefix("decoder."): (rule.scheme.block_size, rule.scheme.n_centroids)
        for name, (rule, _) in matched.items()
    }
    assert sizes["layers.0.fc1.weight"] == (4, 5) and sizes["layers.0.fc2.weight"] == (16, 7)
    assert sizes["embed_tokens.embeddings.0.0.weight"] == (8, 256)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers_to_quantize": None}, "layers_to_quantize: expected a list, found None"),
        ({"layers_to_quantize": 5}, "layers_to_quantize: expected a list, found 5"),
        ({"block_sizes": {"Linear": 8}}, "block_sizes.Linear: expected a mapping, found 8"),
        (
            {"block_sizes": {"Linear": {"value": {}}}},
            "block_sizes.Linear: expected {key: NAME, value: {...}}",
        ),
        (
            {"n_centroids": {"Linear": {"key": "x", "value": 5}}},
            "n_centroids.Linear: expected {key: NAME, value: {...}}",
        ),
        ({"block_sizes": None}, "rules: expected at least one rule"),
        ({"n_centroid": {}}, "fairseq's configuration: unknown n_centroid; known: layers_to_quantize"),
        ({"block_sizes": {"Linaer": {"key": "x", "value": {"*": 8}}}}, "rules[0].module: expected one of"),
    ],
)
def test_damaged_yaml_of_fairseq(change: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as error:
        Recipe.load(yaml.safe_load(FAIRSEQ) | change)
    assert str(error.value).startswith(f"recipe: {words}")


def test_fairseqs_yaml_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(NoLayerMatched, match="stage 'step0': its rules match no layer"):
        fairseq_qn.apply(nn.Sequential(nn.Linear(8, 8)), FAIRSEQ)


def test_the_short_recipe() -> None:
    model = language_model()
    coverage = fairseq_qn.apply(model, short_recipe(0.1, 8))
    assert {rule.stage for rule, _ in coverage.matched.values()} == {"ffn", "emb", "attn"}
    assert len(coverage.matched) == 4 + 6 + 8
    assert short_recipe(0.1, 8).noise == Noise("proxy", ((0, 0.1),))
    assert {rule.scheme.name for rule in short_recipe(0.1, 1, bits=4).rules} == {"integer"}
