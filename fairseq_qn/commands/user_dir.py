"""`fairseq-qn user-dir`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def run(args: argparse.Namespace) -> None:
    """The folder that fairseq's --user-dir takes, wherever the package is installed."""
    folder = str(Path(__file__).resolve().parents[1])
    print(json.dumps({"user_dir": folder}) if args.json else folder)
