"""Fit a state dict to the views of a model, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import MismatchError
from fairseq_qn.modules.digest import broken, complete, problem
from fairseq_qn.modules.view import FROZEN, WeightView


def adopt(state: dict[str, Any], views: Iterable[WeightView]) -> None:
    """Change `state` in place so that it loads strictly into the module that carries `views`.

    A layer that is not frozen in `state` needs no codes: those that are missing, of another recipe, or of a
    layer that has no view here, give way to the model's own. A frozen layer has to fit; MismatchError says
    which does not, and refuses codes that are not those of their digest, as after averaging. A state of
    before there were digests gets them.
    """
    own = {stem: view for view in views for stem in _stems(view)}
    for stem in [key[:-5] for key in state if key[:-5] not in own and _is_phase(state, key)]:
        name, found = _dense_key(stem), _found(state, stem)
        if reason := broken(*found):
            raise MismatchError(f"{name}: {reason}")
        if int(found[0]) == FROZEN:
            raise MismatchError(
                f"{name}: frozen in the checkpoint, but the recipe gives it no rule; use the recipe of the "
                "checkpoint"
            )
        _drop(state, stem)
    for stem, view in own.items():
        wanted = {
            f"{stem}{name[len(view.prefix) :]}": view.home._buffers[name] for name in view.buffer_names
        }
        found = _found(state, stem)
        if found[0] is not None and (reason := broken(*found)):
            raise MismatchError(f"{view.name}: {reason}")
        reason = _misfit(view, wanted.get(f"{stem}codes"), *found)
        if reason is None:
            complete(view, state, stem)
            continue
        if found[0] is not None and int(found[0]) == FROZEN:
            raise MismatchError(
                f"{view.name}: frozen in the checkpoint, but {reason}; use the recipe of the checkpoint"
            )
        _drop(state, stem)
        state.update({key: buffer.clone() for key, buffer in wanted.items()})


def _found(state: dict[str, Any], stem: str) -> tuple[Any, Any, Any]:
    """The state's (phase, codes, digest), each None where it is not there."""
    return state.get(f"{stem}phase"), state.get(f"{stem}codes"), state.get(f"{stem}digest")


def _drop(state: dict[str, Any], stem: str) -> None:
    for name in ("phase", "codes", "digest"):
        state.pop(f"{stem}{name}", None)


def _misfit(view: WeightView, wanted: Tensor | None, phase: Any, codes: Any, digest: Any) -> str | None:
    """Why the state's buffers do not fit this view, whose own codes are `wanted`, or None."""
    if phase is None or (codes is None and wanted is not None):
        return "its codes are missing"
    if wanted is None and codes is not None:
        return "it is quantised by another scheme"
    if wanted is not None and (codes.shape != wanted.shape or codes.dtype != wanted.dtype):
        return f"expected {wanted.dtype} codes {list(wanted.shape)}, found {codes.dtype} {list(codes.shape)}"
    return problem(view, phase, codes, digest)


def _stems(view: WeightView) -> list[str]:
    """The keys of a view's buffers up to `phase` or `codes`."""
    return [key[: -len(view.attribute)] + view.prefix for key in view.keys]


def _is_phase(state: dict[str, Any], key: str) -> bool:
    """Whether a key is a view's, and not of a module that has a phase of its own."""
    named = key.endswith("phase") and _dense_key(key[:-5]) in state
    return (
        named
        and isinstance(state[key], Tensor)
        and state[key].dtype == torch.uint8
        and state[key].dim() == 0
    )


def _dense_key(stem: str) -> str:
    """The key of the Parameter that a stem's buffers belong to: `a.b.` -> `a.b.weight`, `a.b.table_` ->
    `a.b.table`.
    """
    return stem + "weight" if stem == "" or stem.endswith(".") else stem[:-1]
