"""`fairseq-qn recipes`."""

from __future__ import annotations

import argparse
import json
import textwrap
from itertools import takewhile
from pathlib import Path

from fairseq_qn.config_dir import shipped_recipes


def run(args: argparse.Namespace) -> None:
    """The ready recipes by name, and what each is for."""
    found = {name: (path, _comment(path)) for name, path in shipped_recipes().items()}
    if args.json:
        print(json.dumps({name: {"file": str(path), "for": text} for name, (path, text) in found.items()}))
        return
    for name, (_, text) in found.items():
        print(textwrap.fill(text, 80, initial_indent=f"{name:17}", subsequent_indent=" " * 17))
    print(
        f"Give one by its name (--recipe int8, --quant-recipe int8), or a copy of {_folder(found)}/NAME.yaml"
    )


def _folder(found: dict[str, tuple[Path, str]]) -> Path:
    return next(path.parent for path, _ in found.values())


def _comment(path: Path) -> str:
    """The comment at the head of a file."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return " ".join(line.lstrip("# ") for line in lines)
