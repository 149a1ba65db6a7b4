"""From a file on disk to the first answer, once, in this process: first_answer.py CONTENDER FILE prints a
line of JSON.

Imports come before the clock starts and before the memory is noted. Memory is the peak of what is resident,
above what the process held after its imports; pages of a mapped file that were touched count.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models.roberta import RobertaModel
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.models.undrawn import Undrawn

TOKENS = 32
HUB, LEAN, LEANEST = (
    "fairseq from_pretrained",
    "mapped torch.load, load_state_dict",
    "same, built and filled without copies",
)


def fairseq_hub(path: Path) -> nn.Module:
    """What fairseq's documentation says: from_pretrained of a folder."""
    return RobertaModel.from_pretrained(str(path.parent), path.name, bpe=None).model


def _mapped(path: Path) -> tuple[dict[str, Tensor], Any, Namespace]:
    """(state, configuration, task) with the tensors left on the disk until they are read."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    words = Dictionary.load(str(path.parent / "dict.txt"))
    words.add_symbol("<mask>")
    return state["model"], state["cfg"]["model"], Namespace(source_dictionary=words)


def lean(path: Path) -> nn.Module:
    """Plain torch, by hand: the checkpoint mapped, fairseq's model, load_state_dict."""
    state, config, task = _mapped(path)
    model = RobertaModel.build_model(config, task)
    model.load_state_dict(state)
    return model


def leanest(path: Path) -> nn.Module:
    """With our way to build: no weights are drawn, and the tensors of the mapped file become the model's."""
    state, config, task = _mapped(path)
    with torch.device("meta"), Undrawn():
        model = RobertaModel.build_model(config, task)
    nn.Module.load_state_dict(model, state, assign=True)
    return model


CONTENDERS: dict[str, Callable[[Path], nn.Module]] = {
    HUB: fairseq_hub,
    LEAN: lean,
    LEANEST: leanest,
    "packed": lambda path: hub.load_interface(path, "packed").model,
    "dense": lambda path: hub.load_interface(path, "dense").model,
    "dense bf16": lambda path: fairseq_qn.load(path, "dense", dtype=torch.bfloat16),
}


def memory(what: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    found = re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def main() -> None:
    """Load, answer, and print seconds and bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--answer", choices=["features", "logits"], default="features")
    args = parser.parse_args()
    tokens = torch.arange(100, 100 + TOKENS).reshape(1, -1)
    tokens[0, 0], tokens[0, -1] = 0, 2
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before, began = memory("VmRSS"), time.perf_counter()
    model = CONTENDERS[args.contender](args.file).eval()
    loaded = time.perf_counter()
    with torch.inference_mode():
        answer, _ = model(tokens, features_only=args.answer == "features")
    done = time.perf_counter()
    peak = memory("VmHWM")
    print(json.dumps({
        "seconds": done - began, "loading": loaded - began, "answering": done - loaded,
        "above imports": peak - before, "peak": peak, "norm": float(answer.float().norm()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
