"""fairseq's own quantisation YAML (n_centroids, block_sizes, layers_to_quantize) as a recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fairseq_qn.errors import RecipeError
from fairseq_qn.lines import mapping, only, sequence


def from_fairseq_yaml(data: Mapping[str, Any]) -> dict[str, Any]:
    """fairseq's iPQ configuration as a recipe: a stage for each entry of layers_to_quantize.

    Doubled backslashes, as in fairseq's shipped example, are read as one: no module name holds a backslash.
    Patterns must match whole names. Block sizes come from `block_sizes` by attribute or by part of the name.

    >>> sizes = {"Linear": {"key": "in_features", "value": {"*": 8, 512: 4}}}
    >>> read = from_fairseq_yaml({"layers_to_quantize": ["encoder.*fc1"], "block_sizes": sizes})
    >>> [(rule["layers"], rule["where"], rule["block_size"]) for rule in read["rules"]]
    [('encoder.*fc1', {'in_features': 512}, 4), ('encoder.*fc1', {}, 8)]
    """
    only(data, ("layers_to_quantize", "block_sizes", "n_centroids"), "fairseq's configuration")
    rules, stages = [], []
    patterns = data["layers_to_quantize"]
    for index, pattern in enumerate(
        sequence([patterns] if isinstance(patterns, str) else patterns, "layers_to_quantize")
    ):
        stage = f"step{index}"
        stages.append(stage)
        pattern = str(pattern).replace("\\\\", "\\")
        sizes, counts = (mapping(data.get(key) or {}, key) for key in ("block_sizes", "n_centroids"))
        for module in sizes:
            count_cases = _cases(counts, module) if module in counts else [("", {}, 256)]
            for name, where, size in _cases(sizes, module, "block_sizes"):
                for count_name, count_where, count in count_cases:
                    layers = (
                        "".join(f"(?=.*{re.escape(part)})" for part in (name, count_name) if part) + pattern
                    )
                    rules.append(
                        {
                            "layers": layers, "scheme": "product", "stage": stage, "module": module,
                            "optional": True,
                            "where": {**where, **count_where}, "block_size": size, "n_centroids": count,
                        }
                    )  # fmt: skip
    return {"version": 1, "rules": rules, "stages": stages}


def _cases(
    entries: Mapping[str, Any], module: str, where: str = "n_centroids"
) -> list[tuple[str, dict[str, Any], int]]:
    """(part of the name, attributes, value) of a {key, value} entry; "*" last: the first match wins."""
    entry = mapping(entries[module], f"{where}.{module}")
    if not isinstance(entry.get("key"), str) or not isinstance(entry.get("value"), Mapping):
        raise RecipeError(f"{where}.{module}: expected {{key: NAME, value: {{...}}}}, found {entry!r}")
    key, cases = entry["key"], sorted(entry["value"].items(), key=lambda item: item[0] == "*")
    if key == "fuzzy_name":
        return [("" if part == "*" else str(part), {}, value) for part, value in cases]
    return [("", {} if part == "*" else {key: part}, value) for part, value in cases]
