"""A digest of a view's phase and codes, in a buffer beside them, so that the mean of two checkpoints is not
taken for one.

Codes and phases are names, and a mean of names is another: fairseq sums uint8 codes until they overflow, and
torch's AveragedModel(use_buffers=True) rounds them. `digest`, int64 [5], holds two words of sha256(phase,
codes), and how the codes were learned: (block_size, n_centroids, 0) or (bits, granularity, group_size). It
is zero in phase FLOAT, whose codes mean nothing. Words have 24 bits, so that means of equal digests are
exact in fp32 and in sums of int64: where averaged codes are right, since each stayed the same, so is their
digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import MismatchError, ViewError
from fairseq_qn.recipe import GRANULARITIES

SIZE = 5
_AVERAGED = (
    "its phase and codes are not those of its digest: codes cannot be averaged; load a single checkpoint"
)


def sign(view: Any) -> None:
    """Let a view's digest be that of its present phase and codes."""
    phase, codes, digest = buffers_of(view)
    digest.copy_(torch.tensor(_digest(int(phase), codes, _how(view))))


def check(view: Any) -> None:
    """Raise ViewError unless the phase and codes of a view are those that its digest was made of."""
    with torch._C._DisableFuncTorch():  # the transforms of torch.func would wrap what is read here
        reason = problem(view, *buffers_of(view))
    if reason:
        raise ViewError(f"{view.name}: {reason}")


def complete(view: Any, state: MutableMapping[str, Any], stem: str) -> None:
    """Check a view's buffers in a state dict, and give one of before there were digests its digest. Raises
    MismatchError.
    """
    phase, codes = state.get(f"{stem}phase"), state.get(f"{stem}codes")
    if phase is None or (view.rule.scheme == "product") != (codes is not None):
        return  # of another recipe: whether that fits is for torch, or adopt, to say
    if reason := problem(view, phase, codes, state.get(f"{stem}digest")):
        raise MismatchError(f"{view.name}: {reason}")
    if f"{stem}digest" not in state:
        state[f"{stem}digest"] = torch.tensor(_digest(int(phase), codes, _how(view)), device=phase.device)


def problem(view: Any, phase: Tensor, codes: Tensor | None, digest: Tensor | None) -> str | None:
    """Why these buffers are not what this view froze or learned, or None."""
    if reason := broken(phase, codes, digest):
        return reason
    if (
        int(phase)
        and codes is not None
        and codes.numel()
        and not 0 <= int(codes.min()) <= int(codes.max()) < view.n_centroids
    ):
        return f"expected codes below {view.n_centroids}, found {int(codes.min())} to {int(codes.max())}"
    if int(phase) and digest is not None and digest[2:].tolist() != _how(view):
        names = "block_size, n_centroids" if codes is not None else "bits, granularity, group_size"
        return f"quantised otherwise: expected {names} {_how(view)}, found {digest[2:].tolist()}"
    return None


def broken(phase: Tensor, codes: Tensor | None, digest: Tensor | None) -> str | None:
    """Why these buffers cannot be of one view at one time, whatever its recipe, or None."""
    if any(not isinstance(found, Tensor) for found in (phase, codes, digest) if found is not None):
        return "expected tensors as phase, codes and digest; the checkpoint is damaged"
    if phase.dim() or phase.is_floating_point() or int(phase) not in (0, 1, 2):
        found = phase.tolist() if phase.numel() == 1 else list(phase.shape)
        return f"expected a phase of 0, 1 or 2, found {found}"
    if codes is not None and codes.dtype not in (torch.uint8, torch.int32):
        return f"expected codes of uint8 or int32, found {codes.dtype}; the checkpoint is damaged"
    if digest is None:
        return None
    if digest.dtype != torch.int64 or digest.shape != (SIZE,):
        found = f"{digest.dtype} {list(digest.shape)}"
        return f"expected a digest int64 [{SIZE}], found {found}; load another checkpoint"
    words = digest.tolist()
    return None if words == _digest(int(phase), codes, words[2:]) else _AVERAGED


def buffers_of(view: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    """(phase, codes or None, digest)."""
    buffers = view.home._buffers
    return (
        buffers[f"{view.prefix}phase"],
        buffers.get(f"{view.prefix}codes"),
        buffers[f"{view.prefix}digest"],
    )


def _digest(phase: int, codes: Tensor | None, how: list[int]) -> list[int]:
    if not phase:
        return [0] * SIZE
    made = hashlib.sha256(bytes([phase]))
    if codes is not None:
        made.update(codes.detach().cpu().contiguous().numpy())
    return [int.from_bytes(made.digest()[:3], "big"), int.from_bytes(made.digest()[3:6], "big"), *how]


def _how(view: Any) -> list[int]:
    rule = view.rule
    if rule.scheme == "product":
        return [rule.block_size, view.n_centroids, 0]
    return [
        rule.bits,
        GRANULARITIES.index(rule.granularity),
        rule.group_size if rule.granularity == "group" else 0,
    ]
