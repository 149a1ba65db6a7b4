"""What a fine-tuned encoder loses when parts of it are frozen at once, without any training afterwards.

    untrained.py OUT --work WORK [--seeds 1 2 3 4 5] [--only NAME ...]

WORK: the folder of a finished `fairseq-qn train ... --test TSV`: its dense model is frozen by each of the
recipes below, with each seed of k-means, and asked the test set. Finished cells, OUT/NAME-SEED.json, are not
run again. Writes OUT/untrained.json and prints a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from seeds import frozen_file, results, together

FFN, TABLE = r".*\.fc[12]", ".*embed_tokens"
ATTENTION = r".*self_attn\.(q|k|v|out)_proj"


def product(layers: str, block_size: int) -> dict[str, Any]:
    return {"layers": layers, "scheme": "product", "block_size": block_size, "n_centroids": 256}


def integer(bits: int, granularity: str) -> dict[str, Any]:
    sized = {"group_size": 64} if granularity == "group" else {}
    return {"layers": ".*", "scheme": "integer", "bits": bits, "granularity": granularity, **sized}


RECIPES = {
    "feed-forward d 4": [product(FFN, 4)],
    "feed-forward d 8": [product(FFN, 8)],
    "table d 4": [product(TABLE, 4)],
    "table d 8": [product(TABLE, 8)],
    "attention d 4": [product(ATTENTION, 4)],
    "attention d 8": [product(ATTENTION, 8)],
    "all: 8, 8, 4": [product(FFN, 8), product(TABLE, 8), product(ATTENTION, 4)],
    "int8 by channel": [integer(8, "channel")],
    "int4 by groups of 64": [integer(4, "group")],
    "int4 by channel": [integer(4, "channel")],
}


def cell(out: Path, work: Path, name: str, seed: int) -> dict[str, Any]:
    """Bytes and accuracy of one recipe and seed."""
    stem = "".join(c if c.isalnum() else "-" for c in name)
    kept = out / f"{stem}-{seed}.json"
    if not kept.exists():
        recipe, path = out / f"{stem}.yaml", out / f"{stem}.qn.safetensors"
        recipe.write_text(json.dumps({"version": 1, "rules": RECIPES[name]}))
        dense = results(work)["dense"]["file"]
        kept.write_text(json.dumps(frozen_file(work, dense, recipe, seed, path)))
    return json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    dense = results(args.work)["dense"]
    score = dense.get("accuracy", dense.get("spearman"))
    rows = {}
    for name in args.only:
        # integers know no seed
        seeds = args.seeds if RECIPES[name][0]["scheme"] == "product" else args.seeds[:1]
        rows[name] = together([cell(args.out, args.work, name, seed) for seed in seeds])
        print(f"{name}: {rows[name]['values']}", flush=True)
    (args.out / "untrained.json").write_text(json.dumps({"dense": dense, "rows": rows}, indent=1) + "\n")
    print(f"\n| dense {score:.2f} | bytes | loss | seeds |\n| --- | ---: | ---: | ---: |")
    for name, row in rows.items():
        loss = score - row.get("accuracy", row.get("spearman"))
        print(f"| {name} | {row['bytes']:,} | {loss:.2f} ± {row['sd']:.2f} | {len(row['values'])} |")


if __name__ == "__main__":
    main()
