"""fairseq writes a checkpoint beside its name and renames it, but then copies it over checkpoint_last.pt and
_best.pt.

A kill within the copy leaves one of these torn, and the same command, which resumes from checkpoint_last.pt,
fails for good. Here copies are written beside and renamed as well; what a killed one left is removed by the
next copy to that name.
"""

from __future__ import annotations

import shutil

from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from fairseq_qn.artifact.replacing import replacing


class _PathManager(PathManager):
    """fairseq's own, for checkpoint_utils alone, but for copies on local disks."""

    @staticmethod
    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> bool:
        """Whether the copy was made. The old file or the whole new one is there at each moment."""
        if any(map(PathManager.path_requires_pathmanager, (src_path, dst_path))):
            return PathManager.copy(src_path, dst_path, overwrite)
        with open(src_path, "rb") as source, replacing(dst_path) as target:
            shutil.copyfileobj(source, target, 1 << 20)
        return True


def allow() -> None:
    """Let fairseq.checkpoint_utils, which looks the name up at each save, copy whole files."""
    checkpoint_utils.PathManager = _PathManager
