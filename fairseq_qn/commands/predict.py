"""`fairseq-qn predict`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fairseq_qn.commands.common import complain, hub
from fairseq_qn.errors import QNError


def run(args: argparse.Namespace) -> int:
    """Answer each sentence, or each line of stdin; exit status 1 if one of them had no answer."""
    interface = hub().load_interface(args.file, args.mode)
    if hasattr(interface, "classify"):  # what is wrong with every line is said once
        interface.encode("")
        if args.head:
            interface.labels_of(args.head)
    if not args.sentence:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # as for the words of a command
    status = 0
    for number, line in enumerate(args.sentence or sys.stdin, 1):
        line = line.rstrip("\n")
        try:
            line.encode()
            answers = _answer(interface, line, args)
        except (QNError, UnicodeEncodeError) as error:
            why = "expected UTF-8, found other bytes" if isinstance(error, UnicodeEncodeError) else error
            complain(f"{'sentence' if args.sentence else 'line'} {number}: {why}")
            status = 1
            continue
        if args.json:
            print(
                json.dumps(
                    {"input": line, "answers": [{"text": text, "score": score} for text, score in answers]}
                )
            )
            continue
        print(line)
        for text, score in answers:
            print(f"  {text}" if score is None else f"  {score:7.2%}  {text}")
    return status


def _answer(interface: Any, line: str, args: argparse.Namespace) -> list[tuple[str, float | None]]:
    if not hasattr(interface, "classify"):
        return [(interface.translate(line, beam=args.beam), None)]
    if "<mask>" in line:
        return [(text, score) for text, score, _ in interface.fill_mask(line, topk=args.top)]
    sentences = line.split("\t")
    if interface.is_regression(args.head):
        return [(f"{interface.regress(*sentences, head=args.head):.4f}", None)]
    return interface.classify(*sentences, head=args.head)[: args.top]
