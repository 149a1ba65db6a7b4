"""Which layers a recipe takes: whole names, first rule, `keep` before all, ties, and errors for lines that
take nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from fairseq_qn.errors import NoLayerMatched
from fairseq_qn.modules.match import match, owners_of
from fairseq_qn.recipe import Recipe


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc10, self.fc2 = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(16, 8)
        self.bias_proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)


class Model(nn.Module):
    """An encoder with an embedding, a head that shares its Parameter, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.embed_positions = nn.Embedding(20, 8, padding_idx=1), nn.Embedding(10, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv2d(4, 6, 3)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def taken(*rules: dict[str, Any], keep: tuple[str, ...] = (), strict: bool = True) -> dict[str, int]:
    """Names that are matched -> index of the rule."""
    data = {
        "version": 1,
        "rules": [{"scheme": "product", "block_size": 2, **rule} for rule in rules],
        "keep": list(keep),
    }
    recipe = Recipe.load(data)
    matches, coverage = match(Model(), recipe, strict=strict)
    assert [m.owner.key for m in matches] == list(coverage.matched)
    return {
        name: next(i for i, r in enumerate(recipe.rules) if r is rule)
        for name, (rule, _) in coverage.matched.items()
    }


FC = {f"layers.{i}.fc{j}.weight" for i in range(2) for j in (1, 2)}


def test_a_pattern_takes_whole_names() -> None:
    assert taken({"layers": r"layers\.\d\.fc[12]"}).keys() == FC  # upstream's match also takes fc10
    assert taken({"layers": r"layers\.0\.fc1"}).keys() == {"layers.0.fc1.weight"}
    with pytest.raises(NoLayerMatched):
        taken({"layers": "fc1"})  # nor does it search


def test_a_bias_in_a_path_is_nothing_special() -> None:
    assert taken({"layers": r".*bias_proj"}).keys() == {f"layers.{i}.bias_proj.weight" for i in range(2)}


def test_the_first_rule_that_matches_wins() -> None:
    found = taken({"layers": r".*1\.fc1"}, {"layers": r".*fc1"}, {"layers": r".*fc\d+"})
    assert found.pop("layers.1.fc1.weight") == 0 and found.pop("layers.0.fc1.weight") == 1
    assert set(found.values()) == {2} and len(found) == 4


def test_keep_goes_before_the_rules() -> None:
    everything = {"layers": ".*"}
    found = taken(everything, keep=(r".*embed_positions", r"layers\.0\..*"))
    assert {name.split(".")[1] for name in found if name.startswith("layers")} == {"1"}
    assert "embed_positions.weight" not in found and "embed_tokens.weight" in found


def test_what_is_not_a_layer_stays_dense() -> None:
    _, coverage = match(
        Model(), Recipe.load({"version": 1, "rules": [{"layers": ".*", "scheme": "product"}]})
    )
    assert {name.rsplit(".", 1)[1] for name in coverage.left} == {"weight", "bias"}
    assert {name for name in coverage.left if name.endswith("weight")} == {
        f"layers.{i}.norm.weight" for i in range(2)
    }


def test_a_rule_may_ask_for_a_type_or_attributes() -> None:
    assert taken({"layers": ".*", "module": "Conv2d"}).keys() == {"conv.weight"}
    assert taken({"layers": ".*", "where": {"in_features": 16}}).keys() == {
        f"layers.{i}.fc2.weight" for i in range(2)
    }
    assert taken({"layers": ".*", "where": {"kernel_size": [3, 3]}}).keys() == {"conv.weight"}
    assert taken({"layers": ".*", "where": {"kernel_size": "(3, 3)"}}).keys() == {"conv.weight"}
    assert taken(
        {"layers": ".*", "where": {"in_features": 17}, "optional": True}, {"layers": "conv"}
    ).keys() == {"conv.weight"}


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_rule_on_either_owner_covers_both(name: str) -> None:
    model = Model()
    matches, coverage = match(
        model, Recipe.load({"version": 1, "rules": [{"layers": name, "scheme": "product"}]})
    )
    other = {"embed_tokens": "lm_head", "lm_head": "embed_tokens"}[name]
    assert list(coverage.matched) == [f"{name}.weight"] and coverage.ties == {
        f"{name}.weight": (f"{other}.weight",)
    }
    assert {id(owner.module) for owner in matches[0].owners} == {id(model.embed_tokens), id(model.lm_head)}
    assert coverage.n_matched == 160  # once


@pytest.mark.parametrize("keep", ["embed_tokens", "lm_head"])
def test_keep_on_either_owner_keeps_both(keep: str) -> None:
    found = taken({"layers": ".*"}, keep=(keep,))
    assert "embed_tokens.weight" not in found and "lm_head.weight" not in found


def test_a_module_under_two_names_goes_by_either() -> None:
    model = Model()
    model.again = model.layers[0]
    for name in ("again.fc1", r"layers\.0\.fc1"):
        _, coverage = match(
            model, Recipe.load({"version": 1, "rules": [{"layers": name, "scheme": "product"}]})
        )
        assert list(coverage.matched) == ["layers.0.fc1.weight"]
    owner = next(
        o
        for owners in owners_of(model)
        for o in owners
        if o.module is model.again.fc1 and o.attribute == "bias"
    )
    assert owner.keys == ("layers.0.fc1.bias", "again.fc1.bias")


@pytest.mark.parametrize(
    ("rules", "keep", "words"),
    [
        (
            [{"layers": "fc1"}],
            [],
            r"rules\[0\] layers 'fc1': no layer has such a name; quantisable layers: embed_tokens, ",
        ),
        ([{"layers": ".*norm"}], [], r"rules\[0\] layers '\.\*norm': no layer has such a name"),
        (
            [{"layers": ".*fc1"}, {"layers": ".*0.fc1"}],
            [],
            r"rules\[1\] .*: every layer that it names is taken by `keep`",
        ),
        (
            [{"layers": ".*fc1"}, {"layers": ".*fc1"}],
            [],
            r"rules\[1\] .*: every layer that it names is taken",
        ),
        ([{"layers": ".*fc1"}], [".*fc1"], r"rules\[0\] .*: every layer that it names is taken by `keep`"),
        (
            [{"layers": ".*fc1", "where": {"in_features": 3}}],
            [],
            r"rules\[0\] .*not of its `module` and `where`",
        ),
        ([{"layers": ".*fc1"}], ["embed"], r"keep 'embed': no module with weights has such a name"),
        (
            [{"layers": ".*fc1"}],
            [".*embed.*", "embed_tokens"],
            r"keep 'embed_tokens': .*or an earlier line has them all",
        ),
        (
            [{"layers": ".*fc1"}, {"layers": "x", "optional": True, "stage": "b"}],
            [],
            r"stage 'b': its rules match no layer",
        ),
    ],
)
def test_lines_that_take_nothing(rules: list[dict[str, Any]], keep: list[str], words: str) -> None:
    with pytest.raises(NoLayerMatched, match=words) as error:
        taken(*rules, keep=tuple(keep))
    assert "\n" not in str(error.value)
    taken(*rules, keep=tuple(keep), strict=False)


def test_coverage_adds_up() -> None:
    model = Model()
    recipe = {
        "version": 1,
        "rules": [{"layers": r".*fc[12]", "scheme": "product"}],
        "keep": ["embed_positions"],
    }
    _, coverage = match(model, Recipe.load(recipe))
    total = sum(p.numel() for p in model.parameters())
    assert coverage.n_matched + sum(coverage.kept.values()) + sum(coverage.left.values()) == total
    assert coverage.n_matched == 4 * 128 and coverage.kept == {"embed_positions.weight": 80}
    assert coverage.share == pytest.approx(512 / total)
    text = str(coverage)
    assert (
        "all: 4 layers, 512 weights" in text
        and "embed_tokens.weight 160" in text
        and f"{total - 512:,} stay dense" in text
    )
