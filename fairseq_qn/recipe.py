"""Recipe: which layers, which scheme, how much noise, in which order. Data only; nothing here touches a
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from fairseq_qn.errors import RecipeError

VERSION = 1
MAX_CENTROIDS = 65_536
MAX_BLOCK_SIZE = 4096
# and their own lines
SCHEMES = {"product": ("block_size", "n_centroids"), "integer": ("bits", "granularity", "group_size")}
NOISE_KINDS = ("none", "proxy", "exact")
GRANULARITIES = ("tensor", "channel", "group")
MODULE_TYPES = ("Linear", "Embedding", "Conv2d")


@dataclass(frozen=True)
class Noise:
    """Quantisation noise: which phi, and with which probability at which update (Fan et al. 2020, eq. 4).

    `p` is a number, or knots [[update, p], ...] between which p is interpolated and outside which it is
    held. `refresh`: when the codebooks of exact noise are learned anew: "epoch", or a number of updates.
    """

    kind: str = "none"
    p: tuple[tuple[int, float], ...] = ((0, 0.0),)
    refresh: str | int = "epoch"

    def at(self, update: int) -> float:
        """The noise probability at an update."""
        before = [knot for knot in self.p if knot[0] <= update]
        after = [knot for knot in self.p if knot[0] > update]
        if not before or not after:
            return (before[-1] if before else after[0])[1]
        (u0, p0), (u1, p1) = before[-1], after[0]
        return p0 + (p1 - p0) * (update - u0) / (u1 - u0)


@dataclass(frozen=True)
class Rule:
    """How the layers whose whole name matches the regular expression `layers` are quantised."""

    layers: str
    scheme: str
    stage: str
    block_size: int = 8
    n_centroids: int = 256
    bits: int = 8
    granularity: str = "channel"
    group_size: int = 64
    noise: Noise | None = None  # None: the recipe's
    module: str | None = None  # only layers of this type
    where: Mapping[str, Any] = field(
        default_factory=dict, hash=False
    )  # only layers with these attributes, e.g. in_features: 512
    optional: bool = False  # may match nothing

    def takes(self, names: list[str], module: object) -> bool:
        """Whether this rule takes a module known under `names` (its own and those of modules tied to it)."""
        if self.module and self.module not in {cls.__name__ for cls in type(module).__mro__}:
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

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any]) -> Recipe:
        """Read a recipe from a YAML file, a mapping, or YAML/JSON text with more than a path's one line or a
        brace.

        fairseq's own quantisation YAML (n_centroids, block_sizes, layers_to_quantize) is understood as well.
        Raises RecipeError.
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
        rules = [_without_defaults(rule) for rule in self.rules]
        stages = [
            _without_defaults(stage) if stage != Stage(stage.name) else stage.name for stage in self.stages
        ]
        data = {
            "version": VERSION,
            "noise": asdict(self.noise),
            "rules": rules,
            "keep": self.keep,
            "stages": stages,
        }
        return json.loads(json.dumps(data))  # lists for tuples

    def to_json(self) -> str:
        """One line of JSON, for a checkpoint's configuration."""
        return json.dumps(self.to_dict(), separators=(",", ":"))

    def noise_of(self, rule: Rule) -> Noise:
        """The noise of a rule: its own, or the recipe's."""
        return self.noise if rule.noise is None else rule.noise


