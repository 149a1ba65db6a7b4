"""A model with views -> its small file. restore.py takes the same steps the other way round.

    names    under which name each weight is stored; ties; modules that are left out
    layers   each weight that has a view: by its scheme an entry and parts
    dense    every other tensor of the state dict, narrowed
    assets   files that travel inside, compressed
    file     manifest and tensors in one container

What cannot be saved is refused before anything is packed; to ask for a size packs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_qn.artifact import container, header, manifest, streams
from fairseq_qn.artifact.streams import CODERS
from fairseq_qn.errors import EncodeError, NonFiniteWeight, UnsupportedError
from fairseq_qn.modules.activations import placed, range_keys
from fairseq_qn.modules.kinds import kinds_of
from fairseq_qn.modules.match import owners_of
from fairseq_qn.modules.view import FROZEN, WeightView, views_of
from fairseq_qn.quant.half import FLOATS, exponent_of, narrowed
from fairseq_qn.recipe import Recipe
from fairseq_qn.version import __version__

PRODUCER = f"fairseq_qn {__version__}"
Describe = Callable[[], tuple[dict[str, Any], dict[str, bytes]]]


@dataclass(frozen=True)
class Content:
    """What the file of a model will hold, decided from shapes alone, frozen or not."""

    manifest: dict[str, Any]  # without version, entries of layers, and exponents
    views: dict[str, WeightView]  # by the name under which each is stored
    dense: dict[str, Tensor]
    files: dict[str, Tensor]  # `asset:<name>`, compressed, as they travel
    coder: str | None = None  # of the packed parts

    @property
    def dtype(self) -> torch.dtype:
        """Of codebooks and of Parameters that stay dense."""
        found: torch.dtype = getattr(torch, self.manifest["parts"])
        return found

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """Of a tensor that stays dense: buffers, which no training prepared for rounding, fp32 at least."""
        if isinstance(tensor, nn.Parameter):
            return self.dtype
        return (
            torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        )

    def size(self) -> int:
        """Bytes that the file will have: exactly, once every layer is frozen, else but for the digits of
        exponents. With a coder, which chooses its size, no more than that.
        """
        content = self._outline()
        return container.predict_bytes(self._specs(content), content)

    def check(self) -> None:
        """Raise what `encode` would end in, before anything is packed: NonFiniteWeight, EncodeError, and
        UnsupportedError for a file that no reader would take.
        """
        for view in self.views.values():
            if not view.scheme.finite(view.matrix, view):
                todo = "nothing was written, save an earlier checkpoint"
                raise NonFiniteWeight(f"{view.name}: frozen with NaN or Inf; {todo}")
        for name, tensor in self.dense.items():
            if tensor.dtype == torch.float64 and self.dtype_of(tensor) != torch.float64:
                values = tensor.detach()
                if not torch.equal(values.float().isfinite(), values.isfinite()):
                    largest = f"{float(values.abs().max()):.1e}"
                    raise EncodeError(
                        f"{name}: expected values that fp32 holds, found {largest}; scale them down"
                    )
        content = self._outline()
        stored = sum(map(header.nbytes, self._specs(content).values()))
        for problem in (
            manifest.layers_excess(content, stored),
            manifest.assets_excess(content, self.files),
        ):
            if problem:
                raise UnsupportedError(f"save: {problem}; use smaller blocks, carry less")

    def encode(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(manifest, tensors) of the file, once every layer is frozen and `check` has passed."""
        layers, exponents, tensors = {}, {}, {}
        for name, view in self.views.items():
            entry, parts = view.scheme.encode(view.matrix, view, self.dtype)
            if self.coder:
                entry, parts = streams.encoded(entry, parts, self.coder)
            layers[name] = entry | _layout(view)
            tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        for name, tensor in self.dense.items():
            tensors[name], exponent = narrowed(tensor.detach(), self.dtype_of(tensor))
            exponents |= {name: exponent} if exponent else {}
        return self._whole(layers, exponents), tensors | self.files

    def _outline(self) -> dict[str, Any]:
        """The manifest as `encode` makes it, but for what packing alone can tell."""
        layers = {
            name: view.scheme.entry(view.matrix, view, self.dtype, view.phase == FROZEN) | _layout(view)
            for name, view in self.views.items()
        }
        found = {name: exponent_of(tensor, self.dtype_of(tensor)) for name, tensor in self.dense.items()}
        exponents = {name: exponent for name, exponent in found.items() if exponent}
        return self._whole(layers, exponents)

    def _whole(self, layers: dict[str, Any], exponents: dict[str, int]) -> dict[str, Any]:
        content = {**self.manifest, "layers": layers, "exponents": exponents}
        return {"version": manifest.version_of(content), **content}

    def _specs(self, content: Mapping[str, Any]) -> dict[str, header.Spec]:
        """(dtype, shape) of every tensor of the file."""
        layouts = {
            name: streams.layout(entry, content["parts"]) for name, entry in content["layers"].items()
        }
        specs = {f"{name}/{part}": spec for name, layout in layouts.items() for part, spec in layout.items()}
        specs |= {name: container.spec_of(self.dtype_of(t), t.shape) for name, t in self.dense.items()}
        return specs | {name: ("uint8", tuple(data.shape)) for name, data in self.files.items()}


