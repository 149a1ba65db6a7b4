"""Reports as data, and as tables that fit 80 columns."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from fairseq_qn.artifact import container, manifest, streams
from fairseq_qn.artifact.header import record_bytes
from fairseq_qn.schemes import SCHEMES


@dataclass(frozen=True)
class SizeReport:
    """Bytes of a file. `total` is what the disk holds; `parts` and `layers` add up to it.

    dense_bytes: what the same weights take in fp32, ties once, without the files that travel inside.
    """

    total: int
    parts: dict[str, int]
    layers: dict[str, int]
    dense_bytes: int

    @classmethod
    def of(cls, path: str | Path, content: Mapping[str, Any]) -> SizeReport:
        """Measure a file whose manifest has been read."""
        total = os.path.getsize(path)
        parts = {"codes": 0, "codebooks": 0, "dense": 0, "assets": 0}
        layers: dict[str, int] = {}
        dense_bytes = 0
        layer_of = {
            f"{name}/{part}": (
                name,
                "codes" if part in SCHEMES[entry["scheme"]].coded_parts else "codebooks",
            )
            for name, entry in content["layers"].items()
            for part in streams.layout(entry)
        }
        for name, record in content["tensors"].items():
            size = record_bytes(record)
            if name in layer_of:
                layer, part = layer_of[name]
                parts[part] += size
                layers[layer] = layers.get(layer, 0) + size
            elif name.startswith("asset:"):
                parts["assets"] += size
            else:
                parts["dense"] += size
                layers[name] = size
                dense_bytes += 4 * prod(record["shape"]) if record["dtype"] in ("F16", "F32") else size
        dense_bytes += sum(4 * prod(entry["shape"]) for entry in content["layers"].values())
        parts["header"] = total - sum(parts.values())
        return cls(total, parts, layers, dense_bytes)

    @property
    def ratio(self) -> float:
        """How many times smaller than fp32 the file is."""
        return self.dense_bytes / self.total

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ratio": self.ratio}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {mb(size)}" for name, size in self.parts.items() if size)
        total = f"{mb(self.total)} on disk ({self.total / 2**20:.2f} MiB"
        return f"{total}, {self.ratio:.1f}x smaller than fp32): {parts}"


def inspect(path: str | Path) -> dict[str, Any]:
    """What is in a file, from its header alone: the manifest, and `size`, a SizeReport as data."""
    content = container.read_manifest(path)
    manifest.check(content, str(path))
    return {**content, "size": SizeReport.of(path, content).to_dict()}


def mb(size: float) -> str:
    """Bytes as MB of 10^6."""
    return f"{size / 1e6:.3f} MB"


def table(rows: Sequence[Sequence[object]], heads: Sequence[str], width: int = 80) -> str:
    """Rows under heads, numbers to the right; the first column is cut in its middle to keep to `width`."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(heads), *cells]) for i in range(len(heads))]
    widths[0] = min(widths[0], max(8, width - sum(widths[1:]) - 2 * (len(heads) - 1)))
    lines = []
    for row in [list(heads), ["-" * w for w in widths], *cells]:
        first = (
            row[0]
            if len(row[0]) <= widths[0]
            else row[0][: widths[0] // 2 - 1] + ".." + row[0][-(widths[0] - widths[0] // 2 - 1) :]
        )
        rest = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)
