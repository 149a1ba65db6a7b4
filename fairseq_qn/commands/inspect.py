"""`fairseq-qn inspect`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from fairseq_qn import report
from fairseq_qn.report import SizeReport, table
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.activation import ACTIVATIONS


def run(args: argparse.Namespace) -> None:
    """What is in a file, from its header."""
    data = report.inspect(args.file)
    if args.json:
        print(json.dumps(data))
        return
    size = SizeReport(**{key: value for key, value in data["size"].items() if key != "ratio"})
    model = (data["source"] or {}).get("model")
    name = model.get("_name") if isinstance(model, dict) else None
    print(f"{args.file}: {data['producer']}, format {data['version']}, {name or 'a model of your own'}")
    print(f"{str(size).partition(': ')[0]}\n")  # its parts are a table of their own
    print(
        table(
            [(name, f"{n:,}", f"{n / size.total:.1%}") for name, n in size.parts.items()],
            ("part", "bytes", "share"),
        )
    )
    print()
    print(
        table(
            [_row(name, n, data) for name, n in _largest(size.layers, args.all)],
            ("layer", "how", "shape", "bytes"),
        )
    )
    left = len(size.layers) - len(_largest(size.layers, args.all))
    if left:
        print(f"... and {left} smaller; --all lists them")
    inputs = [ACTIVATIONS[e["scheme"]].of_entry(e) for e in data.get("activations", {}).values()]
    for (label, ranges), count in Counter((scheme.label, scheme.name) for scheme in inputs).items():
        print(f"{label}, {ranges} ranges: {count} layers")
    for first, *others in data["ties"]:
        print(f"tied: {first} = {', '.join(others)}")


def _row(name: str, size: int, data: dict[str, Any]) -> tuple[str, str, str, str]:
    entry = data["layers"].get(name)
    if entry is None:
        record = data["tensors"][name]
        return name, record["dtype"], "x".join(map(str, record["shape"])) or "-", f"{size:,}"
    how = SCHEMES[entry["scheme"]].label(entry)
    return name, how, "x".join(map(str, entry["shape"])), f"{size:,}"


def _largest(layers: dict[str, int], everything: bool) -> list[tuple[str, int]]:
    ordered = sorted(layers.items(), key=lambda item: (-item[1], item[0]))
    return ordered if everything else ordered[:20]
