"""What several commands need."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from fairseq_qn.errors import UnsupportedError, one_line


def complain(what: object) -> None:
    """One line on stderr."""
    print(f"fairseq-qn: {one_line(str(what))}", file=sys.stderr)


def hub() -> ModuleType:
    """fairseq_qn.hub, which needs fairseq. Raises UnsupportedError."""
    try:
        from fairseq_qn import hub
    except ImportError as error:
        raise UnsupportedError(f"this command needs fairseq, which cannot be imported: {error}") from None
    return hub


def carried(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What --bpe, --bpe-files and --bpe-option name. Raises UnsupportedError."""
    return hub().carry_bpe(args.bpe, args.bpe_files, bpe_options(args.bpe_option)) if args.bpe else ({}, {})


def interface_of(path: Path, args: argparse.Namespace) -> Any:
    """What answers from a small file, or from a fairseq checkpoint (*.pt) with the BPE of the arguments."""
    if path.suffix == ".pt":
        return hub().checkpoint_interface(path, args.data_dir, carried(args))
    return hub().load_interface(path, args.mode)


def bpe_options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE words of --bpe-option. Raises UnsupportedError."""
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UnsupportedError(f"--bpe-option: expected KEY=VALUE, found {pair!r}")
        options[key] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def hub_client() -> Any:
    """huggingface_hub's client. Raises UnsupportedError."""
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UnsupportedError("this command needs huggingface_hub; install fairseq-qn[hub]") from None
    return HfApi()


@contextmanager
def hub_says(repository: str) -> Iterator[None]:
    """What the library raises of a repository, or of the way to it, in one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # its own kinds and those of the library that it sends with
        first = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedError(f"{repository}: {type(error).__name__}: {first}") from error


def user_dir() -> str:
    """What --user-dir takes."""
    return str(Path(__file__).resolve().parents[1])


def shown(words: Sequence[str]) -> str:
    """A command as a shell takes it, an option a line."""
    lines, line = [], ""
    for word in map(shlex.quote, words):
        if line and word.startswith("-") and len(line) + len(word) > 80:
            lines.append(line)
            line = f"    {word}"
        else:
            line = f"{line} {word}" if line else word
    return " \\\n".join([*lines, line])
