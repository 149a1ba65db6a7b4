"""What the modules of a model are, beyond the shapes of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fairseq_qn.errors import MismatchError, short

# attributes that change what a module answers from the same tensors
_OPTIONS = (
    "eps", "num_heads", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups",
    "num_groups",
    "padding_mode", "padding_idx", "max_norm", "norm_type", "approximate", "negative_slope", "nonlinearity",
    "bidirectional", "batch_first", "ceil_mode", "dim",
)  # fmt: skip


def kinds_of(model: nn.Module, dropped: Sequence[str] = ()) -> dict[str, list[str]]:
    """kind, a class and its options as text -> names of its modules, `dropped` ones left out."""
    kinds: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not any(name == other or name.startswith(f"{other}.") for other in dropped):
            kinds.setdefault(kind_of(module), []).append(name)
    return kinds


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, and its options: "LayerNorm eps=1e-05"."""
    # torch's private variants of its layers go by the public name: they come and go with its releases
    public = (
        c
        for c in type(module).__mro__
        if not c.__module__.startswith("torch.") or getattr(nn, c.__name__, None) is c
    )
    return " ".join([next(public).__name__, *_options(module)])


def check_kinds(model: nn.Module, kinds: Mapping[str, Sequence[str]]) -> None:
    """Raise MismatchError unless each module that a file names is of its kind here; a subclass is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for kind, names in kinds.items():
        cls, *options = kind.split(" ")
        for name in names:
            if name not in modules:
                raise MismatchError(f"{name}: the file has it ({short(kind)}), the model has no such module")
            if difference := _difference(cls, options, modules[name]):
                raise MismatchError(f"{name or 'the model'}: {difference}; load the file into its own model")


def _difference(cls: str, options: list[str], module: nn.Module) -> str | None:
    found = _options(module)
    if cls not in {c.__name__ for c in type(module).__mro__}:
        return f"expected {short(cls)}, as saved, found {kind_of(module)}"
    if options == found:
        return None
    wanted, other = ([o for o in a if o not in b] for a, b in ((options, found), (found, options)))
    expected = short(" ".join(wanted) or "no more")
    return f"expected {cls} with {expected}, as saved, found {short(' '.join(other) or 'none')}"


def _options(module: nn.Module) -> list[str]:
    values = {name: module.__dict__.get(name) for name in _OPTIONS}
    size = [f"size={len(module)}"] if isinstance(module, nn.Sequential) else []
    return size + [f"{name}={_text(value)}" for name, value in values.items() if _is_plain(value)]


def _text(value: Any) -> str:
    return ",".join(map(_text, value)) if isinstance(value, tuple) else "".join(str(value).split())[:64]


def _is_plain(value: Any) -> bool:
    return (
        all(map(_is_plain, value))
        if isinstance(value, tuple)
        else isinstance(value, (bool, int, float, str))
    )
