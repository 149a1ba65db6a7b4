"""Every scheme, after training, with quantisation-aware training and with noise, from the same dense models.

    schemes.py OUT --from SEEDS --train TSV --valid TSV [--seeds 1 2 3] [--only NAME ...] [--epochs 2]

SEEDS: what seeds.py made of the quickstart; its dense model of each seed is where the cells of that seed
start. post: frozen at once. qat, noise: `fairseq-qn train` from there, with a stage for all layers at once,
taught by the dense model; p is 1, or 0.5 for integers and 0.1 for product codes. Learned bits have one
noise, the published one. --last adds both with nothing trained after the freeze, as published: otherwise
frozen integers train on, which is QAT whatever came before. A finished cell, OUT/SCHEME-MODE-SEED.json, is
not run again. Writes OUT/schemes.json and prints a table: mean and standard deviation over the seeds.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from seeds import TOOL, commit, frozen_file, machine, results, tool
from untrained import integer, product

FFN, TABLE, ATTENTION = r".*\.fc[12]", ".*embed_tokens", r".*self_attn\.(q|k|v|out)_proj"
HEAD = {"layers": r"classification_heads\..*", "optional": True}
PRODUCT = [product(FFN, 8), product(TABLE, 8), product(ATTENTION, 4), {**product("", 4), **HEAD}]
INT8 = {"codebook_bits": 8, "activations": 8}  # of codebooks and inputs


def all_layers(**lines: Any) -> list[dict[str, Any]]:
    """One rule for every Linear and Embedding."""
    return [{"layers": ".*", **lines}]


# name -> rules, p of the noise, weight of the size
SCHEMES: dict[str, tuple[list[dict[str, Any]], float, float]] = {
    "int8 channel": ([integer(8, "channel")], 0.5, 0),
    "int4 channel": ([integer(4, "channel")], 0.5, 0),
    "int4 channel, learned": (all_layers(scheme="integer", bits=4, ranges="learned"), 0.5, 0),
    "int4 tensor": ([integer(4, "tensor")], 0.5, 0),
    "int2 tensor": ([integer(2, "tensor")], 0.5, 0),
    "ternary channel": (all_layers(scheme="integer", bits="ternary"), 0.5, 0),
    "learned bits, lambda 10": (all_layers(scheme="learned_bits", group_size=16), 1, 10),
    "product 8, 8, 4": (PRODUCT, 0.1, 0),
    "product 8, 8, 4, int8": ([{**rule, **INT8} for rule in PRODUCT], 0.1, 0),
}  # fmt: skip
MODES = ("post", "qat", "noise")
LAST = ("qat last", "noise last")


def last(work: Path, path: Path) -> dict[str, Any]:
    """What `evaluate` says of a training of `fairseq-qn train` done again in another folder, with its stage
    frozen when it ends.
    """
    script = (work / "train.sh").read_text().replace("\\\n", " ").split("\n\n")
    train, freeze = (shlex.split(next(p for p in script if p.startswith(f"# {step}")), comments=True)
                     for step in ("noise", "the small file"))  # fmt: skip
    updates = int(train[train.index("--max-update") + 1])
    for option, value in (("--save-dir", "last"), ("--quant-stage-updates", str(updates - 1))):
        train[train.index(option) + 1] = value
    with (work / "last.log").open("w") as log:
        subprocess.run(
            [Path(TOOL).with_name(train[0]), *train[1:]], cwd=work, check=True, stdout=log, stderr=log
        )
    freeze[2], freeze[freeze.index("-o") + 1] = str(work / "last" / "checkpoint_last.pt"), str(path)
    tool(*freeze[1:], "--json")
    on = json.loads((work / "result.json").read_text())["small"]["on"]
    return tool("evaluate", path, "--data", on, "--json")


def cell(out: Path, start: Path, name: str, mode: str, seed: int, sets: list[str]) -> dict[str, Any]:
    """Bytes, accuracy and seconds of one scheme, one way of training and one seed."""
    stem = "".join(c if c.isalnum() else "-" for c in name)
    kept = out / f"{stem}-{mode.replace(' ', '-')}-{seed}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    rules, p, size_weight = SCHEMES[name]
    noise = {"kind": "exact" if "product" in name else "proxy", "p": 1 if "qat" in mode else p}
    recipe = out / f"{stem}-{mode.split()[0]}.yaml"
    recipe.write_text(
        json.dumps({"version": 1, "noise": noise, "rules": rules, "keep": [".*embed_positions"]})
    )
    work, path = start / f"{seed}.work", kept.with_suffix(".qn.safetensors")
    dense = results(work)["dense"]
    began = time.monotonic()
    if mode in LAST:
        found = last(out / f"{stem}-{mode.split()[0]}-{seed}.work", path)
    elif mode == "post":
        found = frozen_file(work, dense["file"], recipe, seed, path)
    else:
        words = [
            "--test",
            dense["on"],
            "--recipe",
            recipe,
            "--seed",
            seed,
            "--size-weight",
            size_weight,
            *sets,
        ]
        found = tool("train", "--model", dense["file"], *words, "-o", path, "--json")["rows"]["small"]
    row = {
        "scheme": name, "mode": mode, "seed": seed, "bytes": found["bytes"], "accuracy": found["accuracy"],
        "seconds": round(time.monotonic() - began, 1), "commit": commit(), "machine": machine(),
    }  # fmt: skip
    kept.write_text(json.dumps(row) + "\n")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--from", dest="start", type=Path, required=True)
    parser.add_argument("--train", required=True, help="as of `fairseq-qn train`")
    parser.add_argument("--valid", required=True)
    parser.add_argument("--epochs", default="2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--last", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    args = parser.parse_args()
    sets = ["--train", args.train, "--valid", args.valid, "--epochs", args.epochs]
    args.out.mkdir(parents=True, exist_ok=True)
    dense = [results(args.start / f"{seed}.work")["dense"]["accuracy"] for seed in args.seeds]
    modes = [*MODES, *(LAST if args.last else ())]
    lines = [
        f"| scheme | bytes | {' | '.join(modes)} | seconds of training |",
        "| --- | ---: |" + " ---: |" * (len(modes) + 1),
    ]
    cells = []
    for name in args.only:
        shown, seconds, sizes = [], [], [0]
        for mode in modes:
            if "qat" in mode and SCHEMES[name][1] == 1:
                shown.append("")
                continue
            rows = [cell(args.out, args.start, name, mode, seed, sets) for seed in args.seeds]
            cells += rows
            sizes = [row["bytes"] for row in rows]  # of the last way; they differ where widths are learned
            values = [row["accuracy"] for row in rows]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            shown.append(f"{statistics.mean(values):.2f} ± {spread:.2f}")
            seconds.append(statistics.mean(row["seconds"] for row in rows))
        lines.append(
            f"| {name} | {round(statistics.mean(sizes)):,} | {' | '.join(shown)} | {seconds[-1]:.0f} |"
        )
        print(lines[-1], flush=True)
    (args.out / "schemes.json").write_text(json.dumps({"dense": dense, "cells": cells}, indent=1) + "\n")
    print(f"\ndense: {statistics.mean(dense):.2f}, {len(dense)} seeds\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
