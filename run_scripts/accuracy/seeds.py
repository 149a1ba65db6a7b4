"""`fairseq-qn train` over several seeds: mean and standard deviation of each model that it scores.

    seeds.py OUT --name NAME [--seeds 1 2 3] [--freezes 5] -- WORDS

WORDS: of `fairseq-qn train`, without -o, --work and --seed. Each dense model is also frozen at once FREEZES
times, by as many seeds of k-means, since that alone moves the accuracy by points. Finished trainings are not
run again. Writes OUT/result.json, which picture.py draws, and prints a table.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOOL = str(Path(sys.executable).with_name("fairseq-qn"))


def tool(*words: object) -> dict[str, Any]:
    """What a command of fairseq-qn prints as JSON; its progress goes to stderr."""
    done = subprocess.run([TOOL, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def frozen_file(work: Path, checkpoint: Path, recipe: Path, seed: int, path: Path) -> dict[str, Any]:
    """What `evaluate` says of a checkpoint of `fairseq-qn train` that is frozen at once."""
    data = json.loads((work / "data" / "data.json").read_text())
    words = ["--recipe", recipe, "--data", work / "data", "--drop", "encoder.lm_head", "--seed", seed]
    words += ["--bpe", data["bpe"], "--bpe-files", *data["bpe_files"]]
    tool("compress", checkpoint, *words, "-o", path, "--json")
    return tool("evaluate", path, "--data", results(work)["dense"]["on"], "--json")


def results(work: Path) -> dict[str, Any]:
    """What `fairseq-qn train` measured."""
    return json.loads((work / "result.json").read_text())


def trained(out: Path, seed: int, words: list[str]) -> tuple[dict[str, Any], float]:
    """(rows, seconds of training) of one seed."""
    work = out / f"{seed}.work"
    began = time.monotonic()
    rows = tool(
        "train", *words, "--seed", seed, "-o", out / f"{seed}.qn.safetensors", "--work", work, "--json"
    )
    clock = work / "seconds"
    if not clock.exists():
        clock.write_text(f"{time.monotonic() - began:.0f}\n")
    return rows["rows"], float(clock.read_text())


def frozen(work: Path, seed: int) -> dict[str, Any]:
    """Bytes and accuracy of a dense model, frozen at once by a seed of k-means."""
    kept = work / f"frozen{seed}.json"
    if not kept.exists():
        dense, path = results(work)["dense"]["file"], kept.with_suffix(".qn.safetensors")
        kept.write_text(json.dumps(frozen_file(work, dense, work / "recipe.yaml", seed, path)))
    return json.loads(kept.read_text())


def commit() -> str:
    """Of the code that runs."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return found.stdout.strip()


def machine() -> str:
    """Its processor, and how many threads torch is told to take."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return f"{found[1] if found else platform.machine()}, {threads} threads"


def together(some: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over rows of the same kind."""
    measure = "accuracy" if some[0].get("accuracy") is not None else "spearman"
    values = [row[measure] for row in some]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    size = round(statistics.mean(row["bytes"] for row in some))
    return {"bytes": size, measure: statistics.mean(values), "sd": spread, "values": values}


def main() -> None:
    mine, words = sys.argv[1:], []
    if "--" in mine:
        words, mine = mine[mine.index("--") + 1 :], mine[: mine.index("--")]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--name", required=True, help="of the model, in pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--freezes", type=int, default=5)
    args = parser.parse_args(mine)
    args.out.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, list[dict[str, Any]]] = {"dense": [], "at_once": [], "small": []}
    seconds = []
    for seed in args.seeds:
        rows, took = trained(args.out, seed, words)
        seconds.append(took)
        kinds["dense"].append(rows["dense"])
        kinds["small"].append(rows["small"])
        kinds["at_once"] += [frozen(args.out / f"{seed}.work", k) for k in range(1, args.freezes + 1)]
    result = {
        "name": args.name,
        "rows": {kind: together(some) for kind, some in kinds.items()},
        "seconds": seconds,
        "seeds": args.seeds,
        "command": ["fairseq-qn", "train", *words],
        "commit": commit(),
        "machine": machine(),
    }
    (args.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"| {result['name']} | bytes | smaller | accuracy | runs |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    dense = result["rows"]["dense"]
    for kind, row in result["rows"].items():
        mean, ratio = row.get("accuracy", row.get("spearman")), dense["bytes"] / row["bytes"]
        score = f"{mean:.2f} ± {row['sd']:.2f}"
        lines.append(f"| {kind} | {row['bytes']:,} | {ratio:.1f}x | {score} | {len(row['values'])} |")
    minutes = ", ".join(f"{seconds / 60:.0f}" for seconds in result["seconds"])
    return "\n".join(lines) + f"\n\nminutes of training: {minutes}"


if __name__ == "__main__":
    main()
