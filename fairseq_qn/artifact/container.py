"""One safetensors file: written atomically, the same bytes for the same input, and read strictly.

The file is a header (see `header`) and the bytes of the tensors, the widest dtype first and then by name,
with no gaps. Nothing in it is executed, and no tensor is handed out before its digest has been checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from io import BufferedReader
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.artifact import header
from fairseq_qn.artifact.header import PathLike, Spec, bad
from fairseq_qn.artifact.replacing import replacing
from fairseq_qn.errors import EncodeError, short

if TYPE_CHECKING:
    from torch import Tensor

_READ_CHUNK = 1 << 20  # bytes; hashed while they are still in the cache


def spec_of(dtype: torch.dtype, shape: Sequence[int]) -> Spec:
    """What the header says of a tensor.

    >>> spec_of(torch.float16, torch.Size([3, 4]))
    ('float16', (3, 4))
    """
    return str(dtype).removeprefix("torch."), tuple(shape)


def predict_bytes(shapes: Mapping[str, Spec], manifest: Mapping[str, Any]) -> int:
    """Exact size in bytes of the file that `write` would make of tensors with these (dtype, shape).

    Raises: EncodeError as `write` does.
    """
    specs = header.ordered(shapes)
    return len(header.encode(specs, manifest, {})) + sum(map(header.nbytes, specs.values()))


def write(path: PathLike, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]) -> int:
    """Write one file, replacing what is at `path` in one step, and return its size on disk in bytes.

    `manifest` is plain JSON data; a table `tensors: {name: {dtype, shape, sha256}}` is added to it. Tensors
    may be on any device, strided in any way, and may share storage; each is written in full. A kill leaves
    the old file or the new one, and perhaps a `.*.qn-tmp` beside it, which the next write to `path` removes.

    Raises: EncodeError for tensors or a manifest that the file cannot hold; OSError if writing fails;
    nothing is left.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise EncodeError(
                f"tensor {name!r}: expected a dense tensor with data, found {short(tensor)}; convert it "
                "first"
            )
    specs = header.ordered({name: spec_of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    blank = header.encode(specs, manifest, {})
    digests = {}
    with replacing(path) as file:
        file.write(blank)
        for name in specs:
            raw = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            digests[name] = hashlib.sha256(raw).digest()
            file.write(raw)
        file.seek(0)
        file.write(header.encode(specs, manifest, digests))  # as long as `blank`
    return os.path.getsize(path)


def read_manifest(path: PathLike) -> dict[str, Any]:
    """The manifest, with its table of tensors. The header is verified; the tensors' bytes are neither read
    nor checked.

    Raises: FormatError for anything but a whole, undamaged header; OSError if there is no such file.
    """
    with _opened(path) as file:
        return header.decode(file, path)[0]


def read(path: PathLike) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, each in memory of its own, and the manifest. Takes about as much memory as the file is
    large.

    Raises: FormatError for a file that is not whole, undamaged and of this format; OSError if there is no
    such file.
    """
    with _opened(path) as file:
        manifest, specs = header.decode(file, path)
        table = manifest["tensors"]
        tensors = {
            name: _read_tensor(file, path, name, spec, table[name]["sha256"]) for name, spec in specs.items()
        }
    return tensors, manifest


def _read_tensor(file: BufferedReader, path: PathLike, name: str, spec: Spec, sha256: Any) -> Tensor:
    """The next tensor of the file, read once into its own memory and checked against its digest."""
    dtype, shape = getattr(torch, spec[0]), spec[1]
    raw = torch.empty(header.nbytes(spec), dtype=torch.uint8)
    view, digest = raw.numpy().data, hashlib.sha256()
    for start in range(0, len(view), _READ_CHUNK):
        chunk = view[start : start + _READ_CHUNK]
        if file.readinto(chunk) != len(chunk):
            raise bad(path, f"tensor {short(name)}", f"{len(view)} bytes", "the end of the file")
        digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise bad(
            path, f"tensor {short(name)}", f"sha256 {short(sha256)[:17]}...", f"{digest.hexdigest()[:16]}..."
        )
    # torch leaves undefined what such a bool means
    if dtype == torch.bool and raw.numel() and raw.max() > 1:
        raise bad(path, f"tensor {short(name)}", "bytes 0 and 1 for BOOL", str(raw.max().item()))
    return raw.view(dtype).reshape(shape)


def _opened(path: PathLike) -> BufferedReader:
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise bad(path, "kind", "a file", "a directory or device", "give the path of the file itself")
    return open(path, "rb")
