"""`fairseq-qn evaluate`."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_qn.commands.common import hub, interface_of
from fairseq_qn.commands.scores import accuracy, macro_f1, pearson, spearman
from fairseq_qn.errors import DataError, UnsupportedError
from fairseq_qn.interop.tsv import Row, lines_of, read_tsv, values
from fairseq_qn.report import table

TIMED = 100  # sentences that are timed one by one
_HEADS = {
    "accuracy": "accuracy %", "macro_f1": "macro F1 %", "pearson": "Pearson", "spearman": "Spearman",
    "agreement": "agreement", "bytes": "bytes", "ms_per_sentence": "ms, one by one",
    "ms_per_sentence_batched": "ms, in batches",
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Score the answers to labelled sentences: of a file, and of another beside it."""
    rows = read_tsv(args.data)
    interface = _interface(args.file, args, None)
    result, found = _measured(args.file, interface, rows, args)
    other: dict[str, Any] = {}
    if args.against:
        other, theirs = _measured(args.against, _interface(args.against, args, interface), rows, args)
        if type(found[0]) is not type(theirs[0]):
            raise UnsupportedError(f"{args.against}: expected a head of the same kind, classes or a number")
        result["agreement"] = pearson(found, theirs) if "pearson" in other else accuracy(found, theirs)
    keys = ("accuracy", "macro_f1", "pearson", "spearman", "agreement")
    result = {key: result.get(key) for key in keys} | result
    if args.json:
        print(json.dumps(result | ({"against": other} if other else {})))
        return
    print(f"{args.data}: {result['sentences']:,} sentences, {result['cut']:,} of them cut")
    shown = [key for key in _HEADS if result.get(key) is not None]
    lines = [
        (data["file"], *(_shown(key, data.get(key)) for key in shown)) for data in (result, other) if data
    ]
    print(table(lines, ("", *(_HEADS[key] for key in shown))))


def _interface(path: Path, args: argparse.Namespace, beside: Any) -> Any:
    """What answers, with a BPE: of the file, of the arguments, or of the file that it is compared with."""
    interface = interface_of(path, args)
    if not hasattr(interface, "classify"):
        raise UnsupportedError(f"{path}: expected a model with a classification head; it generates text")
    if interface.bpe is None and beside is not None:
        interface.bpe = beside.bpe
    if interface.bpe is None and path.suffix == ".pt":
        raise UnsupportedError(
            f"{path}: this checkpoint carries no BPE; give it with --bpe NAME --bpe-files FILE"
        )
    return interface


def _measured(
    path: Path, interface: Any, rows: Sequence[Row], args: argparse.Namespace
) -> tuple[dict[str, Any], list[Any]]:
    """(scores by name, what was answered: labels or numbers)."""
    head = args.head
    regression = interface.is_regression(head)
    classes = [] if regression else interface.labels_of(head)
    expected: list[Any] = values(rows, args.data) if regression else _known(rows, classes, args.data)
    tokens, cut = [], 0
    began = time.perf_counter()
    for row in rows:
        ids, was_cut = interface.encode_cut(*row.sentences)
        if was_cut and args.no_cut:
            raise DataError(
                f"{args.data}: line {row.line}: longer than the model's positions; leave out --no-cut"
            )
        tokens.append(ids)
        cut += was_cut
    encoding = time.perf_counter() - began
    with _bar(path, len(rows)) as bar:
        stamps = [(time.perf_counter(), 0)]
        logits = interface.logits(
            tokens, head, args.batch, lambda n: (bar.update(n), stamps.append((time.perf_counter(), n)))
        )
    each = [(b - a) / n for (a, _), (b, n) in zip(stamps, stamps[1:])]
    if not bool(logits.isfinite().all()):
        raise UnsupportedError(f"{path}: answers with NaN or Inf; its weights are not usable")
    found = logits[:, 0].tolist() if regression else [classes[i] for i in logits.argmax(-1).tolist()]
    scores = (
        (("pearson", pearson), ("spearman", spearman))
        if regression
        else (("accuracy", accuracy), ("macro_f1", macro_f1))
    )
    file = path if path.suffix == ".pt" else hub().find_file(path)
    return {
        "file": str(path), "data": args.data.name,
        **{name: score(found, expected) for name, score in scores},
        "bytes": file.stat().st_size, "sentences": len(rows), "cut": cut,
        "ms_per_sentence": 1e3 * _one_by_one(interface, rows, args),
        "ms_per_sentence_batched": 1e3 * (statistics.median(each) + encoding / len(rows)),
    }, found  # fmt: skip


def _known(rows: Sequence[Row], classes: Sequence[str], path: Path) -> list[str]:
    """The labels, each of which the head has to know."""
    if bad := [row for row in rows if row.label not in {*classes}]:
        known = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        raise DataError(
            f"{path}: {lines_of([row.line for row in bad])}: label {bad[0].label!r} is not one of the "
            f"head's {len(classes):,} classes ({known}); columns: label<TAB>sentence"
        )
    return [row.label for row in rows]


def _one_by_one(interface: Any, rows: Sequence[Row], args: argparse.Namespace) -> float:
    """Median seconds of a sentence alone, from text to answer, of TIMED spread over the rows."""
    seconds = []
    for row in rows[:: math.ceil(len(rows) / TIMED)]:
        began = time.perf_counter()
        interface.logits([interface.encode_cut(*row.sentences)[0]], args.head)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _shown(key: str, value: Any) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,}"
        if key == "bytes"
        else f"{value:.4f}"
        if key in ("pearson", "spearman")
        else f"{value:.2f}"
    )


def _bar(path: Path, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=str(path.name), total=total, unit=" sentences", leave=False, disable=None)
