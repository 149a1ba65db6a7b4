"""Layers left out of a stack (Fan et al. 2019): of a model that is trained, of what is written, and of a
state dict. Layers are known by their numbers in the whole stack.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.modules.install import StoredParameters
from fairseq_qn.modules.sharing import Places, load_apart, place, places, stacks_by
from fairseq_qn.structure import EVERY_OTHER, Prune

STACKS = r"(.*\.)?layers"
Children = dict[str, nn.Module | None]


def pruned(model: nn.Module, lines: Sequence[Prune], strict: bool = True) -> nn.Module:
    """The model without the layers that the lines leave out: a tree of its own over the same layers, which
    stay whole in the model given.

    Raises NoLayerMatched, if strict, for a line that takes no stack; UnsupportedError for numbers of layers
    that there are not.
    """
    kept = {
        id(stack): _kept(name, stack, line) for name, stack, line in stacks_by(model, lines, strict, "prune")
    }
    return _without(model, kept)


def sensitivity(
    model: nn.Module, measure: Callable[[nn.Module], float], layers: str = STACKS
) -> dict[str, dict[int, float]]:
    """By how much measure(model), such as the loss on some batches, rises when a layer is left out: for each
    stack whose whole name matches `layers`, by the number of the layer.

    The model is asked in the mode that it is in, without gradients.
    """
    result: dict[str, dict[int, float]] = {}
    with torch.no_grad():
        whole = float(measure(model))
        for name, stack, _ in stacks_by(model, [Prune(layers, EVERY_OTHER)], True, "sensitivity"):
            n = len(stack._modules)
            left = {i: _without(model, {id(stack): [j for j in range(n) if j != i]}) for i in range(n)}
            numbers = places(stack).numbers
            result[name] = {numbers[i]: float(measure(without)) - whole for i, without in left.items()}
    return result


def pruned_state(state: Mapping[str, Any], prefix: str, stack: nn.Module) -> dict[str, Any]:
    """A state dict of the whole stack, whose keys begin with `prefix`, as one of the layers that this stack
    has; one that has as many is left as it is.

    What layers that shared their weights kept once, such as codes, goes to the first of them that is left.
    Raises MismatchError for a layer that is wanted and not there.
    """
    numbers, chunk = places(stack)
    layers: dict[int, dict[str, Any]] = {}
    result = {}
    for key, value in state.items():
        if match := re.fullmatch(rf"{re.escape(prefix)}(\d+)\.(.+)", key):
            layers.setdefault(int(match[1]), {})[match[2]] = value
        else:
            result[key] = value
    if len(layers) in (0, len(numbers)):
        return dict(state)
    if missing := [n for n in numbers if n not in layers]:
        raise MismatchError(
            f"{prefix}{missing[0]}: a layer to keep, but the checkpoint has {len(layers)} layers there"
        )
    begun: set[int] = set()
    for i, number in enumerate(numbers):
        own = layers[number]
        if number // chunk not in begun:
            of_chunk = [rest for n, rest in layers.items() if n // chunk == number // chunk]
            own = {key: value for rest in of_chunk for key, value in rest.items()} | own
        begun.add(number // chunk)
        result |= {f"{prefix}{i}.{key}": value for key, value in own.items()}
    return result


def _kept(name: str, stack: nn.Module, line: Prune) -> list[int]:
    """Which of its layers a stack keeps: their places in it."""
    numbers, chunk = places(stack)
    if line.keep == EVERY_OTHER:  # of chunks: leaving out one of two layers that share saves nothing
        return [i for i, number in enumerate(numbers) if number // chunk % 2 == 0]
    if unknown := [number for number in line.keep if number not in numbers]:
        raise UnsupportedError(
            f"prune: {name or 'the model'}: expected layers out of {_shown(numbers)}, found {unknown[0]}"
        )
    return [i for i, number in enumerate(numbers) if number in line.keep]


def _shown(numbers: Sequence[int]) -> str:
    whole = tuple(numbers) == tuple(range(len(numbers)))
    return f"0 to {len(numbers) - 1}" if whole else ", ".join(map(str, numbers))


def _without(model: nn.Module, kept: Mapping[int, Sequence[int]]) -> nn.Module:
    """The model with only some layers in some stacks, given by id; modules above these are copied, no
    others.
    """
    made: dict[int, nn.Module] = {}

    def rebuilt(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            parts: Children = {
                name: None if part is None else rebuilt(part) for name, part in module._modules.items()
            }
            if id(module) in kept:
                layers = [*parts.values()]
                parts = {str(i): layers[j] for i, j in enumerate(kept[id(module)])}
            same = id(module) not in kept and all(
                part is before for part, before in zip(parts.values(), module._modules.values(), strict=True)
            )
            made[id(module)] = module if same else _with_parts(module, parts, kept)
        return made[id(module)]

    return rebuilt(model)


def _with_parts(module: nn.Module, parts: Children, kept: Mapping[int, Sequence[int]]) -> nn.Module:
    """A shallow copy with other parts."""
    result = copy.copy(module)
    own = result.__dict__
    for name, part in module._modules.items():  # fairseq's and torch's stacks are counted beside them
        if id(part) in kept and own.get("num_layers") == len(part._modules):
            own["num_layers"] = len(parts[name]._modules)
    own["_modules"] = type(module._modules)(parts)
    if "get_parameter" in own:
        own["get_parameter"] = StoredParameters(result)
    if id(module) in kept:
        numbers, chunk = places(module)
        place(result, Places(tuple(numbers[i] for i in kept[id(module)]), chunk))
        own["_load_state_dict_pre_hooks"] = type(module._load_state_dict_pre_hooks)()  # which know the other
        load_apart(result)
    return result
