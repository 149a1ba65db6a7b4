"""`fairseq-qn verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fairseq_qn import api
from fairseq_qn.report import mb


def run(args: argparse.Namespace) -> None:
    """Read a whole file, check every digest, and build its model where the file says how."""
    file = api.read(args.file)
    parts = file.manifest["tensors"]
    built = "not built: the file does not say how"
    if file.manifest["source"]:
        model = file.load(args.mode)
        built = f"built {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} dense weights"
    result = {
        "file": str(args.file),
        "bytes": Path(args.file).stat().st_size,
        "tensors": len(parts),
        "model": built,
    }
    print(
        json.dumps(result)
        if args.json
        else f"{args.file}: good: {mb(result['bytes'])}, {len(parts)} tensors, {built}"
    )
