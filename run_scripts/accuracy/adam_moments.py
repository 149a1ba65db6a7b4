"""The table of adam_moments.sh: adam_moments.py OUT reads the logs of the finished cells; writes
OUT/result.json, prints.

Loss in nats and accuracy of the held-out pairs after each run's last update. The change is that of projected
to kept, of the same beta2, seed and checkpoint.
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path


def cells(out: Path) -> list[dict]:
    """One row for each finished run: moments, beta2, seed, loss, accuracy, seconds."""
    rows = []
    for done in sorted([*out.glob("kept-*.done"), *out.glob("projected-*.done")]):
        moments, beta2, seed = done.stem.rsplit("-", 2)
        valid = re.findall(r"\| valid \| (\{.*\})", done.with_suffix(".log").read_text())
        figures = json.loads(valid[-1])
        assert float(figures["valid_qn_frozen_share"]) == 1, done
        loss = float(figures["valid_loss"]) * math.log(2)  # fairseq logs bits
        rows.append({"moments": moments, "beta2": beta2, "seed": int(seed), "loss": loss,
                     "accuracy": float(figures["valid_accuracy"]),
                     "updates": int(figures["valid_num_updates"]),
                     "seconds": int(done.read_text().split()[0])})  # fmt: skip
    return rows


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    mean = statistics.mean(values)
    return f"{mean:8.4f}" + (f" +-{statistics.stdev(values):6.4f}" if len(values) > 1 else " " * 9)


def main() -> None:
    """Print the table and write it as JSON."""
    out = Path(sys.argv[1])
    rows = cells(out)
    found = {(row["moments"], row["beta2"], row["seed"]): row for row in rows}
    print(f"{'beta2':6} {'moments':10} {'seeds':>5}  {'held-out loss':>17}  {'accuracy %':>17}")
    for beta2 in sorted({row["beta2"] for row in rows}):
        seeds = sorted(seed for kind, b, seed in found if kind == "kept" and b == beta2)
        seeds = [seed for seed in seeds if ("projected", beta2, seed) in found]  # pairs only
        if not seeds:
            continue
        pairs = {kind: [found[kind, beta2, seed] for seed in seeds] for kind in ("kept", "projected")}
        pairs["change"] = [
            {key: b[key] - a[key] for key in ("loss", "accuracy")} for a, b in zip(*pairs.values())
        ]
        for kind, of in pairs.items():
            columns = "  ".join(spread([row[key] for row in of]) for key in ("loss", "accuracy"))
            print(f"{beta2:6} {kind:10} {len(seeds):5}  {columns}")
    (out / "result.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
