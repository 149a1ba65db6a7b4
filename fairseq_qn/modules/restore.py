"""A small file -> a model: the steps of export.py, the other way round.

    file     one container, checked: manifest and tensors
    assets   files that travel inside, unpacked when asked for
    dense    tensors stored as they are, widened
    layers   each quantised weight as its scheme stores it
    names    into the model's modules, dense or packed; ties; modules that were left out

The model is changed by the last step alone, when nothing can fail any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_qn.artifact import container, streams
from fairseq_qn.artifact.manifest import Assets, check, dense_excess, dense_names, transposed
from fairseq_qn.errors import FormatError, UnsupportedError, short
from fairseq_qn.modules import activations
from fairseq_qn.modules.dropped import Dropped
from fairseq_qn.modules.fits import check_fits
from fairseq_qn.modules.integer_program import integer_model
from fairseq_qn.modules.kinds import check_kinds
from fairseq_qn.modules.packed import pack, tie
from fairseq_qn.quant.half import widened
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.base import Entry, Stored

Builder = Callable[[dict[str, Any], Mapping[str, bytes], Sequence[str]], nn.Module]
_BUILDERS: dict[str, Builder] = {}
# library -> the module over it that registers a builder; imported when a file asks for it
_REGISTER = {"fairseq": "fairseq_qn.models.pretrained"}


@dataclass(frozen=True)
class File:
    """A small file in memory, checked: what `load` builds a model from, and the hub its interface."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """Of the weights in the file, tied ones by all of theirs, and of the modules that were left out."""
        tied = [name for names in self.manifest["ties"] for name in names[1:]]
        return [*self.manifest["layers"], *dense_names(self.manifest), *tied, *self.manifest["dropped"]]

    @cached_property
    def assets(self) -> Mapping[str, bytes]:
        """The files that travel inside, by name, each unpacked when it is asked for."""
        return Assets(self.manifest, self.tensors, str(self.path))

    def dense(self) -> dict[str, Tensor]:
        """The tensors that are stored as they are, by name."""
        exponents = self.manifest["exponents"]
        names = dense_names(self.manifest)
        return {name: widened(self.tensors[name], exponents.get(name, 0)) for name in names}

    def layers(self) -> dict[str, Stored]:
        """The quantised weights, by name. Raises FormatError."""
        return {name: self._layer(name, entry) for name, entry in self.manifest["layers"].items()}

    @torch.no_grad()
    def load(
        self,
        mode: str = "dense",
        model: nn.Module | None = None,
        *,
        dtype: torch.dtype | None = None,
        large: bool = False,
    ) -> nn.Module:
        """The model, in eval mode; see `load`. Once: packed parts are freed as they are unpacked."""
        if mode not in ("dense", "packed", "integer"):
            raise UnsupportedError(f"load: mode: expected dense, packed or integer, found {mode!r}")
        if mode == "integer" and dtype is not None:
            raise UnsupportedError("load: dtype: mode integer has its own; leave it out")
        if not self.tensors.keys() >= self.manifest["tensors"].keys():
            raise UnsupportedError(f"{self.path}: was loaded before, which freed its parts; read it again")
        if mode == "dense" and not large and (problem := dense_excess(self.manifest)):
            todo = 'load it with mode="packed", or with large=True if you trust it'
            raise UnsupportedError(f"{self.path}: {problem}; {todo}")
        dense, layers, content = self.dense(), self.layers(), self.manifest
        if model is None:
            model = _build(self)
        shapes = {name: tuple(tensor.shape) for name, tensor in dense.items()}
        for name, stored in layers.items():
            shapes[name] = stored.shape[::-1] if transposed(content["layers"][name]) else stored.shape
        check_fits(model, shapes, content["ties"], content["dropped"])
        check_kinds(model, content.get("modules", {}))
        activations.check(model, content.get("activations", {}))
        if dtype is not None:
            model.to(dtype)
        for name in content["dropped"]:
            parent, attribute = _place(model, name)
            setattr(parent, attribute, Dropped(name))
        for name, tensor in dense.items():
            _assign(model, name, tensor)
        _fill(model, layers, content, packed=mode != "dense")
        activations.restore(model, content.get("activations", {}))
        return integer_model(model.eval()) if mode == "integer" else model.eval()

    @contextmanager
    def named(self) -> Iterator[None]:
        """Put the file's name before what is wrong with its content."""
        try:
            yield
        except (FormatError, UnsupportedError) as error:
            if str(error).startswith(f"{self.path}:"):
                raise
            raise type(error)(f"{self.path}: {error}") from error.__cause__

    def _layer(self, name: str, entry: Entry) -> Stored:
        parts = {part: self.tensors.pop(f"{name}/{part}") for part in streams.layout(entry)}
        try:
            return SCHEMES[entry["scheme"]].decode(entry, streams.decoded(entry, parts))
        except FormatError as error:
            raise FormatError(f"{self.path}: {name}: {error}") from None


