"""What a model answers on labelled sentences, a small file or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq_qn.commands.common import bpe_options, hub
from fairseq_qn.commands.data import Prepared
from fairseq_qn.commands.scores import spearman
from fairseq_qn.interop.tsv import read_tsv, values


@dataclass(frozen=True)
class Score:
    """measure: `accuracy` in percent, or `spearman`, Spearman's correlation times 100."""

    measure: str
    value: float
    rows: int


def score(path: Path, tsv: str | Path, data: Prepared, work: Path) -> Score:
    """Ask the model at `path` all rows of `tsv`, which are of the data that it was trained on."""
    rows = read_tsv(tsv)
    interface = _interface(path, data, work)
    logits = interface.logits([interface.encode_cut(*row.sentences)[0] for row in rows], data.head)
    if data.labels is None:
        wanted = values(rows, tsv)
        return Score("spearman", 100 * (spearman(logits[:, 0].tolist(), wanted) or 0.0), len(rows))
    wanted = torch.tensor([data.labels.index(row.label) for row in rows])
    return Score("accuracy", 100 * float((logits.argmax(1) == wanted).double().mean()), len(rows))


def _interface(path: Path, data: Prepared, work: Path) -> Any:
    ours = hub()
    if ours.is_small(path):
        return ours.load_interface(path)
    from fairseq_qn.models import starting

    model, _, task = ours.load_checkpoint(path, str(work / "data"))
    bpe = starting.bpe_of(data.bpe, [Path(file) for file in data.bpe_files], bpe_options(data.bpe_options))
    interface = model.qn_interface.of(model, task, {"bpe": None}).eval()
    interface.bpe = bpe.build()
    return interface
