"""What a model answers on labelled sentences, a small file or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fairseq_qn.commands.common import hub
from fairseq_qn.commands.data import Prepared
from fairseq_qn.commands.scores import spearman
from fairseq_qn.interop.tsv import read_tsv, values

BATCH = 64


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
    pad = interface.task.source_dictionary.pad()
    tokens = [_tokens(interface, row.sentences) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(tokens[i]))
    answers: dict[int, Any] = {}
    with torch.inference_mode():
        for i in range(0, len(order), BATCH):
            some = order[i : i + BATCH]
            batch = torch.nn.utils.rnn.pad_sequence([tokens[j] for j in some], True, pad)
            logits = interface.predict(data.head, batch, return_logits=True)
            answers |= zip(some, logits[:, 0] if data.labels is None else logits.argmax(1), strict=True)
    got = torch.stack([answers[i] for i in range(len(rows))])
    if data.labels is None:
        wanted = values(rows, tsv)
        return Score("spearman", 100 * (spearman(got.tolist(), wanted) or 0.0), len(rows))
    wanted = torch.tensor([data.labels.index(row.label) for row in rows])
    return Score("accuracy", 100 * float((got == wanted).double().mean()), len(rows))


def _interface(path: Path, data: Prepared, work: Path) -> Any:
    ours = hub()
    if ours.is_small(path):
        return ours.load_interface(path)
    from fairseq_qn.models import starting

    model, _, task = ours.load_checkpoint(path, str(work / "data"))
    options = dict(option.split("=", 1) for option in data.bpe_options)
    bpe = starting.bpe_of(data.bpe, [Path(file) for file in data.bpe_files], options)
    interface = model.qn_interface.of(model, task, {"bpe": None}).eval()
    interface.bpe = bpe.build()
    return interface


def _tokens(interface: Any, sentences: tuple[str, ...]) -> torch.Tensor:
    tokens = interface.encode(*sentences)
    longest = interface.model.max_positions()
    return tokens if len(tokens) <= longest else torch.cat([tokens[: longest - 1], tokens[-1:]])