def read(path: str | Path) -> File:
    """Read and check a small file. Raises FormatError, OSError."""
    tensors, content = container.read(path)
    check(content, str(path))
    return File(Path(path), content, tensors)


def register_builder(kind: str, builder: Builder) -> None:
    """How `load` rebuilds models whose manifest says source.builder == kind: builder(source, assets, names)
    -> dense model.

    The source is whatever the file says: the builder has to check it. names: those of the file's weights,
    and of the modules that were left out.
    """
    _BUILDERS[kind] = builder


def _build(file: File) -> nn.Module:
    source = file.manifest["source"]
    kind = source.get("builder") if source else None
    if kind is None:
        raise UnsupportedError(
            f"{file.path}: the file does not say how to build its model; pass a fresh dense one: load(path, "
            "model=...)"
        )
    if isinstance(kind, str) and kind in _REGISTER and find_spec(kind) is not None:
        import_module(_REGISTER[kind])
    if not isinstance(kind, str) or kind not in _BUILDERS:
        raise FormatError(
            f"{file.path}: source.builder: expected one of {sorted(_BUILDERS)}, found {short(kind)}; is "
            "fairseq installed?"
        )
    with file.named():
        return _BUILDERS[kind](source, file.assets, file.names)


def _fill(model: nn.Module, layers: Mapping[str, Stored], content: Mapping[str, Any], packed: bool) -> None:
    """Fill a model that check_fits has passed, in place. On the meta device it gets its tensors here."""
    ties, entries = content["ties"], content["layers"]
    tied = {first: others for first, *others in ties}
    holders: list[tuple[str, nn.Module, list[tuple[nn.Module, str]]]] = []
    for name, stored in layers.items():
        owners = [_place(model, key) for key in (name, *tied.get(name, ()))]
        holder = next((module for module, attribute in owners if attribute == "weight"), None)
        if packed and holder is not None:
            holders.append((name, holder, owners))
        else:
            module, attribute = owners[0]
            weight = stored.dense(module._parameters[attribute].dtype)
            _assign(model, name, weight.t().contiguous() if transposed(entries[name]) else weight)
    for first, *others in ties:
        for other in others:
            _retie(model, first, other)
    for name, holder, owners in holders:
        label = SCHEMES[entries[name]["scheme"]].label(entries[name])
        pack(holder, layers[name], label, transposed(entries[name]))
        for module, attribute in owners:
            # not the holder, nor a module that goes by two names a second time
            if attribute in module._parameters:
                tie(module, attribute, holder)
    for module in model.modules() if holders else ():
        # fairseq's attention: to call its projections, not read them
        if hasattr(module, "_set_skip_embed_dim_check"):
            module._set_skip_embed_dim_check()


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    module, attribute = _place(model, name)
    store = module._parameters if attribute in module._parameters else module._buffers
    old = store[attribute]
    if not old.is_meta:
        old.copy_(value)
        return
    value = value.to(old.dtype)
    store[attribute] = nn.Parameter(value, old.requires_grad) if store is module._parameters else value


def _retie(model: nn.Module, first: str, other: str) -> None:
    (holder, attribute), (module, other_attribute) = _place(model, first), _place(model, other)
    if attribute in holder._parameters:
        module._parameters[other_attribute] = holder._parameters[attribute]
    else:
        module._buffers[other_attribute] = holder._buffers[attribute]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute
