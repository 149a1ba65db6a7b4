"""What of fairseq and torch is mended where it stands, so that fairseq trains, resumes and answers."""

from __future__ import annotations

import shutil
from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.data import language_pair_dataset, token_block_dataset
from fairseq.file_io import PathManager

from fairseq_qn.artifact.replacing import replacing


def apply() -> None:
    """All of it."""
    checkpoint_utils.PathManager = _PathManager  # looked up at each save
    if not hasattr(np, "compat"):
        for module in (language_pair_dataset, token_block_dataset):
            module.np = _Numpy("numpy")
    _allow_checkpoint_classes()


class _PathManager(PathManager):
    """fairseq's own, for checkpoint_utils alone, but for copies on local disks.

    fairseq writes a checkpoint beside its name and renames it, but then copies it over checkpoint_last.pt
    and _best.pt. A kill within the copy leaves one of these torn, and the same command, which resumes from
    checkpoint_last.pt, fails for good. Here copies are written beside and renamed as well; what a killed one
    left is removed by the next copy to that name.
    """

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Whether the copy was made. The old file or the whole new one is there at each moment."""
        if any(map(PathManager.path_requires_pathmanager, (src_path, dst_path))):
            return PathManager.copy(src_path, dst_path, overwrite)
        with open(src_path, "rb") as source, replacing(dst_path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return True


class _Numpy(ModuleType):
    """numpy 2 with its former `compat`, without which fairseq's language models cannot answer a sentence;
    for the two modules that ask for it.
    """

    compat = SimpleNamespace(long=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def _allow_checkpoint_classes() -> None:
    """Let torch's safe loading restore fairseq's checkpoints, by allowing just what they hold:
    the options, a Namespace; meters and scores, numpy scalars. None runs code.
    """
    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is None:  # torch < 2.4 has no such list; load_checkpoint says so
        return
    # numpy's own constructor of scalars, wherever this numpy keeps it
    scalar = np.float64(0).__reduce__()[0]
    kinds = (type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_))
    add([Namespace, scalar, np.dtype, *kinds])
