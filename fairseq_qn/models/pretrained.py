"""Loading by name: a model, or the interface that answers, from a small file or a fairseq checkpoint.

The small file needs no data directory and no pickle. Importing this teaches `load` to build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq_qn import api
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.models.bpe import Guarded, checked_text, unpacked
from fairseq_qn.models.checkpoint import load_checkpoint, text_of
from fairseq_qn.models.describe import build_model, build_task, checked, fairseq_refuses

SUFFIX = ".qn.safetensors"


def is_small(path: str | Path) -> bool:
    """Whether a path names a small file, or a folder with one in it."""
    path = Path(path)
    return path.name.endswith(SUFFIX) or (path.is_dir() and any(path.glob(f"*{SUFFIX}")))


def find_file(path: str | Path) -> Path:
    """The small file that a path names: itself, or the only one in a folder. Raises FormatError."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise FormatError(
            f"{path}: expected one *{SUFFIX} file in the folder, found {len(found)}; name the file"
        )
    return found[0]


def load_any(path: str | Path, data: str | None = None) -> nn.Module:
    """A model from a small file or a fairseq checkpoint; data: where the latter's dictionaries are now."""
    return api.load(find_file(path)) if is_small(path) else load_checkpoint(path, data)[0]


def load_interface(
    path: str | Path, mode: str = "dense", dtype: torch.dtype | None = None, large: bool = False
) -> Any:
    """The interface that the file's model supplies, loaded as `load` does: QNRobertaHub, or fairseq's
    generator interface.
    """
    file = api.read(find_file(path))
    source = file.manifest["source"] or {}
    if source.get("builder") != "fairseq":
        raise UnsupportedError(
            f"{path}: not a model of fairseq's; load it with fairseq_qn.load(path, model=...)"
        )
    with file.named():
        text, source = checked_text(source, file.assets), checked(source)
        task = build_task(source, file.assets)  # once: a large dictionary takes as long as the whole model
        model = build_model(source, task, file.names)
    model = file.load(mode, model, dtype=dtype, large=large)
    with file.named(), unpacked(text, file.assets) as text, fairseq_refuses("source.bpe"):
        interface = model.qn_interface.of(model, task, text).eval()
    if interface.bpe is not None:
        interface.bpe = Guarded(interface.bpe, file.path)
    return interface


def checkpoint_interface(
    path: str | Path, data: str | None = None, bpe: tuple[Mapping[str, Any], Mapping[str, bytes]] = ({}, {})
) -> Any:
    """The same of a fairseq checkpoint. data: where its dictionaries are now; bpe: what carry_bpe gives,
    by default the checkpoint's own.
    """
    source, assets = bpe if bpe[0] else text_of(path)
    model, _, task = load_checkpoint(path, data)
    with unpacked(checked_text(source, assets), assets) as text, fairseq_refuses("--bpe"):
        return model.qn_interface.of(model, task, text).eval()


def _build(source: dict[str, Any], assets: Mapping[str, bytes], names: Sequence[str]) -> nn.Module:
    checked_text(source, assets)
    source = checked(source)
    return build_model(source, build_task(source, assets), names)


api.register_builder("fairseq", _build)
