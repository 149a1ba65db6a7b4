"""The format written down a second time: a file taken apart, and put together under right digests whatever
it claims.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from base64 import b85decode, b85encode
from pathlib import Path
from typing import Any

import torch


def small() -> dict[str, torch.Tensor]:
    return {
        "codes": torch.tensor([1, 2, 250], dtype=torch.uint8),
        "codebook": torch.tensor([[0.5, -1.0], [2.0, 3.0]], dtype=torch.float16),
        "pad": torch.tensor([True, False]),
        "ünï.码": torch.tensor(-7),
    }


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bits."""
    bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def parts(path: Path) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Entries of a file's header, its manifest with the table of tensors, and its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    meta = head.pop("__metadata__")
    if meta.get("version", "1") == "1":
        return head, json.loads(meta["manifest"]), raw[8 + length :]
    digests = b85decode(meta["digests"]).hex()
    table = {
        name: {
            "dtype": head[name]["dtype"],
            "shape": head[name]["shape"],
            "sha256": digests[64 * i : 64 * (i + 1)],
        }
        for i, name in enumerate(sorted(head))
    }
    return (
        head,
        json.loads(zlib.decompress(b85decode(meta["manifest"]))) | {"tensors": table},
        raw[8 + length :],
    )


def forge(
    path: Path, head: dict[str, Any], manifest: Any, data: bytes, version: int = 2, /, **meta: Any
) -> None:
    """A file whose header digest is right whatever the header claims. manifest: JSON, or data with its
    table.
    """
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    fields = {"format": "fairseq_qn", "manifest": text, "header_sha256": "0" * 64}
    if version > 1:
        table = {} if isinstance(manifest, str) else manifest["tensors"]
        if not isinstance(manifest, str):
            text = json.dumps({key: value for key, value in manifest.items() if key != "tensors"})
        digests = b"".join(bytes.fromhex(table[name]["sha256"]) for name in sorted(table))
        fields |= {
            "digests": b85encode(digests).decode(), "version": str(version),
            "manifest": b85encode(zlib.compress(text.encode())).decode(),
        }  # fmt: skip
    forge_text(path, json.dumps({**head, "__metadata__": fields | meta}, separators=(",", ":")), data)


def forge_text(path: Path, text: str, data: bytes) -> None:
    """A file whose header is this text, but for the digest in it."""
    body = text.encode()
    raw = len(body).to_bytes(8, "little") + body
    blank = b'"header_sha256":"' + b"0" * 64
    assert blank in raw
    path.write_bytes(raw.replace(blank, blank[:17] + hashlib.sha256(raw).hexdigest().encode()) + data)
