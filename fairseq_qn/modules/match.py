"""Recipe -> layers of a model: which rule takes which Parameter, who else owns it, and what is left."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from fairseq_qn.errors import NoLayerMatched
from fairseq_qn.recipe import MODULE_TYPES, Recipe, Rule, is_conv1d

_TYPES = tuple(getattr(nn, name) for name in MODULE_TYPES)


@dataclass(frozen=True)
class Owner:
    """One place where a Parameter is registered: the module, its names, and the attribute."""

    module: nn.Module
    name: str
    names: tuple[str, ...]
    attribute: str

    @property
    def key(self) -> str:
        """Its first state-dict key."""
        return self.keys[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """All of its state-dict keys: several where a module is registered under several names."""
        return tuple(f"{name}.{self.attribute}" if name else self.attribute for name in self.names)


@dataclass(frozen=True)
class Match:
    """A Parameter and the rule that takes it; of its `owners`, `owner` is the one whose name matched."""

    rule: Rule
    owner: Owner
    owners: tuple[Owner, ...]


@dataclass
class Coverage:
    """What a recipe does to a model: each Parameter once, as (name, number of weights)."""

    matched: dict[str, tuple[Rule, int]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    ties: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def n_matched(self) -> int:
        """Weights that the recipe quantises."""
        return sum(size for _, size in self.matched.values())

    @property
    def share(self) -> float:
        """Share of all parameters that the recipe quantises, 0 to 1."""
        total = self.n_matched + sum(self.kept.values()) + sum(self.left.values())
        return self.n_matched / total if total else 0.0

    def __str__(self) -> str:
        by_stage: dict[str, list[int]] = {}
        for rule, size in self.matched.values():
            by_stage.setdefault(rule.stage, []).append(size)
        stages = ", ".join(
            f"{stage}: {len(sizes)} layers, {sum(sizes):,} weights" for stage, sizes in by_stage.items()
        )
        dense = sum(self.kept.values()) + sum(self.left.values())
        largest = sorted(self.left.items(), key=lambda item: -item[1])[:3]
        left = ", ".join(f"{name} {size:,}" for name, size in largest)
        return f"{self.share:.1%} of the weights quantised ({stages}); {dense:,} stay dense" + (
            f" (largest that no line names: {left})" if left else ""
        )


def owners_of(model: nn.Module) -> list[list[Owner]]:
    """The Parameters of a model, each as the list of its owners, in the order of named_modules."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    groups: dict[int, list[Owner]] = {}
    for identity, module in modules.items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owner = Owner(module, names[identity][0], tuple(names[identity]), attribute)
                groups.setdefault(id(parameter), []).append(owner)
    return list(groups.values())


def match(model: nn.Module, recipe: Recipe, *, strict: bool = True) -> tuple[list[Match], Coverage]:
    """Decide for each Parameter. `keep` goes first, then the first rule that names any of its quantisable
    owners.

    Raises NoLayerMatched, if strict, for a rule, a `keep` or a stage that takes nothing.
    """
    matches, coverage = [], Coverage()
    used: set[object] = set()
    stages: set[str] = set()
    groups = [owners for owners in owners_of(model) if not _is_learned(owners[0])]
    for owners in groups:
        size = owners[0].module._parameters[owners[0].attribute].numel()
        keep = _keep(recipe, owners)
        found = None if keep is not None else _rule(recipe, owners)
        if keep is not None:
            used.add(keep)
            coverage.kept[owners[0].key] = size
        elif found is None:
            coverage.left[owners[0].key] = size
        else:
            used.add(id(found.rule))  # not the rule: its twin further down takes nothing
            stages.add(found.rule.stage)
            matches.append(found)
            coverage.matched[found.owner.key] = (found.rule, size)
            if len(owners) > 1:
                coverage.ties[found.owner.key] = tuple(o.key for o in owners if o is not found.owner)
    if strict:
        _check_used(recipe, used, stages, groups)
    return matches, coverage


def _keep(recipe: Recipe, owners: list[Owner]) -> str | None:
    names = [name for owner in owners for name in owner.names]
    return next(
        (pattern for pattern in recipe.keep if any(re.fullmatch(pattern, name) for name in names)), None
    )


def _is_learned(owner: Owner) -> bool:
    """Whether a Parameter is what a view's scheme learns beside its weight: a part of that."""
    views = owner.module.__dict__.get("_qn_views", {}).values()
    return any(view.home is owner.module and owner.attribute in view.learned for view in views)


def _quantisable(owner: Owner) -> bool:
    return owner.attribute == "weight" and (isinstance(owner.module, _TYPES) or is_conv1d(owner.module))


def _rule(recipe: Recipe, owners: list[Owner]) -> Match | None:
    for rule in recipe.rules:
        for owner in owners:
            if _quantisable(owner) and rule.takes(list(owner.names), owner.module):
                return Match(rule, owner, tuple(owners))
    return None


def _check_used(recipe: Recipe, used: set[object], stages: set[str], groups: list[list[Owner]]) -> None:
    known = [o.name for owners in groups for o in owners if _quantisable(o)]
    shown = ", ".join(known[:4]) + (f", ... ({len(known)})" if len(known) > 4 else "")
    for index, rule in enumerate(recipe.rules):
        if id(rule) not in used and not rule.optional:
            shadowed = any(re.fullmatch(rule.layers, name) for name in known)
            why = (
                "every layer that it names is taken by `keep` or an earlier rule"
                + (", or is not of its `module` and `where`" if rule.module or rule.where else "")
                if shadowed
                else "no layer has such a name"
            )
            raise NoLayerMatched(
                f"rules[{index}] layers {rule.layers!r}: {why}; quantisable layers: {shown}"
            )
    for pattern in recipe.keep:
        if pattern not in used:
            raise NoLayerMatched(
                f"keep {pattern!r}: no module with weights has such a name, or an earlier line has them "
                f"all; quantisable layers: {shown}"
            )
    for stage in recipe.stages:
        if stage.name not in stages:
            raise NoLayerMatched(
                f"stage {stage.name!r}: its rules match no layer; quantisable layers: {shown}"
            )
