"""Fit a state dict to the views of a model, before it is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import MismatchError
from fairseq_qn.modules.digest import Found, broken, buffers_of, complete, found_in, learned_in, problem
from fairseq_qn.modules.view import FROZEN, WeightView


def adopt(state: dict[str, Any], views: Iterable[WeightView]) -> None:
    """Change `state` in place so that it loads strictly into the module that carries `views`.

    A layer that is not frozen in `state` needs no codes: those that are missing, of another recipe, or of a
    layer that has no view here, give way to the model's own, and so does what a scheme learns by gradients.
    A frozen layer has to fit; MismatchError says which does not, and refuses codes that are not those of
    their digest, as after averaging. A state of before there were digests gets them.
    """
    own = {_stem(key): view for view in views for key in view.keys}
    for stem in [key[:-5] for key in state if key[:-5] not in own and _is_phase(state, key)]:
        name, found = f"{stem}weight", found_in(state, stem)
        if reason := broken(found):
            raise MismatchError(f"{name}: {reason}")
        if int(found["phase"]) == FROZEN:
            raise MismatchError(
                f"{name}: frozen in the checkpoint, but the recipe gives it no rule; use the recipe of the "
                "checkpoint"
            )
        _drop(state, stem, found | learned_in(state, stem))
    for stem, view in own.items():
        found, learned = found_in(state, stem), learned_in(state, stem)
        if "phase" in found and (reason := broken(found)):
            raise MismatchError(f"{view.name}: {reason}")
        reason = _misfit(view, found, learned)
        if reason is None:
            complete(view, state, stem)
            continue
        if "phase" in found and int(found["phase"]) == FROZEN:
            raise MismatchError(
                f"{view.name}: frozen in the checkpoint, but {reason}; use the recipe of the checkpoint"
            )
        _drop(state, stem, found | learned)
        kept = buffers_of(view) | {name: view.parameter(name).detach() for name in view.learned}
        state.update({stem + name: tensor.clone() for name, tensor in kept.items()})


def _drop(state: dict[str, Any], stem: str, found: Found) -> None:
    for name in found:
        del state[stem + name]


def _misfit(view: WeightView, found: Found, learned: Found) -> str | None:
    """Why what a state holds beside the weight does not fit this view, or None."""
    names = ("phase", *view.codes, *view.learned)
    if missing := [name for name in names if name not in found | learned]:
        return f"its {missing[-1]} are missing"
    if (found.keys() | learned.keys()) - {*names, "digest"}:
        return "it is quantised by another scheme"
    for name in view.codes:
        wanted, other = (f"{t.dtype} {name} {list(t.shape)}" for t in (view.buffer(name), found[name]))
        if wanted != other:
            return f"expected {wanted}, found {other}"
    for name in view.learned:
        shapes = [[*getattr(t, "shape", ())] for t in (view.parameter(name), learned[name])]
        if shapes[0] != shapes[1]:
            return f"expected {name} {shapes[0]}, found {shapes[1]}"
    return problem(view, found)


def _is_phase(state: dict[str, Any], key: str) -> bool:
    """Whether a key is a view's, and not of a module that has a phase of its own."""
    named = key.endswith("phase") and f"{key[:-5]}weight" in state
    return (
        named
        and isinstance(state[key], Tensor)
        and state[key].dtype == torch.uint8
        and state[key].dim() == 0
    )


def _stem(key: str) -> str:
    """`a.b.weight` -> `a.b.`, with which the keys of its buffers begin."""
    return key.removesuffix("weight")