def from_fairseq_yaml(data: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's iPQ configuration as a recipe: a stage for each entry of layers_to_quantize.

    Doubled backslashes, as in fairseq's shipped example, are read as one: no module name holds a backslash.
    Patterns must match whole names. Block sizes come from `block_sizes` by attribute or by part of the name.
    """
    _only(data, ("layers_to_quantize", "block_sizes", "n_centroids"), "fairseq's configuration")
    rules, stages = [], []
    patterns = data["layers_to_quantize"]
    for index, pattern in enumerate(
        _list([patterns] if isinstance(patterns, str) else patterns, "layers_to_quantize")
    ):
        stage = f"step{index}"
        stages.append(stage)
        pattern = str(pattern).replace("\\\\", "\\")
        sizes, counts = (_mapping(data.get(key) or {}, key) for key in ("block_sizes", "n_centroids"))
        for module in sizes:
            count_cases = _fairseq_cases(counts, module) if module in counts else [("", {}, 256)]
            for name, where, size in _fairseq_cases(sizes, module, "block_sizes"):
                for count_name, count_where, count in count_cases:
                    layers = (
                        "".join(f"(?=.*{re.escape(part)})" for part in (name, count_name) if part) + pattern
                    )
                    rules.append(
                        {
                            "layers": layers, "scheme": "product", "stage": stage, "module": module,
                            "optional": True,
                            "where": {**where, **count_where}, "block_size": size, "n_centroids": count,
                        }
                    )  # fmt: skip
    return {"version": VERSION, "rules": rules, "stages": stages}


def short_recipe(p: float, block_size: int, bits: int | None = None) -> Recipe:
    """The recipe that --quant-noise-pq P --quant-noise-pq-block-size D (or, with `bits`,
    --quant-noise-scalar P) stands for.

    fairseq's order of stages: feed-forward layers, embeddings, attention; layers that a model lacks are
    passed over.
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
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{where}: cannot be read: {error}") from None
    try:
        return yaml.safe_load(text), where
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _recipe(data: Mapping[str, Any]) -> Recipe:
    _only(data, ("version", "noise", "rules", "keep", "stages"), "recipe")
    if data.get("version") != VERSION:
        raise RecipeError(f"version: expected {VERSION}, found {data.get('version')!r}")
    noise = _noise(data.get("noise"), "noise")
    entries = _list(data.get("rules"), "rules")
    if not entries:
        raise RecipeError("rules: expected at least one rule, found none")
    rules = tuple(_rule(entry, f"rules[{i}]") for i, entry in enumerate(entries))
    named = list(dict.fromkeys(rule.stage for rule in rules))
    stages = tuple(
        _stage(entry, f"stages[{i}]") for i, entry in enumerate(_list(data.get("stages") or named, "stages"))
    )
    keep = tuple(
        _pattern(entry, f"keep[{i}]") for i, entry in enumerate(_list(data.get("keep") or [], "keep"))
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
    return Recipe(rules, stages, keep, noise)


def _rule(data: Any, where: str) -> Rule:
    _only(data, [f.name for f in fields(Rule)], where)
    for key in ("layers", "scheme"):
        if key not in data:
            raise RecipeError(f"{where}: `{key}` is missing")
    if data["scheme"] not in list(SCHEMES):  # of any type
        raise RecipeError(f"{where}.scheme: expected one of {list(SCHEMES)}, found {data['scheme']!r}")
    values = {
        **data,
        "layers": _pattern(data["layers"], f"{where}.layers"),
        "stage": str(data.get("stage", "all")),
    }
    if foreign := _foreign(data):
        raise RecipeError(
            f"{where}: {', '.join(foreign)}: not of scheme {data['scheme']}; take it out, or change the "
            "scheme"
        )
    if data.get("noise") is not None:
        values["noise"] = _noise(data["noise"], f"{where}.noise")
    for key, low, high in (
        ("block_size", 1, MAX_BLOCK_SIZE),
        ("n_centroids", 2, MAX_CENTROIDS),
        ("bits", 2, 8),
        ("group_size", 1, 65536),
    ):
        value = values.get(key, low)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise RecipeError(
                f"{where}.{key}: expected a whole number from {low} to {high}, found {value!r}"
            )
    if values.get("granularity", "tensor") not in GRANULARITIES:
        raise RecipeError(
            f"{where}.granularity: expected one of {list(GRANULARITIES)}, found {values['granularity']!r}"
        )
    if values.get("module") not in (None, *MODULE_TYPES):
        raise RecipeError(
            f"{where}.module: expected one of {list(MODULE_TYPES)}, found {values['module']!r}"
        )
    _mapping(values.get("where", {}), f"{where}.where")
    if not isinstance(values.get("optional", False), bool):
        raise RecipeError(f"{where}.optional: expected true or false, found {values['optional']!r}")
    return Rule(**values)


def _foreign(rule: Mapping[str, Any]) -> list[str]:
    """Lines of a rule that belong to other schemes than its own."""
    return [
        key
        for scheme, keys in SCHEMES.items()
        if scheme != rule.get("scheme")
        for key in keys
        if key in rule
    ]


def _without_foreign(data: Mapping[str, Any]) -> Mapping[str, Any]:
    rules = data.get("rules")
    if not isinstance(rules, list) or not all(isinstance(rule, Mapping) for rule in rules):
        return data
    return {
        **data,
        "rules": [{key: rule[key] for key in rule if key not in _foreign(rule)} for rule in rules],
    }


def _noise(data: Any, where: str) -> Noise:
    if data is None:
        return Noise()
    _only(data, ("kind", "p", "refresh"), where)
    kind = data.get("kind")
    if kind not in NOISE_KINDS:
        raise RecipeError(f"{where}.kind: expected one of {list(NOISE_KINDS)}, found {kind!r}")
    if kind != "none" and "p" not in data:
        raise RecipeError(f"{where}.p: expected the probability of {kind} noise, found none")
    p, refresh = data.get("p", 0.0), data.get("refresh", "epoch")
    knots = p if isinstance(p, (list, tuple)) else [[0, p]]
    try:
        if any(isinstance(number, (bool, str)) for knot in knots for number in knot):
            raise TypeError
        knots = tuple((int(update), float(value)) for update, value in knots)
    except (TypeError, ValueError, OverflowError):
        raise RecipeError(f"{where}.p: expected a number or [[update, p], ...], found {p!r}") from None
    if not knots or not all(0 <= value <= 1 for _, value in knots) or [*knots] != sorted(knots):
        raise RecipeError(f"{where}.p: expected probabilities in [0, 1] at rising updates, found {p!r}")
    if refresh != "epoch" and (isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1):
        raise RecipeError(f"{where}.refresh: expected `epoch` or a number of updates, found {refresh!r}")
    return Noise(kind, knots, refresh)


def _stage(data: Any, where: str) -> Stage:
    if not isinstance(data, Mapping):
        return Stage(str(data))
    _only(data, ("name", "update", "epoch"), where)
    at = [data[key] for key in ("update", "epoch") if key in data]
    if "name" not in data or len(at) > 1 or any(type(n) is not int or n < 0 for n in at):
        raise RecipeError(
            f"{where}: expected a name, or {{name: , update: N}} or {{name: , epoch: N}}, found {data!r}"
        )
    return Stage(str(data["name"]), **{key: data[key] for key in data if key != "name"})


def _pattern(value: Any, where: str) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise RecipeError(f"{where}: not a regular expression: {value!r}: {error}") from None
    return value


def _list(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{where}: expected a list, found {value!r}")
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {value!r}")
    return value


def _only(data: Any, known: list[str] | tuple[str, ...], where: str) -> None:
    unknown = sorted(map(str, set(_mapping(data, where)) - set(known)))
    if unknown:
        raise RecipeError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")


def _fairseq_cases(
    entries: Mapping[str, Any], module: str, where: str = "n_centroids"
) -> list[tuple[str, dict[str, Any], int]]:
    """(part of the name, attributes, value) of one {key, value} entry; the "*" case last, so that the first
    match wins.
    """
    entry = _mapping(entries[module], f"{where}.{module}")
    if not isinstance(entry.get("key"), str) or not isinstance(entry.get("value"), Mapping):
        raise RecipeError(f"{where}.{module}: expected {{key: NAME, value: {{...}}}}, found {entry!r}")
    key, cases = entry["key"], sorted(entry["value"].items(), key=lambda item: item[0] == "*")
    if key == "fuzzy_name":
        return [("" if part == "*" else str(part), {}, value) for part, value in cases]
    return [("", {} if part == "*" else {key: part}, value) for part, value in cases]


def _plain(value: Any) -> str:
    return re.sub(r"[\s()\[\]]", "", str(value))


def _without_defaults(item: Any) -> dict[str, Any]:
    default = {f.name: f.default for f in fields(item)}
    return {
        key: value
        for key, value in asdict(item).items()
        if value != default[key] and value not in ({}, None)
    }
