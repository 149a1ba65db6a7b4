"""`fairseq-qn card`."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from fairseq_qn import api
from fairseq_qn.artifact.replacing import refuse_same, replacing
from fairseq_qn.errors import DataError, UnsupportedError

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# key of `evaluate --json`: (the Hub's name of the metric, ours)
METRICS = {
    "accuracy": ("accuracy", "Accuracy (%)"), "macro_f1": ("f1", "Macro F1 (%)"),
    "pearson": ("pearsonr", "Pearson"), "spearman": ("spearmanr", "Spearman"),
}  # fmt: skip
_KINDS = {  # task of the Hub: the line that answers
    "text-classification": 'print(model.classify("A sentence."))  # [(label, probability), ...]',
    "sentence-similarity": 'print(model.regress("A sentence.", "Another."))  # a number',
    "fill-mask": 'print(model.fill_mask("A <mask> sentence."))  # [(sentence, probability, token), ...]',
    "translation": 'print(model.translate("A sentence."))',
    "text-generation": 'print(model.translate("A beginning"))',
}


def run(args: argparse.Namespace) -> None:
    """Write a model card as the Hub expects it. Raises UnsupportedError without a licence."""
    if not args.licence or not LICENCE.fullmatch(args.licence):
        raise UnsupportedError(
            f"card: expected the licence of the weights, found {args.licence!r}; name it as the Hub does: "
            "--licence apache-2.0; weights trained from others keep the licence of those"
        )
    refuse_same(args.output, args.file, args.scores)
    text = card(args.file, args.licence, args.name, _scores(args.scores) if args.scores else {})
    with replacing(args.output) as file:
        file.write(text.encode())
    print(json.dumps({"file": str(args.output)}) if args.json else f"{args.output}: written")


def card(path: Path, licence: str, name: str | None, scores: dict[str, Any]) -> str:
    """The text of the card. Whatever comes out of the file stands in YAML or indented, as code."""
    data = api.inspect(path)
    kind = _kind(data["source"] or {})
    name = name or path.name.removesuffix(".qn.safetensors")
    front: dict[str, Any] = {"license": licence, "library_name": "fairseq"}
    if kind:
        front["pipeline_tag"] = kind
    front["tags"] = ["fairseq", "fairseq-qn", "quantization", "compression"]
    if metrics := [
        {"type": metric, "name": shown, "value": scores[key]}
        for key, (metric, shown) in METRICS.items()
        if scores.get(key) is not None
    ]:
        dataset = {"name": scores["data"], "type": "tsv"}
        result = {"task": {"type": kind or "other"}, "dataset": dataset, "metrics": metrics}
        front["model-index"] = [{"name": name, "results": [result]}]
    sections = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {' '.join(name.split())}",
        "Compressed with fairseq_qn: one file, with configuration, dictionaries and text encoding inside.",
        _sizes(data),
        _results(scores),
        f"## How to load it\n\n```python\n{_loading(path.name, kind)}\n```",
        "## Recipe\n\n" + _indented(yaml.safe_dump(data["recipe"], sort_keys=False)),
        f"## Licence\n\n{licence}",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _kind(source: dict[str, Any]) -> str | None:
    """The Hub's name of what the model does; None for a model that is not fairseq's."""
    if source.get("builder") != "fairseq":
        return None
    model, heads = source["model"]["_name"], source.get("heads") or {}
    if "transformer_lm" in model or "gpt" in model:
        return "text-generation"
    if "roberta" not in model:
        return "translation"
    if not heads:
        return "fill-mask"
    return "sentence-similarity" if next(iter(heads.values()))[0] == 1 else "text-classification"


def _sizes(data: dict[str, Any]) -> str:
    size = data["size"]
    weights = size["dense_bytes"] // 4
    rows = [
        ("file", f"{size['total']:,} bytes"),
        ("the same weights in fp32", f"{size['dense_bytes']:,} bytes, {size['ratio']:.1f} times as many"),
        ("weights", f"{weights:,}"),
        ("bits a weight, of the whole file", f"{8 * size['total'] / max(1, weights):.2f}"),
        *((f"of the file: {part}", f"{count:,} bytes") for part, count in size["parts"].items() if count),
    ]
    return "## Size\n\n| | |\n| --- | ---: |\n" + "\n".join(f"| {a} | {b} |" for a, b in rows)


def _results(scores: dict[str, Any]) -> str:
    rows = [
        f"| {shown} | {scores[key]:.4g} |"
        for key, (_, shown) in METRICS.items()
        if scores.get(key) is not None
    ]
    if not rows:
        return ""
    count = f"{scores['sentences']:,} sentences" if scores.get("sentences") else "labelled sentences"
    return f"## Scores\n\nOn {count}.\n\n| | |\n| --- | ---: |\n" + "\n".join(rows)


def _loading(file: str, kind: str | None) -> str:
    if kind is None:
        return (
            f"import fairseq_qn\n\nmodel = fairseq_qn.load({file!r}, model=your_model())  # a fresh instance"
        )
    return f"from fairseq_qn.hub import load_interface\n\nmodel = load_interface({file!r})\n{_KINDS[kind]}"


def _scores(path: Path) -> dict[str, Any]:
    """What `evaluate --json` wrote: its numbers, and the name of the data. Raises DataError."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected what `evaluate --json` prints, found no JSON: {error}") from None
    if not isinstance(data, dict) or not any(data.get(key) is not None for key in METRICS):
        raise DataError(
            f"{path}: expected what `evaluate --json` prints, found none of {', '.join(METRICS)}"
        )
    for key in (*METRICS, "sentences"):
        value = data.get(key)
        if value is not None and (type(value) not in (int, float) or not math.isfinite(value)):
            raise DataError(f"{path}: {key}: expected a number, found {value!r}")
    return {**data, "data": str(data.get("data") or "labelled sentences")}


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines()).rstrip()
