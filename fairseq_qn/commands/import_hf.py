"""`fairseq-qn import-hf`."""

from __future__ import annotations

import argparse
import json

from fairseq_qn.interop.hf import import_hf


def run(args: argparse.Namespace) -> None:
    """A Hugging Face BERT or RoBERTa folder -> a fairseq checkpoint and dictionary."""
    report = import_hf(args.folder, args.output)
    print(json.dumps(vars(report), default=str) if args.json else report)
