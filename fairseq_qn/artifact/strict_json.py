"""JSON as the small file holds it: canonical on the way out, strict and bounded on the way in."""

from __future__ import annotations

import json
from typing import Any

MAX_NESTED = 1 << 16  # lists and objects in a text; the header has three for each tensor
MAX_DEPTH = 64  # of lists in lists


def dumps(data: Any) -> str:
    """Canonical text. Raises ValueError, TypeError, RecursionError for what is not plain data."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def loads(text: str) -> Any:
    """JSON without what Python adds to it (NaN, Infinity), without keys that occur twice, and within the
    bounds above.

    Raises: ValueError, RecursionError.
    """
    if (nested := text.count("[") + text.count("{")) > MAX_NESTED:
        raise ValueError(f"{nested} lists and objects, more than {MAX_NESTED}")
    data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    level = [data]
    for _ in range(MAX_DEPTH + 1):
        lists = [
            item.values() if type(item) is dict else item for item in level if type(item) in (dict, list)
        ]
        level = [item for items in lists for item in items]
    if lists:
        raise ValueError(f"lists within lists, more than {MAX_DEPTH} deep")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(result := dict(pairs)) != len(pairs):
        raise ValueError("a key that occurs twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant}, which is not JSON")