def content_of(
    model: nn.Module, recipe: Recipe, *, parts: str = "float16", drop: Sequence[str] = (),
    assets: Mapping[str, bytes] | None = None, source: Mapping[str, Any] | None = None,
    coder: str | None = None,
) -> Content:  # fmt: skip
    """Decide what is stored under which name. Raises UnsupportedError for unknown options."""
    if coder not in (None, *CODERS):
        raise UnsupportedError(f"save: coder: expected one of {[*CODERS]}, found {coder!r}")
    if parts not in FLOATS:
        raise UnsupportedError(f"save: parts: expected one of {[*FLOATS]}, found {parts!r}")
    modules = dict(model.named_modules())
    for name in drop:
        if not name or name not in modules:
            raise UnsupportedError(f"save: drop: the model has no module {name!r}")
    dropped = tuple(f"{name}." for name in drop)
    views, ties, buffers = _names(model, dropped)
    source, files = _source(model, source, assets)
    packed = {name: manifest.pack_asset(data) for name, data in files.items()}
    content = {
        "producer": PRODUCER, "recipe": recipe.to_dict(), "parts": parts,
        "ties": ties, "dropped": list(drop), "source": source,
        "assets": {name: entry for name, (entry, _) in packed.items()},
    }  # fmt: skip
    if "builder" not in (source or {}):  # else the file's own model is built anew
        content["modules"] = kinds_of(model, drop)
    entries = {n: a.entry() for n, a in placed(model) if not f"{n}.".startswith(dropped)}
    if entries:
        content["activations"] = entries
    skip = {*views, *buffers, *range_keys(model), *(other for _, *others in ties for other in others)}
    state = model.state_dict(keep_vars=True)
    moved: dict[int, Tensor] = {}
    for view in views.values():
        moved |= {} if view.fold is None else view.fold.moved(view.home)
    dense = {
        name: moved.get(id(tensor), tensor)
        for name, tensor in state.items()
        if name not in skip and not name.startswith(dropped)
    }
    return Content(
        content, views, dense, {manifest.ASSET + name: data for name, (_, data) in packed.items()}, coder
    )


def _layout(view: WeightView) -> dict[str, bool]:
    return {"transposed": True} if view.transposed else {}


def _names(
    model: nn.Module, dropped: tuple[str, ...]
) -> tuple[dict[str, WeightView], list[list[str]], set[str]]:
    """(views by the name under which each is stored, ties, names of what the views keep beside)."""
    by_parameter = {id(view.weight): view for view in views_of(model)}
    views, ties, buffers = {}, [], set()
    for owners in owners_of(model):
        keys = [key for owner in owners for key in owner.keys if not key.startswith(dropped)]
        view = by_parameter.get(id(owners[0].module._parameters[owners[0].attribute]))
        if view is not None and keys:
            keys.sort(key=lambda key, first=view.name: key != first)
            views[keys[0]] = view
            own = (key for owner in owners if owner.module is view.home for key in owner.keys)
            buffers |= {key.removesuffix("weight") + name for key in own for name in view.names}
        if len(keys) > 1:
            ties.append(keys)
    return views, ties, buffers


def _source(
    model: nn.Module, source: Mapping[str, Any] | None, assets: Mapping[str, bytes] | None
) -> tuple[Any, dict[str, bytes]]:
    """(source, files): as given, over what the model itself says of how to rebuild it."""
    given = "builder" in (source or {})  # then the model is not asked how it is built
    describe: Describe | None = None if given else getattr(model, "qn_describe", None)
    own, files = describe() if describe else ({}, {})
    merged = {**own, **(source or {})}
    return merged or None, {**files, **(assets or {})}
