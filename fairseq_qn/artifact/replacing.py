"""Files written beside their name and moved over it: a kill leaves the old file or the new one.

What a killed writer left behind, `.<digest of the name>.<random>.qn-tmp`, is removed by the next write to
the same name. A live writer holds a lock on its own, so that several may write one name at a time, and the
last to finish wins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fairseq_qn.artifact.header import PathLike
from fairseq_qn.errors import UnsupportedError

_SUFFIX = ".qn-tmp"


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A new file, moved over `path` when the block ends well and removed when it does not. A link then
    points to it.

    Raises: OSError that says what to do; nothing is left.
    """
    target = Path(os.path.realpath(path))
    temporary = None
    try:
        if target.exists() and not target.is_file():  # a move would replace /dev/null itself
            raise OSError(errno.EINVAL, "it is a directory or device")
        _sweep(target)
        temporary, file = _locked(target)
        with file:
            yield file
            file.flush()
            # before the move: the name must never stand for bytes that a crash can still lose
            os.fsync(file.fileno())
            os.replace(temporary, target)  # while locked: nobody else may take it for a leftover
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            todo = "choose a file in a directory that exists, has room, and that you may write to"
            raise OSError(
                error.errno, f"cannot write {target}: {error.strerror or error}; {todo}"
            ) from error
        raise
    _sync_directory(target.parent)


def refuse_same(output: PathLike, *inputs: PathLike | None) -> None:
    """Raise UnsupportedError if `output` is one of the files that it is made from, by whichever path."""
    for source in inputs:
        if (
            source is not None
            and os.path.exists(output)
            and os.path.exists(source)
            and os.path.samefile(output, source)
        ):
            raise UnsupportedError(
                f"{output}: is the input {source} itself, which would be lost; write to another file"
            )


def _stem(target: Path) -> str:
    """What the temporary files of a name begin with: of a fixed length, since the name may be as long as
    names can be.
    """
    return f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}."


def _locked(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `target`, locked for as long as it is open."""
    while True:
        temporary = target.with_name(f"{_stem(target)}{secrets.token_hex(8)}{_SUFFIX}")
        file = open(temporary, "xb")
        with contextlib.suppress(OSError):  # a file system without locks: then nobody can sweep either
            fcntl.flock(file, fcntl.LOCK_EX)
        if temporary.exists():  # not swept before it was locked
            return temporary, file
        file.close()


def _sweep(target: Path) -> None:
    """Remove the temporary files of this name that no live process writes to."""
    with contextlib.suppress(OSError):  # the directory may be written but not listed, or is not there
        for entry in os.scandir(target.parent):
            if (
                entry.name.startswith(_stem(target))
                and entry.name.endswith(_SUFFIX)
                and entry.is_file(follow_symlinks=False)
            ):
                with contextlib.suppress(OSError), open(entry.path, "r+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: its writer lives
                    os.unlink(entry.path)


def _sync_directory(directory: Path) -> None:
    """Make the move last through a crash, on file systems that can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # a directory that may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
