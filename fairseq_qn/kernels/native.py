"""The compiled kernels, where installation could build them, and the threads they run on."""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

_TYPES = {"P": ctypes.c_void_p, "i": ctypes.c_int32, "q": ctypes.c_int64, "d": ctypes.c_double}


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    spec = importlib.util.find_spec("fairseq_qn.kernels._native")
    if spec is None or not spec.origin:
        return None
    try:
        return ctypes.CDLL(spec.origin)
    except OSError:  # built for another machine
        return None


@cache
def function(name: str, arguments: str, result: str = "") -> Any:
    """A kernel by its name in C; None without the library. The types of its arguments and result are letters
    of the struct module: P a pointer, i int32, q int64, d double; `threads()` is "Pi".
    """
    found = getattr(library(), name, None)
    if found is not None:
        found.argtypes, found.restype = [_TYPES[letter] for letter in arguments], _TYPES.get(result)
    return found


@cache
def _fork() -> int | None:
    """Address of the OpenMP runtime's GOMP_parallel that torch has loaded, or None."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value
    except (AttributeError, OSError, TypeError):  # no OpenMP, or Windows
        return None


def threads() -> tuple[int | None, int]:
    """What a kernel runs on: torch's OpenMP pool, and as many of its threads as torch uses."""
    return _fork(), torch.get_num_threads()


def watched() -> bool:
    """Whether torch records or transforms what is computed now (trace, compile, export, torch.func,
    forward-mode gradients, a dispatch mode): it would not see what a kernel writes through a pointer.
    """
    return (
        torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )  # fmt: skip


_LOCAL = threading.local()


def scratch(size: int) -> Tensor:
    """fp32 [size] to work in until the next call from this thread. Kept: fresh pages cost more than many a
    kernel.
    """
    kept = getattr(_LOCAL, "buffer", None)
    if kept is None or len(kept) < size:
        with torch.inference_mode(False):
            kept = _LOCAL.buffer = torch.empty(size)
    return kept[:size]
