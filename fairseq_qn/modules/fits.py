"""Whether a file's tensors are those of a model: names, shapes, ties, and modules that were left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fairseq_qn.errors import MismatchError


def check_fits(
    model: nn.Module,
    shapes: Mapping[str, Sequence[int]],
    ties: Sequence[Sequence[str]],
    dropped: Sequence[str],
) -> None:
    """Raise MismatchError unless `shapes` (name -> shape, ties by their first name) are exactly the model's
    tensors, and what the model ties is tied in the file.
    """
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in dropped:
        if name not in modules:
            raise MismatchError(
                f"{name}: left out of the file, but the model has no such module; load it into its own model"
            )
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if not _under(name, dropped)}
    wanted = {name: list(t.shape) for name, t in state.items()}
    found = {name: list(shape) for name, shape in shapes.items()}
    found |= {other: found[first] for first, *others in ties for other in others if first in found}
    for name, shape in wanted.items():
        if name not in found:
            raise MismatchError(
                f"{name}: the model has it, the file has not ({_missing(wanted, found)}); load it into its "
                "own model"
            )
        if found[name] != shape:
            raise MismatchError(
                f"{name}: shape: expected {shape}, found {found[name]} in the file; load it into its own "
                "model"
            )
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise MismatchError(
            f"{extra[0]}: the file has it, the model has not ({len(extra)} such); load it into its own model"
        )
    _check_ties(state, ties)


def _check_ties(state: Mapping[str, Tensor], ties: Sequence[Sequence[str]]) -> None:
    """Two weights of the file cannot share a Parameter; what it ties may be apart in the model."""
    first_of = {name: names[0] for names in ties for name in names}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        if isinstance(tensor, nn.Parameter) and first_of.get(name, name) != first_of.get(other, other):
            raise MismatchError(
                f"{name}: expected a weight of its own, as the file has it, found one tied to {other}; "
                "load the file into a model without the tie"
            )


def _under(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _missing(wanted: Mapping[str, object], found: Mapping[str, object]) -> str:
    n = sum(name not in found for name in wanted)
    return f"{n} of {len(wanted)} missing"
