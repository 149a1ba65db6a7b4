"""`fairseq-qn predict`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from fairseq_qn.artifact.replacing import refuse_same, replacing
from fairseq_qn.commands.common import complain, hub, interface_of
from fairseq_qn.errors import QNError, UnsupportedError

WINDOW = 32  # batches that are sorted by length together

Answer = list[tuple[str, float | None]]


def run(args: argparse.Namespace) -> int:
    """Answer each sentence, or each line of a file or of stdin; exit status 1 if one had no answer."""
    if args.input and args.sentence:
        raise UnsupportedError(f"predict: expected sentences or --input {args.input}, found both")
    if args.output:
        refuse_same(args.output, args.input, args.file)
    with ExitStack() as stack:
        lines, total = _lines(args, stack)
        answering = Answering(interface_of(args.file, args), args)
        file = stack.enter_context(replacing(args.output)) if args.output else None
        bar = stack.enter_context(_bar(args, total))
        began = time.perf_counter()
        while window := list(islice(lines, WINDOW * args.batch if args.batch > 1 else 1)):
            for line, answer in answering.window(window, bar.update):
                text = _text(line, answer, args)
                file.write(text.encode()) if file else print(text, end="")
        seconds = time.perf_counter() - began
    answering.say(seconds)
    return 1 if answering.refused else 0


def _lines(args: argparse.Namespace, stack: ExitStack) -> tuple[Iterator[str], int | None]:
    """(lines, how many there are, if that can be known); other bytes than UTF-8 become surrogates, as in the
    words of a command.
    """
    if args.sentence:
        return iter(args.sentence), len(args.sentence)
    total = None
    if args.input and args.input.is_file():  # a pipe can be read once only
        with args.input.open("rb") as file:
            total = sum(1 for _ in file)
    source: TextIO = sys.stdin
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
    if args.input:
        source = stack.enter_context(Path(args.input).open(**options))
    else:
        sys.stdin.reconfigure(**options)
    return (line.removesuffix("\n").removesuffix("\r") for line in source), total


@dataclass
class Answering:
    """Lines in, answers out, in their order; and what was cut or refused on the way."""

    interface: Any
    args: argparse.Namespace
    count: int = 0
    cut: int = 0
    refused: int = 0
    classes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if hasattr(self.interface, "classify"):  # what is wrong with every line is said once
            self.interface.encode("")
            if self.args.head:
                self.interface.labels_of(self.args.head)

    def window(self, lines: list[str], done: Any) -> Iterator[tuple[str, Answer]]:
        """(line, its answer) of all lines that have one."""
        tokens: dict[str, dict[int, Any]] = {"_label": {}, "_fill": {}, "_translate": {}}
        for place, line in enumerate(lines):
            self.count += 1
            try:
                line.encode()
                kind, ids = self._encode(line)
                tokens[kind][place] = ids
            except (QNError, UnicodeEncodeError) as error:
                why = "expected UTF-8, found other bytes" if isinstance(error, UnicodeEncodeError) else error
                complain(f"{'sentence' if self.args.sentence else 'line'} {self.count}: {why}")
                self.refused += 1
                done(1)
        answers: dict[int, Answer] = {}
        for kind, ids in tokens.items():
            if ids:
                found = getattr(self, kind)([lines[place] for place in ids], list(ids.values()), done)
                answers |= zip(ids, found, strict=True)
        for place, line in enumerate(lines):
            if place in answers:
                yield line, answers[place]

    def _encode(self, line: str) -> tuple[str, Any]:
        """(the method that answers it, its token ids)."""
        if not hasattr(self.interface, "classify"):
            return "_translate", self.interface.checked(line)
        if "<mask>" in line:
            return "_fill", self.interface.encode_masked(line)
        self.interface.head_of(self.args.head)
        ids, cut = self.interface.encode_cut(*line.split("\t"))
        if cut and self.args.no_cut:
            self.interface.need_room(self.interface.encode(*line.split("\t")))
        self.cut += cut
        return "_label", ids

    def _label(self, lines: list[str], tokens: list[Any], done: Any) -> Iterable[Answer]:
        logits = self.interface.logits(tokens, self.args.head, self.args.batch, done)
        if self.interface.is_regression(self.args.head):
            return [[(f"{value:.4f}", None)] for value in logits[:, 0].tolist()]
        self.classes = self.classes or self.interface.labels_of(self.args.head)
        return hub().ranked(logits.softmax(-1), self.classes, self.args.top)

    def _fill(self, lines: list[str], tokens: list[Any], done: Any) -> Iterable[Answer]:
        found = self.interface.fill_tokens(lines, tokens, self.args.top, self.args.batch)
        done(len(lines))
        return [[(text, score) for text, score, _ in filled] for filled in found]

    def _translate(self, lines: list[str], tokens: list[Any], done: Any) -> Iterable[Answer]:
        for line in lines:
            yield [(self.interface.translate(line, beam=self.args.beam), None)]
            done(1)

    def say(self, seconds: float) -> None:
        """What was cut, and how fast lines were answered."""
        if self.cut:
            longest = self.interface.model.max_positions()
            complain(f"{self.cut:,} of {self.count:,} sentences cut to {longest:,} tokens")
        if (self.args.input or self.args.output) and self.count:  # a filter is silent
            complain(f"{self.count:,} sentences in {seconds:.1f} s, {self.count / seconds:,.0f} a second")


def _text(line: str, answer: Answer, args: argparse.Namespace) -> str:
    if args.json or args.output:
        answers = [{"text": text, "score": score} for text, score in answer]
        return json.dumps({"input": line, "answers": answers}) + "\n"
    rows = (f"  {text}\n" if score is None else f"  {score:7.2%}  {text}\n" for text, score in answer)
    return f"{line}\n{''.join(rows)}"


def _bar(args: argparse.Namespace, total: int | None) -> Any:
    from tqdm import tqdm

    shown = not args.sentence and (args.output or not sys.stdout.isatty())  # not in between answers
    return tqdm(unit=" sentences", total=total, leave=False, disable=None if shown else True)
