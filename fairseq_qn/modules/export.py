"""A model with views -> the manifest and the tensors of its small file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_qn.artifact import codec, container, manifest
from fairseq_qn.errors import EncodeError, NonFiniteWeight, UnsupportedError
from fairseq_qn.modules.kinds import kinds_of
from fairseq_qn.modules.match import owners_of
from fairseq_qn.modules.view import FROZEN, WeightView, views_of
from fairseq_qn.quant import integer, product
from fairseq_qn.recipe import Recipe

PRODUCER = "fairseq_qn 0.1.0"
Describe = Callable[[], tuple[dict[str, Any], dict[str, bytes]]]


@dataclass(frozen=True)
class Plan:
    """What the file of a model will hold: decided from shapes alone, frozen or not."""

    manifest: dict[str, Any]
    views: dict[str, WeightView]  # by the name under which each is stored
    dense: dict[str, Tensor]
    files: dict[str, Tensor]  # compressed, as they travel

    @property
    def dtype(self) -> torch.dtype:
        """Of codebooks and of Parameters that stay dense."""
        return codec.FLOATS[self.manifest["parts"]]

    def dtype_of(self, tensor: Tensor) -> torch.dtype:
        """Of a tensor that stays dense. Statistics and tables in buffers were not trained to bear rounding:
        fp32 at least.
        """
        if isinstance(tensor, nn.Parameter):
            return self.dtype
        return (
            torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
        )

    def size(self) -> int:
        """Bytes that the file will have: exactly, once every layer is frozen, else but for the digits of
        exponents.
        """
        layers, exponents = self.manifest["layers"], self.manifest["exponents"]
        for name, view in self.views.items():
            if view.phase == FROZEN and view.rule.scheme == "product":
                layers[name]["exponent"] = codec.exponent_of(_codebook(view), self.dtype)
            if "pad" in layers[name]:
                layers[name]["pad"] = codec.exponent_of(_pad(view), self.dtype)
        found = {
            name: codec.exponent_of(tensor, self.dtype_of(tensor)) for name, tensor in self.dense.items()
        }
        exponents |= {name: exponent for name, exponent in found.items() if exponent}
        specs = {
            f"{n}/{part}": spec
            for n, e in layers.items()
            for part, spec in codec.layout(e, self.dtype).items()
        }
        for name, tensor in self.dense.items():
            specs[name] = (self.dtype_of(tensor), tuple(tensor.shape))
        specs |= {
            manifest.ASSET + name: (torch.uint8, tuple(data.shape)) for name, data in self.files.items()
        }
        return container.predict_bytes(specs, self.manifest)

    def encode(self) -> dict[str, Tensor]:
        """The tensors of the file; completes the manifest's exponents."""
        tensors: dict[str, Tensor] = {}
        for name, view in self.views.items():
            entry = self.manifest["layers"][name]
            parts = _encode(view, entry, self.dtype)
            if not codec.all_finite(entry, parts):
                raise NonFiniteWeight(
                    f"{view.name}: frozen with NaN or Inf; nothing was written, save an earlier checkpoint"
                )
            tensors |= {f"{name}/{part}": tensor for part, tensor in parts.items()}
        for name, tensor in self.dense.items():
            tensors[name], exponent = codec.narrowed(tensor.detach(), self.dtype_of(tensor))
            if tensor.dtype == torch.float64 and not torch.equal(
                tensors[name].isfinite(), tensor.isfinite()
            ):
                largest = float(tensor.detach().abs().max())
                raise EncodeError(
                    f"{name}: expected values that fp32 holds, found {largest:.1e}; scale them down"
                )
            if exponent:
                self.manifest["exponents"][name] = exponent
        return tensors | {manifest.ASSET + name: data for name, data in self.files.items()}


def plan(model: nn.Module, recipe: Recipe, *, parts: str = "float16", drop: Sequence[str] = (),
         assets: Mapping[str, bytes] | None = None,
         source: Mapping[str, Any] | None = None) -> Plan:  # fmt: skip
    """Decide what is stored under which name. Raises UnsupportedError for unknown `parts` or `drop`."""
    if parts not in codec.FLOATS:
        raise UnsupportedError(f"save: parts: expected one of {list(codec.FLOATS)}, found {parts!r}")
    modules = dict(model.named_modules())
    for name in drop:
        if not name or name not in modules:
            raise UnsupportedError(f"save: drop: the model has no module {name!r}")
    dropped = tuple(f"{name}." for name in drop)
    by_parameter = {id(view.weight): view for view in views_of(model)}
    views, ties, buffers = {}, [], set()
    for owners in owners_of(model):
        keys = [key for owner in owners for key in owner.keys if not key.startswith(dropped)]
        view = by_parameter.get(id(owners[0].module._parameters[owners[0].attribute]))
        if view is not None and keys:
            keys.sort(key=lambda key, first=view.name: key != first)
            views[keys[0]] = view
            stems = [
                key[: -len(view.attribute)]
                for owner in owners
                if owner.module is view.home
                for key in owner.keys
            ]
            buffers |= {stem + name for stem in stems for name in view.buffer_names}
        if len(keys) > 1:
            ties.append(keys)
    source, files = _source(model, source, assets)
    packed = {name: manifest.pack_asset(data) for name, data in files.items()}
    content = {
        "version": manifest.VERSION,
        "producer": PRODUCER,
        "recipe": recipe.to_dict(),
        "parts": parts,
        "layers": {name: _entry(view) for name, view in views.items()},
        "exponents": {},
        "ties": ties,
        "dropped": list(drop),
        "source": source,
        "assets": {name: entry for name, (entry, _) in packed.items()},
    }
    if "builder" not in (source or {}):  # else the file's own model is built anew
        content["modules"] = kinds_of(model, drop)
    skip = {*views, *buffers, *(other for _, *others in ties for other in others)}
    state = model.state_dict(keep_vars=True)
    dense = {name: t for name, t in state.items() if name not in skip and not name.startswith(dropped)}
    return Plan(content, views, dense, {name: tensor for name, (_, tensor) in packed.items()})


def _source(
    model: nn.Module, source: Mapping[str, Any] | None, assets: Mapping[str, bytes] | None
) -> tuple[Any, dict[str, bytes]]:
    """(source, files): as given, over what the model itself says of how to rebuild it."""
    given = "builder" in (source or {})  # then the model is not asked how it is built
    describe: Describe | None = None if given else getattr(model, "qn_describe", None)
    own, files = describe() if describe else ({}, {})
    merged = {**own, **(source or {})}
    return merged or None, {**files, **(assets or {})}


def _entry(view: WeightView) -> dict[str, Any]:
    rule, shape = view.rule, view.weight.shape
    if rule.scheme == "product":
        pad = _pad(view)
        return codec.product_entry(
            shape, rule.block_size, view.n_centroids, view.padding_idx, pad is not None and bool(pad.any())
        )
    return codec.integer_entry(shape, rule.bits, rule.granularity, rule.group_size)


def _encode(view: WeightView, entry: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    weight, rule = view.weight.detach(), view.rule
    if rule.scheme == "product":
        return codec.encode_product(entry, view.codes, _codebook(view), dtype, _pad(view))
    return codec.encode_integer(
        entry, integer.quantize(weight, rule.bits, rule.granularity, rule.group_size, view.name)
    )


def _codebook(view: WeightView) -> Tensor:
    return product.codebook_of(view.weight.detach(), view.groups, view.rule.block_size).float()


def _pad(view: WeightView) -> Tensor | None:
    return None if view.padding_idx is None else view.weight.detach()[view.padding_idx]
