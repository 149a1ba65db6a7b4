"""Put the weights of a file into a dense model: decoded (mode "dense"), or packed as they are (mode
"packed").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.modules.conv import IntConv2d, PQConv2d
from fairseq_qn.modules.embedding import IntEmbedding, PQEmbedding
from fairseq_qn.modules.linear import IntLinear, PQLinear
from fairseq_qn.modules.packed import PQ, Int, swap, tie
from fairseq_qn.quant.integer import Integers, dequantize
from fairseq_qn.quant.product import decode

_PQ = {nn.Linear: PQLinear, nn.Embedding: PQEmbedding, nn.Conv2d: PQConv2d}
_INT = {nn.Linear: IntLinear, nn.Embedding: IntEmbedding, nn.Conv2d: IntConv2d}


@dataclass(frozen=True)
class ProductWeight:
    """codes [out_features, blocks a row] and codebook fp32 [K, d] of a weight of this shape; pad: its pad
    row, if not zero.
    """

    codes: Tensor
    codebook: Tensor
    shape: tuple[int, ...]
    padding_idx: int | None
    pad: Tensor | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight."""
        return decode(self.codes, self.codebook.to(dtype), self.shape, self.padding_idx, self.pad)

    def into(self, module: nn.Module) -> None:
        """Replace a dense module's weight by these codes; the codebook takes the weight's dtype."""
        dtype = module.weight.dtype
        swap(module, PQ, _PQ)
        pad = None if self.pad is None else self.pad.to(dtype)
        module.pack(self.codes, self.codebook.to(dtype), self.shape, self.padding_idx, pad)


@dataclass(frozen=True)
class IntegerWeight:
    """The integers of a weight of this shape."""

    integers: Integers
    shape: tuple[int, ...]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The de-quantised weight."""
        return dequantize(self.integers, self.shape, dtype)

    def into(self, module: nn.Module) -> None:
        """Replace a dense module's weight by these integers; their scale takes the weight's dtype."""
        integers = replace(self.integers, scale=self.integers.scale.to(module.weight.dtype))
        swap(module, Int, _INT)
        module.pack(integers, self.shape)


Weight = ProductWeight | IntegerWeight


class DroppedError(UnsupportedError, AttributeError):
    """A module that was left out of the file is asked for something. hasattr says no."""


class Dropped(nn.Module):
    """What stands in for a module that was left out of the file: to call it or to read anything of it is a
    DroppedError.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: object, **kwargs: object) -> None:
        """Raises DroppedError."""
        raise DroppedError(
            f"{self.name}: was left out of the file when it was saved; save it without drop to use it"
        )

    __iter__ = __len__ = __getitem__ = forward

    def __getattr__(self, attribute: str) -> object:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            return self.forward()


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
    """Two weights of the file cannot share a Parameter. What it ties may be apart in the model: `fill` ties
    it.
    """
    home = {name: names[0] for names in ties for name in names}
    first: dict[int, str] = {}
    for name, tensor in state.items():
        other = first.setdefault(id(tensor), name)
        if isinstance(tensor, nn.Parameter) and home.get(name, name) != home.get(other, other):
            raise MismatchError(
                f"{name}: expected a weight of its own, as the file has it, found one tied to {other}; "
                "load the file into a model without the tie"
            )


@torch.no_grad()
def fill(
    model: nn.Module,
    layers: Mapping[str, Weight],
    dense: Mapping[str, Tensor],
    ties: Sequence[Sequence[str]],
    dropped: Sequence[str],
    mode: str,
) -> None:
    """Fill a dense model that check_fits has passed, in place. A model on the meta device gets its tensors
    here.
    """
    for name in dropped:
        parent, attribute = _home(model, name)
        setattr(parent, attribute, Dropped(name))
    for name, tensor in dense.items():
        _assign(model, name, tensor)
    tied = {first: others for first, *others in ties}
    packed: list[tuple[Weight, nn.Module, list[tuple[nn.Module, str]]]] = []
    for name, weight in layers.items():
        owners = [_home(model, key) for key in (name, *tied.get(name, ()))]
        home = next((module for module, attribute in owners if attribute == "weight"), None)
        if mode == "packed" and home is not None:
            packed.append((weight, home, owners))
        else:
            module, attribute = owners[0]
            _assign(model, name, weight.dense(module._parameters[attribute].dtype))
    for first, *others in ties:
        for other in others:
            _retie(model, first, other)
    for weight, home, owners in packed:
        weight.into(home)
        for module, attribute in owners:
            # not the home, nor a module that goes by two names a second time
            if attribute in module._parameters:
                tie(module, attribute, home)
    for module in model.modules() if packed else ():
        # fairseq's attention: to call its projections, not read them
        if hasattr(module, "_set_skip_embed_dim_check"):
            module._set_skip_embed_dim_check()


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    module, attribute = _home(model, name)
    store = module._parameters if attribute in module._parameters else module._buffers
    old = store[attribute]
    if not old.is_meta:
        old.copy_(value)
        return
    value = value.to(old.dtype)
    store[attribute] = nn.Parameter(value, old.requires_grad) if store is module._parameters else value


def _retie(model: nn.Module, first: str, other: str) -> None:
    (home, attribute), (module, other_attribute) = _home(model, first), _home(model, other)
    if attribute in home._parameters:
        module._parameters[other_attribute] = home._parameters[attribute]
    else:
        module._buffers[other_attribute] = home._buffers[attribute]


def _home(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _under(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _missing(wanted: Mapping[str, object], found: Mapping[str, object]) -> str:
    n = sum(name not in found for name in wanted)
    return f"{n} of {len(wanted)} missing"
