"""Recipe: which layers, which scheme, how much noise, in which order. Data only; nothing here touches a
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from fairseq_qn.config_dir import recipe_file
from fairseq_qn.errors import RecipeError
from fairseq_qn.fairseq_yaml import from_fairseq_yaml
from fairseq_qn.lines import flag, mapping, one_of, only, pattern, sequence
from fairseq_qn.noise import Noise
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.activation import Activations
from fairseq_qn.schemes.base import Scheme
from fairseq_qn.structure import Prune, Share

VERSION = 1
MODULE_TYPES = ("Linear", "Embedding", "Conv2d")


@dataclass(frozen=True)
class Rule:
    """How the layers whose whole name matches the regular expression `layers` are quantised."""

    layers: str
    scheme: Scheme
    stage: str
    noise: Noise | None = None  # None: the recipe's
    module: str | None = None  # only layers of this type
    # only layers with these attributes, e.g. in_features: 512
    where: Mapping[str, Any] = field(default_factory=dict, hash=False)
    optional: bool = False  # may match nothing
    activations: Activations | None = None  # of the inputs of its layers
    fold_batch_norm: bool = False  # convolutions are quantised as folded with the batch norm that follows

    def takes(self, names: list[str], module: object) -> bool:
        """Whether this rule takes a module known under `names` (its own and those of modules tied to it)."""
        classes = [cls.__name__ for cls in type(module).__mro__] + ["Linear"] * is_conv1d(module)
        if self.module and self.module not in classes:
            return False
        if any(_plain(getattr(module, key, None)) != _plain(value) for key, value in self.where.items()):
            return False
        return any(re.fullmatch(self.layers, name) for name in names)


@dataclass(frozen=True)
class Stage:
    """Layers that are frozen together; `update` or `epoch` says when, if the recipe itself says so."""

    name: str
    update: int | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class Recipe:
    """First matching rule wins; `keep` goes before the rules; what no line names stays dense."""

    rules: tuple[Rule, ...]
    stages: tuple[Stage, ...]
    keep: tuple[str, ...] = ()
    noise: Noise = Noise()
    share: tuple[Share, ...] = ()
    prune: tuple[Prune, ...] = ()

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Recipe:
        """Read a recipe from a YAML file, the name of a ready one (`roberta`), a mapping, or YAML/JSON text
        with more than a path's one line or a brace.

        fairseq's own quantisation YAML (n_centroids, block_sizes, layers_to_quantize) is understood as well.
        Raises RecipeError.

        >>> rule = {"layers": ".*fc[12]", "scheme": "product", "block_size": 4, "stage": "ffn"}
        >>> recipe = Recipe.load({"version": 1, "noise": {"kind": "proxy", "p": 0.1}, "rules": [rule]})
        >>> recipe.rules[0].scheme.block_size, recipe.noise.at(0), recipe.stages
        (4, 0.1, (Stage(name='ffn', update=None, epoch=None),))
        >>> Recipe.load({"version": 1, "rules": [{**rule, "bits": 4}]})
        Traceback (most recent call last):
        fairseq_qn.errors.RecipeError: recipe: rules[0]: bits: not of scheme product; take it out, or ...
        """
        data, where = _read(source)
        if not isinstance(data, Mapping):
            raise RecipeError(f"{where}: expected a mapping with `rules`, found {type(data).__name__}")
        # to_json's, from a checkpoint: it may be older than this check
        if str(source).startswith('{"version"'):
            data = _without_foreign(data)
        try:
            return _recipe(from_fairseq_yaml(data) if "layers_to_quantize" in data else data)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `load` reads back to an equal recipe."""
        rules = [_rule_lines(rule) for rule in self.rules]
        stages = [
            _without_defaults(stage) if stage != Stage(stage.name) else stage.name for stage in self.stages
        ]
        data = {"version": VERSION, "noise": asdict(self.noise), "rules": rules, "keep": self.keep}
        data |= {"stages": stages} | {
            name: [asdict(line) for line in lines]
            for name, lines in (("share", self.share), ("prune", self.prune))
            if lines
        }
        plain: dict[str, Any] = json.loads(json.dumps(data))  # lists for tuples
        return plain

    def to_json(self) -> str:
        """One line of JSON, for a checkpoint's configuration.

        >>> rules = [{"layers": "fc1", "scheme": "integer", "bits": 4}]
        >>> Recipe.load({"version": 1, "rules": rules}).to_json()
        '{"version":1,"noise":{"kind":"none","p":[[0,0.0]],"refresh":"epoch"},"rules":[{"layers":"fc1",...
        """
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def with_(self, p: float | None = None, bits: int | None = None) -> Recipe:
        """The same with another noise probability, also of rules with noise of their own, and other bits
        where the scheme has them. Raises RecipeError where no rule has.

        >>> rules = [{"layers": "fc1", "scheme": "integer", "bits": 4}]
        >>> recipe = Recipe.load({"version": 1, "rules": rules}).with_(p=0.5, bits=8)
        >>> recipe.noise.kind, recipe.noise.at(0), recipe.rules[0].scheme.bits
        ('proxy', 0.5, 8)
        """
        data = self.to_dict()
        if p is not None:
            for place in [data, *(rule for rule in data["rules"] if "noise" in rule)]:
                kind = place["noise"].get("kind", "none")
                place["noise"] |= {"p": p, "kind": "proxy" if kind == "none" else kind}
        if bits is not None:
            able = [lines for lines, rule in zip(data["rules"], self.rules, strict=True)
                    if hasattr(rule.scheme, "bits")]  # fmt: skip
            if not able:
                raise RecipeError(
                    f"bits: expected a rule of a scheme that has bits, to set {bits}; found none"
                )
            for lines in able:
                lines["bits"] = bits
        return Recipe.load(data)

    def noise_of(self, rule: Rule) -> Noise:
        """The noise of a rule: its own, or the recipe's."""
        return self.noise if rule.noise is None else rule.noise


