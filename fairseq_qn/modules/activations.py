"""Activations: what goes into a module goes through a scheme first, in training and in a loaded model.

Only a module that is called has an input: one whose weight is read from outside alone, as of
nn.MultiheadAttention or a tied head that calls F.linear, computes with what it is given. fairseq's attention
is told to call its projections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.modules.activation_view import RANGE, TODO, ActivationView, takes_numbers
from fairseq_qn.schemes.activation import ACTIVATIONS, Activation


def place(model: nn.Module, schemes: Mapping[str, Activation | ActivationView | None]) -> None:
    """Let the first input of the modules of these names go through a scheme; None takes it away.

    A scheme takes the place of one that is there. Raises UnsupportedError for a name that the model has not.
    """
    modules = dict(model.named_modules())
    for name in schemes:
        if name not in modules:
            raise UnsupportedError(f"activations: the model has no module {name!r}")
    for name, scheme in schemes.items():
        module = modules[name]
        _take_off(module)
        if scheme is not None:
            module.__dict__.update(_qn_activation=scheme, extra_repr=_Described(module))
            module.register_forward_pre_hook(_through, with_kwargs=True)
    for module in model.modules():
        _tell_attention(module)


def remove(model: nn.Module) -> None:
    """Take them all off, with what they have kept."""
    for _, scheme in placed(model):
        if isinstance(scheme, ActivationView):
            scheme.clear()
    place(model, {name: None for name, _ in placed(model)})


def placed(model: nn.Module) -> list[tuple[str, Any]]:
    """Names of modules, and what their input goes through."""
    named = ((name, module.__dict__.get("_qn_activation")) for name, module in model.named_modules())
    return [(name, scheme) for name, scheme in named if scheme is not None]


def refuse_unseen(model: nn.Module, drop: Sequence[str] = ()) -> None:
    """Raise UnsupportedError for a static range without an input so far; modules in `drop` may have one."""
    for name, scheme in placed(model):
        dropped = any(f"{name}.".startswith(f"{other}.") for other in drop)
        if isinstance(scheme, ActivationView) and scheme.is_unseen and not dropped:
            raise UnsupportedError(f"save: {name}: no input has been seen, and so no range; {TODO}")


def check(model: nn.Module, entries: Mapping[str, dict[str, Any]]) -> None:
    """Raise MismatchError for a module of a manifest that the model has not, or that takes no numbers."""
    modules = dict(model.named_modules())
    for name in entries:
        if name not in modules:
            raise MismatchError(f"{name}: the file has activations of it, the model has no such module")
        if not takes_numbers(modules[name]):
            kind = type(modules[name]).__name__
            raise MismatchError(f"{name}: the file has activations of it, expected a layer, found {kind}")


def restore(model: nn.Module, entries: Mapping[str, dict[str, Any]]) -> None:
    """As a manifest says that was checked, itself and against the model."""
    place(model, {name: ACTIVATIONS[entry["scheme"]].of_entry(entry) for name, entry in entries.items()})


def range_keys(model: nn.Module) -> set[str]:
    """State-dict keys of the ranges that training keeps."""
    named = model.named_modules(remove_duplicate=False)
    return {
        f"{name}.{RANGE}" if name else RANGE
        for name, module in named
        if RANGE in module._buffers and isinstance(module.__dict__.get("_qn_activation"), ActivationView)
    }


def adopt_ranges(state: dict[str, Any], model: nn.Module) -> None:
    """Change a state dict of another recipe, or of none, so that its ranges are those that the model has."""
    own = range_keys(model)
    for key in [key for key in state if key.rpartition(".")[2] == RANGE and key not in own]:
        del state[key]
    state.update({key: model.get_buffer(key).clone() for key in own - state.keys()})


def share_ranges(model: nn.Module) -> None:
    """Let all ranks go on with the ranges of the first, whose checkpoint a resumed run begins from."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        own = [s.stored for _, s in placed(model) if isinstance(s, ActivationView) and s.is_static]
        if own:
            first = torch.stack(own)
            torch.distributed.broadcast(first, 0)
            for stored, values in zip(own, first, strict=True):
                stored.copy_(values)


class _Described:
    """`extra_repr` of a module: its own, and what its input goes through."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self) -> str:
        m = self.module
        return ", ".join(filter(None, (type(m).extra_repr(m), m.__dict__["_qn_activation"].label)))


def _take_off(module: nn.Module) -> None:
    for name in ("_qn_activation", "extra_repr"):
        module.__dict__.pop(name, None)
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _through]:
        del hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key)


def _tell_attention(module: nn.Module) -> None:
    """fairseq's attention: to call its projections while one of them has activations, not read them."""
    if not hasattr(module, "_set_skip_embed_dim_check"):
        return
    asked = any("_qn_activation" in child.__dict__ for child in module.children())
    if asked and not module.skip_embed_dim_check:
        module._set_skip_embed_dim_check()
        module.__dict__["_qn_told"] = True
    elif not asked and module.__dict__.pop("_qn_told", False):
        module.skip_embed_dim_check = False


def _through(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scheme = module.__dict__["_qn_activation"]
    if args:
        return (scheme(args[0]), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: scheme(kwargs[first])}
