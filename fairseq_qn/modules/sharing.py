"""Adjacent layers that share their weights (Fan et al. 2020, Table 2), as modules that own the same
Parameters: noise, freezing, the optimizer and the small file see one weight, as of any tied one.

A stack is a ModuleList or a Sequential. What is no Parameter, such as running statistics or the range of an
input, stays each layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from fairseq_qn.errors import NoLayerMatched, UnsupportedError
from fairseq_qn.modules.kinds import kinds_of
from fairseq_qn.structure import Prune, Share

_STACKS = (nn.ModuleList, nn.Sequential)
Slots = dict[str, tuple[nn.Module, str]]


class Places(NamedTuple):
    """Of a stack's layers: their numbers in the whole stack, and how many adjacent ones of that share."""

    numbers: tuple[int, ...]
    chunk: int = 1


def places(stack: nn.Module) -> Places:
    """Where each layer stood before others were left out of the stack."""
    found: Places | None = stack.__dict__.get("_qn_places")
    n = len(stack._modules)
    return found if found is not None and len(found.numbers) == n else Places(tuple(range(n)))


def place(stack: nn.Module, found: Places) -> None:
    """Say so."""
    stack.__dict__["_qn_places"] = found


def stacks_by(
    model: nn.Module, lines: Sequence[Share | Prune], strict: bool, what: str
) -> list[tuple[str, nn.Module, Any]]:
    """(name, stack, line) of each stack that a line names, by the first that does.

    Raises NoLayerMatched, if strict, for a line that takes none.
    """
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, _STACKS)]
    found = [
        (name, stack, line)
        for name, stack in stacks
        if (line := next((line for line in lines if re.fullmatch(line.layers, name)), None)) is not None
    ]
    for i, line in enumerate(lines if strict else ()):
        if not any(taken is line for _, _, taken in found):
            shown = ", ".join(name or "the model itself" for name, _ in stacks[:4]) or "none"
            raise NoLayerMatched(f"{what}[{i}] layers {line.layers!r}: takes no stack; stacks: {shown}")
    return found


def share(layers: nn.Module, chunk: int = 2) -> None:
    """Let each `chunk` adjacent layers of a ModuleList or Sequential share their weights, in place: those
    of the first of them.

    The others' Parameters are gone, so share before the optimizer is made, and before `apply`. From then on
    a state dict whose layers are apart loads as the first layer of each chunk. Where layers were left out,
    chunks are those of the whole stack. Twice does no harm. Raises RecipeError for a chunk that is no number
    from 2; UnsupportedError, with nothing changed, for what is no stack, layers that are not alike, and
    layers that carry views.
    """
    if not isinstance(layers, _STACKS):
        kinds = " or ".join(kind.__name__ for kind in _STACKS)
        raise UnsupportedError(f"share: expected a {kinds} of layers, found {type(layers).__name__}")
    (line,) = Share.parse([{"layers": "", "chunk": chunk}], "share")
    _share("", layers, line.chunk)


@contextmanager
def shared(model: nn.Module, lines: Sequence[Share], strict: bool) -> Iterator[None]:
    """Share as the lines of a recipe say, and undo that if the block raises."""
    undo: list[Callable[[], None]] = []
    try:
        for name, stack, line in stacks_by(model, lines, strict, "share"):
            undo.append(_share(f"{name}: ", stack, line.chunk))
        yield
    except Exception:
        for each in reversed(undo):
            each()
        raise


def _share(where: str, stack: nn.Module, chunk: int) -> Callable[[], None]:
    """Share within one stack; returns what undoes it."""
    before = stack.__dict__.get("_qn_places")
    numbers = places(stack).numbers
    pairs: list[tuple[Slots, Slots]] = []
    firsts: dict[int, tuple[int, nn.Module]] = {}
    for number, layer in zip(numbers, stack._modules.values(), strict=True):
        of_first, first = firsts.setdefault(number // chunk, (number, layer))
        ours, theirs = _slots(first), _slots(layer)
        if _held(theirs).items() <= _held(ours).items():  # the first may hold what its views learn besides
            continue
        if difference := _difference(first, layer, ours, theirs):
            raise UnsupportedError(f"share: {where}layers {of_first} and {number}: {difference}")
        pairs.append((ours, theirs))
    held = [(module, attribute, module._parameters[attribute]) for _, theirs in pairs
            for module, attribute in theirs.values()]  # fmt: skip
    for ours, theirs in pairs:
        for name, (module, attribute) in theirs.items():
            first, own = ours[name]
            module._parameters[attribute] = first._parameters[own]
    place(stack, Places(numbers, chunk))
    load_apart(stack)
    return partial(_put_back, stack, before, held)


def _put_back(stack: nn.Module, before: Places | None, held: Iterable[tuple[Any, str, Any]]) -> None:
    for module, attribute, parameter in held:
        module._parameters[attribute] = parameter
    if before is None:
        del stack.__dict__["_qn_places"]
    else:
        place(stack, before)


def _slots(layer: nn.Module) -> Slots:
    """Where a layer holds Parameters, by their names in it."""
    return {
        f"{name}.{attribute}" if name else attribute: (module, attribute)
        for name, module in layer.named_modules(remove_duplicate=False)
        for attribute, parameter in module._parameters.items()
        if parameter is not None
    }


def _held(slots: Slots) -> dict[str, int]:
    return {name: id(module._parameters[attribute]) for name, (module, attribute) in slots.items()}


def _difference(first: nn.Module, layer: nn.Module, ours: Slots, theirs: Slots) -> str | None:
    """Why two layers cannot share their weights, or None."""
    if any("_qn_views" in module.__dict__ for each in (first, layer) for module in each.modules()):
        return "carry views already; share before fairseq_qn.apply, or in the recipe"
    shapes = [
        {name: (*m._parameters[a].shape, m._parameters[a].dtype) for name, (m, a) in slots.items()}
        for slots in (ours, theirs)
    ]
    if shapes[0] != shapes[1] or kinds_of(first) != kinds_of(layer):
        return "expected layers of the same kind, shapes and dtypes, found others; choose another chunk"
    return None


def load_apart(stack: nn.Module) -> None:
    """Let the stack take a state dict whose layers are apart: of those that share here, the first."""
    if not any(hook.hook is _of_the_first for hook in stack._load_state_dict_pre_hooks.values()):
        stack._register_load_state_dict_pre_hook(_of_the_first, with_module=True)


def _of_the_first(stack: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    firsts: dict[int, str] = {}
    for index, layer in stack._modules.items():
        for name, parameter in _held(_slots(layer)).items():
            key = f"{prefix}{index}.{name}"
            first = firsts.setdefault(parameter, key)
            if first in state:
                state[key] = state[first]