def is_conv1d(module: Any) -> bool:
    """Whether it is transformers' Conv1D (GPT-2's), a Linear to a recipe: x @ weight + bias, and so the
    weight is [in_features, out_features].
    """
    named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    weight = getattr(module, "_parameters", {}).get("weight") if named else None
    return weight is not None and weight.dim() == 2 and weight.shape[1] == getattr(module, "nf", None)


def short_recipe(p: float, block_size: int, bits: int | None = None) -> Recipe:
    """The recipe that --quant-noise-pq P --quant-noise-pq-block-size D (or, with `bits`,
    --quant-noise-scalar P) stands for.

    fairseq's order of stages: feed-forward layers, embeddings, attention; layers that a model lacks are
    passed over.

    >>> [(rule.stage, rule.scheme.block_size) for rule in short_recipe(0.1, block_size=8).rules]
    [('ffn', 8), ('emb', 8), ('attn', 8)]
    """
    scheme = {"scheme": "integer", "bits": bits} if bits else {"scheme": "product", "block_size": block_size}
    layers = {"ffn": r".*\.fc[12]", "emb": r".*embed_tokens(\..*)?", "attn": r".*attn\.(q|k|v|out)_proj"}
    rules = [{"layers": name, "stage": stage, "optional": True, **scheme} for stage, name in layers.items()]
    return Recipe.load(
        {"version": VERSION, "noise": {"kind": "proxy", "p": p}, "rules": rules, "stages": list(layers)}
    )


