"""A saved file, ways to write one that claims something else under the right digests, and what a refusal is.

The format by its bytes, written down a second time, is in artifact/by_hand.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.artifact import container
from fairseq_qn.errors import FormatError, QNError

Tensors = dict[str, Tensor]
Manifest = dict[str, Any]
READERS = (container.read, container.read_manifest)


def save_a_file(folder: Path) -> Path:
    """A file with product and integer layers, K = 200, a tie, a dropped module and a file that travels
    along.
    """
    model = Net()
    model.extra = nn.Linear(3, 3)
    data = recipe("embed", "conv", "mix", k=200, block_size=1)
    for name in (r"block\.fc1", r"block\.fc2"):
        data["rules"].append(
            {"layers": name, "scheme": "integer", "bits": 3, "granularity": "group", "group_size": 8}
        )
    fairseq_qn.apply(model, data)
    fairseq_qn.freeze(model)
    path = folder / "m.qn.safetensors"
    fairseq_qn.save(
        model, path, drop=["extra"], assets={"words.txt": b"words " * 100}, source={"config": {"d": [8]}}
    )
    manifest = fairseq_qn.inspect(path)
    assert (
        manifest["layers"]["conv.weight"]["n_centroids"] == 108
        and manifest["layers"]["embed.weight"]["n_centroids"] == 152
    )
    return path


def fresh() -> Net:
    model = Net(seed=4)
    model.extra = nn.Linear(3, 3)
    return model


def parts(path: Path) -> tuple[Tensors, Manifest]:
    tensors, manifest = container.read(path)
    return tensors, {key: value for key, value in manifest.items() if key != "tensors"}


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def one_line(error: BaseException) -> str:
    """The message of an error that a user reads."""
    message = str(error)
    assert message and "\n" not in message and len(message) <= 300, message
    return message


def assert_refused(path: Path, match: str = "expected", readers: tuple[Callable, ...] = READERS) -> None:
    """What, where, expected and found."""
    for reader in readers:
        with pytest.raises(FormatError, match=match) as error:
            reader(path)
        message = one_line(error.value)
        assert message.startswith(f"{path}: ") and "expected" in message and "found" in message


def refusal(path: Path, expected: type[QNError] = FormatError, model: nn.Module | None = None) -> str:
    """The message with which both modes of load refuse a file, without touching the model."""
    model = fresh() if model is None else model
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    for mode in ("dense", "packed"):
        with pytest.raises(expected) as error:
            fairseq_qn.load(path, mode, model)
        message = one_line(error.value)
        assert [type(m) for m in model.modules()] == modules
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if expected is FormatError:
        assert str(path) in message
    return message


def forge(saved: Path, target: Path, edit: Callable[[Tensors, Manifest], object]) -> Path:
    tensors, manifest = parts(saved)
    edit(tensors, manifest)
    return write(target, tensors, manifest)


def write(target: Path, tensors: Tensors, manifest: Manifest) -> Path:
    """Without waiting for the disk: there are thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        container.write(target, tensors, manifest)
    return target
