"""Activations: what goes into a module goes through a scheme first, in training and in a loaded model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.schemes.activation import ACTIVATIONS, Activation


def place(model: nn.Module, schemes: Mapping[str, Activation | None]) -> None:
    """Let the first input of the modules of these names go through a scheme; None takes it away.

    A scheme takes the place of one that is there. Raises UnsupportedError for a name that the model has not.
    """
    modules = dict(model.named_modules())
    for name in schemes:
        if name not in modules:
            raise UnsupportedError(f"activations: the model has no module {name!r}")
    for name, scheme in schemes.items():
        module = modules[name]
        module.__dict__.pop("_qn_activation", None)
        if scheme is not None:
            module.__dict__["_qn_activation"] = scheme
            if _through not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_through)


def activations_of(model: nn.Module) -> Iterator[tuple[str, Activation]]:
    """Names of modules, and what their input goes through."""
    for name, module in model.named_modules():
        if "_qn_activation" in module.__dict__:
            yield name, module.__dict__["_qn_activation"]


def check(model: nn.Module, entries: Mapping[str, dict[str, Any]]) -> None:
    """Raise MismatchError for a module of a manifest that the model has not."""
    modules = dict(model.named_modules())
    for name in entries:
        if name not in modules:
            raise MismatchError(f"{name}: the file has activations of it, the model has no such module")


def restore(model: nn.Module, entries: Mapping[str, dict[str, Any]]) -> None:
    """As a manifest says that was checked, itself and against the model."""
    place(model, {name: ACTIVATIONS[entry["scheme"]].of_entry(entry) for name, entry in entries.items()})


def _through(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    scheme = module.__dict__.get("_qn_activation")
    return None if scheme is None or not args else (scheme(args[0]), *args[1:])
