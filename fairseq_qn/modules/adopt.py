"""Fit a state dict to the views of a model, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import MismatchError
from fairseq_qn.modules.view import FROZEN, WeightView


def adopt(state: dict[str, Any], views: Iterable[WeightView]) -> None:
    """Change `state` in place so that it loads strictly into the module that carries `views`.

    A layer that is not frozen in `state` needs no codes: those that are missing, of another recipe, or of a layer that has no
    view here, give way to the model's own. A frozen layer has to fit; MismatchError says which does not.
    """
    own = {stem: view for view in views for stem in _stems(view)}
    for phase_key in [key for key in state if _is_phase(state, key) and key[:-5] not in own]:
        if int(state[phase_key]) == FROZEN:
            raise MismatchError(
                f"{_dense_key(phase_key[:-5])}: frozen in the checkpoint, but the recipe gives it no rule; "
                "use the recipe of the checkpoint"
            )
        state.pop(phase_key)
        state.pop(f"{phase_key[:-5]}codes", None)
    for stem, view in own.items():
        wanted = {f"{stem}{name[len(view.prefix) :]}": view.home._buffers[name] for name in view.buffer_names}
        problem = _problem(state, stem, view, wanted)
        if problem is None:
            continue
        if f"{stem}phase" in state and int(state[f"{stem}phase"]) == FROZEN:
            raise MismatchError(
                f"{view.name}: frozen in the checkpoint, but {problem}; use the recipe of the checkpoint"
            )
        state.update({key: buffer.clone() for key, buffer in wanted.items()})
        state.pop(f"{stem}codes", None) if f"{stem}codes" not in wanted else None


def _problem(state: dict[str, Any], stem: str, view: WeightView, wanted: dict[str, Tensor]) -> str | None:
    """Why the state's buffers do not fit this view, or None."""
    if not all(key in state for key in wanted):
        return "its codes are missing"
    codes, key = state.get(f"{stem}codes"), f"{stem}codes"
    if key not in wanted:
        return None if codes is None else "it is quantised by another scheme"
    if codes.shape != wanted[key].shape or codes.dtype != wanted[key].dtype:
        return f"expected {wanted[key].dtype} codes {list(wanted[key].shape)}, found {codes.dtype} {list(codes.shape)}"
    largest = int(codes.max()) if codes.numel() else 0
    return None if largest < view.n_centroids else f"expected codes below {view.n_centroids}, found {largest}"


def _stems(view: WeightView) -> list[str]:
    """The keys of a view's buffers up to `phase` or `codes`."""
    return [key[: -len(view.attribute)] + view.prefix for key in view.keys]


def _is_phase(state: dict[str, Any], key: str) -> bool:
    """Whether a key is a view's, and not of a module that has a phase of its own."""
    named = key.endswith("phase") and _dense_key(key[:-5]) in state
    return named and state[key].dtype == torch.uint8 and state[key].dim() == 0


def _dense_key(stem: str) -> str:
    """The key of the Parameter that a stem's buffers belong to: `a.b.` -> `a.b.weight`, `a.b.table_` -> `a.b.table`."""
    return stem + "weight" if stem == "" or stem.endswith(".") else stem[:-1]
