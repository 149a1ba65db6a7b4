"""A digest of a view's phase and codes, in a buffer beside them, so that the mean of two checkpoints is not
taken for one.

Codes and phases are names, and a mean of names is another: fairseq sums uint8 codes until they overflow, and
torch's AveragedModel(use_buffers=True) rounds them. `digest`, int64 [5], holds two words of sha256(phase,
codes), and how they were learned, up to three numbers of the scheme. It is zero in phase FLOAT, whose codes
mean nothing. Words have 24 bits, so that means of equal digests are exact in fp32 and in sums of int64:
where averaged codes are right, since each stayed the same, so is their digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import MismatchError, ViewError
from fairseq_qn.schemes import SCHEMES

Found = dict[str, Any]  # phase, a scheme's buffers, digest, those that are there
SIZE = 5
_AVERAGED = (
    "its phase and codes are not those of its digest: codes cannot be averaged; load a single checkpoint"
)


def sign(view: Any) -> None:
    """Let a view's digest be that of its present phase and codes."""
    found = buffers_of(view)
    found["digest"].copy_(torch.tensor(_digest(found, _how(view))))


def check(view: Any) -> None:
    """Raise ViewError unless the phase and codes of a view are those that its digest was made of."""
    with torch._C._DisableFuncTorch():  # the transforms of torch.func would wrap what is read here
        reason = problem(view, buffers_of(view))
    if reason:
        raise ViewError(f"{view.name}: {reason}")


def complete(view: Any, state: MutableMapping[str, Any], stem: str) -> None:
    """Check a view's buffers in a state dict, and give one of before there were digests its digest.

    Raises MismatchError.
    """
    found = found_in(state, stem)
    if found.keys() - {"digest"} != {"phase", *view.codes}:
        return  # of another recipe: whether that fits is for torch, or adopt, to say
    if reason := problem(view, found):
        raise MismatchError(f"{view.name}: {reason}")
    if "digest" not in found:
        words = _digest(found, _how(view))
        state[f"{stem}digest"] = torch.tensor(words, device=found["phase"].device)


def problem(view: Any, found: Found) -> str | None:
    """Why these buffers are not what this view froze or learned, or None."""
    if reason := broken(found):
        return reason
    if not int(found["phase"]):
        return None
    if reason := view.scheme.misfit(found, view):
        return reason
    how = _how(view)
    if "digest" in found and (other := found["digest"][2:].tolist()) != how:
        names = ", ".join(view.scheme.fingerprint(view))
        return f"quantised otherwise: expected {names} {how}, found {other}"
    return None


def broken(found: Found) -> str | None:
    """Why these buffers cannot be of one view at one time, whatever its recipe, or None."""
    if any(not isinstance(value, Tensor) for value in found.values()):
        return "expected tensors as phase, codes and digest; the checkpoint is damaged"
    phase = found["phase"]
    if phase.dim() or phase.is_floating_point() or int(phase) not in (0, 1, 2):
        value = phase.tolist() if phase.numel() == 1 else list(phase.shape)
        return f"expected a phase of 0, 1 or 2, found {value}"
    for name in found.keys() - {"phase", "digest"}:
        if found[name].dtype not in (torch.uint8, torch.int32):
            return f"expected {name} of uint8 or int32, found {found[name].dtype}; the checkpoint is damaged"
    digest = found.get("digest")
    if digest is None:
        return None
    if digest.dtype != torch.int64 or digest.shape != (SIZE,):
        shown = f"{digest.dtype} {list(digest.shape)}"
        return f"expected a digest int64 [{SIZE}], found {shown}; load another checkpoint"
    words = digest.tolist()
    return None if words == _digest(found, words[2:]) else _AVERAGED


def buffers_of(view: Any) -> Found:
    """A view's buffers, by name."""
    return {name: view.buffer(name) for name in ("phase", *view.codes, "digest")}


def found_in(state: Mapping[str, Any], stem: str) -> Found:
    """What a state dict holds under a stem of the buffers that any scheme keeps, by name."""
    kept = (name for scheme in SCHEMES.values() for name in scheme.buffer_names)
    names = dict.fromkeys(("phase", *kept, "digest"))
    return {name: state[stem + name] for name in names if stem + name in state}


def learned_in(state: Mapping[str, Any], stem: str) -> Found:
    """The same of what any scheme learns by gradients."""
    names = dict.fromkeys(name for scheme in SCHEMES.values() for name in scheme.parameter_names)
    return {name: state[stem + name] for name in names if stem + name in state}


def _digest(found: Found, how: list[int]) -> list[int]:
    phase = int(found["phase"])
    if not phase:
        return [0] * SIZE
    made = hashlib.sha256(bytes([phase]))
    for name in sorted(found.keys() - {"phase", "digest"}):
        made.update(found[name].detach().cpu().contiguous().numpy())
    return [int.from_bytes(made.digest()[:3], "big"), int.from_bytes(made.digest()[3:6], "big"), *how]


def _how(view: Any) -> list[int]:
    """How the scheme learns, in three numbers."""
    how = [*view.scheme.fingerprint(view).values()]
    return how + [0] * (SIZE - 2 - len(how))