def _read(source: str | Path | Mapping[str, Any]) -> tuple[Any, str]:
    if isinstance(source, Mapping):
        return source, "recipe"
    text, where = str(source), "recipe"
    if "\n" not in text and not text.lstrip().startswith("{"):
        where = f"recipe {text}"
        try:
            text = recipe_file(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{where}: cannot be read: {error}") from None
    try:
        return yaml.safe_load(text), where
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _recipe(data: Mapping[str, Any]) -> Recipe:
    only(data, ("version", "noise", "rules", "keep", "stages", "share", "prune"), "recipe")
    if data.get("version") != VERSION:
        raise RecipeError(f"version: expected {VERSION}, found {data.get('version')!r}")
    noise = Noise.parse(data.get("noise"), "noise")
    share, prune = Share.parse(data.get("share"), "share"), Prune.parse(data.get("prune"), "prune")
    entries = sequence(data.get("rules", [] if share or prune else None), "rules")
    if not entries and not share and not prune:
        raise RecipeError("rules: expected at least one rule, found none")
    rules = tuple(_rule(entry, f"rules[{i}]") for i, entry in enumerate(entries))
    named = list(dict.fromkeys(rule.stage for rule in rules))
    stages = tuple(
        _stage(entry, f"stages[{i}]")
        for i, entry in enumerate(sequence(data.get("stages") or named, "stages"))
    )
    keep = tuple(
        pattern(entry, f"keep[{i}]") for i, entry in enumerate(sequence(data.get("keep") or [], "keep"))
    )
    order = [stage.name for stage in stages]
    if len(set(order)) < len(order):
        raise RecipeError(f"stages: each name once, found {order}")
    for i, rule in enumerate(rules):
        if rule.stage not in order:
            raise RecipeError(f"rules[{i}].stage: expected one of {order}, found {rule.stage!r}")
    for name in order:
        if name not in named:
            raise RecipeError(f"stages: no rule belongs to stage {name!r}; name it in a rule or take it out")
    return Recipe(rules, stages, keep, noise, share, prune)


def _rule(data: Any, where: str) -> Rule:
    own = {name: [f.name for f in fields(scheme)] for name, scheme in SCHEMES.items()}
    common = [f.name for f in fields(Rule)]
    only(data, dict.fromkeys([*common[:3], *chain(*own.values()), *common[3:]]), where)
    for key in ("layers", "scheme"):
        if key not in data:
            raise RecipeError(f"{where}: `{key}` is missing")
    name = one_of(data["scheme"], SCHEMES, f"{where}.scheme")
    pattern(data["layers"], f"{where}.layers")
    if foreign := _foreign(data):
        todo = "take it out, or change the scheme"
        raise RecipeError(f"{where}: {', '.join(foreign)}: not of scheme {name}; {todo}")
    lines = {key: data[key] for key in common if key in data}
    lines |= {"stage": str(data.get("stage", "all")), "noise": None}
    if data.get("noise") is not None:
        lines["noise"] = Noise.parse(data["noise"], f"{where}.noise")
    lines["scheme"] = SCHEMES[name].parse({key: data[key] for key in own[name] if key in data}, where)
    if data.get("activations") is not None:
        lines["activations"] = Activations.parse(data["activations"], f"{where}.activations")
    if data.get("module") is not None:
        one_of(data["module"], MODULE_TYPES, f"{where}.module")
    mapping(data.get("where", {}), f"{where}.where")
    flag(data.get("optional", False), f"{where}.optional")
    if (
        flag(data.get("fold_batch_norm", False), f"{where}.fold_batch_norm")
        and SCHEMES[name].shares_gradients
    ):
        raise RecipeError(f"{where}.fold_batch_norm: not of scheme {name}; take it out")
    return Rule(**lines)


def _foreign(rule: Mapping[str, Any]) -> list[str]:
    """Lines of a rule that belong to other schemes than its own."""
    name = rule.get("scheme")
    own = {f.name for f in fields(SCHEMES[name])} if name in list(SCHEMES) else ()
    others = (f.name for other, scheme in SCHEMES.items() if other != name for f in fields(scheme))
    return [key for key in dict.fromkeys(others) if key in rule and key not in own]


def _without_foreign(data: Mapping[str, Any]) -> Mapping[str, Any]:
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        return data
    own = [{key: rule[key] for key in rule if key not in _foreign(rule)} for rule in rules]
    return {**data, "rules": own}


def _stage(data: Any, where: str) -> Stage:
    if not isinstance(data, Mapping):
        return Stage(str(data))
    only(data, ("name", "update", "epoch"), where)
    at = [data[key] for key in ("update", "epoch") if key in data]
    if "name" not in data or len(at) > 1 or any(type(n) is not int or n < 0 for n in at):
        raise RecipeError(
            f"{where}: expected a name, or {{name: , update: N}} or {{name: , epoch: N}}, found {data!r}"
        )
    return Stage(str(data["name"]), **{key: data[key] for key in data if key != "name"})


def _rule_lines(rule: Rule) -> dict[str, Any]:
    """The lines of a rule, those of its scheme after its stage."""
    first = {"layers": rule.layers, "scheme": rule.scheme.name, "stage": rule.stage}
    rest = _without_defaults(rule)
    return first | _without_defaults(rule.scheme) | {key: rest[key] for key in rest if key not in first}


def _plain(value: Any) -> str:
    return re.sub(r"[\s()\[\]]", "", str(value))


def _without_defaults(item: Any) -> dict[str, Any]:
    default = {f.name: f.default for f in fields(item)}
    return {k: v for k, v in asdict(item).items() if v != default[k] and v not in ({}, None)}
