"""Benchmark `file`: bytes on the disk beside their bound and other formats; and from the file to the first
answer.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import zlib
from pathlib import Path
from typing import Any

import checkpoints
import harness

SIZES = {  # name -> (size of the checkpoint, recipe, classes)
    "roberta_base": ({"layers": 12, "width": 768, "heads": 12}, "roberta", 0),
    "6 x 384": ({"layers": 6, "width": 384, "heads": 6}, "roberta", 0),
    "2 x 256, 77 classes": (
        {"layers": 2, "width": 256, "heads": 4, "words": 1000, "positions": 64},
        "quickstart",
        77,
    ),
}
HEADS = (
    "file",
    "codes",
    "codebooks",
    "rest",
    "dictionary",
    "header",
    "total",
    "bound",
    "total / bound",
    "bits of 8",
)
MODES = {"packed": 0, "dense": 4, "dense bf16": 2}  # bytes of a weight in memory; 0: as in the file
WHAT = {"seconds": "time", "above imports": "memory above imports", "peak": "memory in all"}
NOTES = [
    "bound: codes at log2 K bits, codebooks and what stays dense at their dtype, without padding, header or "
    "dictionary.",
    "bits of 8: what order-0 entropy coding would leave of a code of 8 bits, by the counts of each layer's "
    "own codes.",
    "Checkpoints have random weights, whose sizes are those of trained ones but whose codes may be spread "
    "otherwise.",
]


def compressed(path: Path, checkpoint: Path, recipe: str, classes: int) -> Path:
    """The small file of a checkpoint, as `fairseq-qn compress` makes it; with a head and without the LM head
    for `classes`.
    """
    import fairseq_qn
    from fairseq_qn import hub

    folder = Path(__file__).parents[2] / "configs" / "recipes"
    model, _, _ = hub.load_checkpoint(checkpoint, None, str(folder / f"{recipe}.yaml"))
    if classes:
        model.register_classification_head("classes", num_classes=classes)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, path, drop=["encoder.lm_head"] if classes else [])
    return path


def bound(plan: dict[str, Any]) -> int:
    """Bits of everything that has to be there, in whole bytes a file: what no padding or header adds to."""
    from math import log2, prod

    parts, bits = plan["size"]["parts"], 0.0
    for entry in plan["layers"].values():
        each = entry.get("bits") or log2(entry["n_centroids"])
        bits += prod(entry["shape"]) / entry.get("block_size", 1) * each
    return int(bits / 8) + parts["codebooks"] + parts["dense"]


def entropy_bits(path: Path) -> float:
    """Order-0 entropy of the codes in bits a code, each layer by its own counts, over all layers of 8
    bits.
    """
    import torch

    from fairseq_qn.artifact import container

    tensors, plan = container.read(path)
    bits = n = 0.0
    for name, entry in plan["layers"].items():
        if entry.get("n_centroids") == 256:
            counts = torch.bincount(tensors[f"{name}/codes"].int(), minlength=256).double()
            bits += float((counts[counts > 0] * -(counts[counts > 0] / counts.sum()).log2()).sum())
            n += float(counts.sum())
    return bits / n


def peers(path: Path, checkpoint: Path) -> dict[str, int]:
    """Bytes of the same weights in other formats: those of the checkpoint, and the quantised ones as fairseq
    keeps them.
    """
    import safetensors.torch
    import torch

    from fairseq_qn.artifact import container
    from fairseq_qn.schemes.product import Product

    def saved(state: dict[str, torch.Tensor]) -> int:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        return buffer.tell()

    tensors, plan = container.read(path)
    kept = {*plan["layers"], *(name for name in tensors if "/" not in name)}
    state = torch.load(checkpoint, weights_only=True)["model"]
    # each tie once, nothing that the small file leaves out
    state = {name: state[name] for name in kept if name in state}
    half = {name: tensor.half() for name, tensor in state.items()}
    theirs = {name: tensor.float() for name, tensor in tensors.items() if not name.startswith("asset:")}
    for name, entry in plan["layers"].items():
        parts = {part: tensors[f"{name}/{part}"] for part in Product.layout(entry, "float16")}
        theirs[f"{name}/codes"] = Product.decode(entry, parts).codes.long()
    return {
        "torch.save fp32": saved(state), "torch.save fp16": saved(half),
        "safetensors fp16, zlib": len(zlib.compress(safetensors.torch.save(half))),
        "fairseq's iPQ (int64 codes)": saved(theirs),
    }  # fmt: skip


def sizes(args: argparse.Namespace, work: Path) -> None:
    """The table of bytes."""
    import fairseq_qn

    cases, rows = [], []
    for name, (size, recipe, classes) in SIZES.items():
        harness.progress(name)
        folder = work / name.replace(" ", "")
        checkpoint = checkpoints.write_checkpoint(folder, **size)
        path = compressed(folder / "m.qn.safetensors", checkpoint, recipe, classes)
        plan = fairseq_qn.inspect(path)
        parts, total, least = plan["size"]["parts"], path.stat().st_size, bound(plan)
        bits = entropy_bits(path)
        values = {harness.OURS: [total]} | {peer: [n] for peer, n in peers(path, checkpoint).items()}
        cases.append(
            harness.Case(name, values, float(least), "bound", "B", {"parts": parts, "bits_of_8": bits})
        )
        figures = [parts[key] for key in ("codes", "codebooks", "dense", "assets", "header")] + [
            total,
            least,
        ]
        rows.append([name, *(f"{n:,}" for n in figures), f"{total / least:.4f}", f"{bits:.3f}"])
    table = ["| " + " | ".join(row) + " |" for row in (HEADS, ["---"] * len(HEADS), *rows)]
    harness.report("file", "Bytes on the disk", cases, ["", *table, "", *NOTES], args)


def first_answers(answer: str, checkpoint: Path, path: Path, args: argparse.Namespace) -> None:
    """Seconds and peak memory from the file to the first answer, each run in a process of its own, in both
    orders.
    """
    from first_answer import HUB, LEAN, LEANEST, TOKENS

    import fairseq_qn

    script = Path(__file__).with_name("first_answer.py")
    files = {HUB: checkpoint, LEAN: checkpoint, LEANEST: checkpoint} | dict.fromkeys(MODES, path)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in files}
    for file in (checkpoint, path):
        file.read_bytes()  # into the page cache
    for turn in range(args.repeats):
        harness.progress(f"first {answer}, round {turn + 1} of {args.repeats}")
        for name in files if turn % 2 else reversed(files):
            runs[name].append(harness.run_fresh(script, name, files[name], "--answer", answer))
    weights = fairseq_qn.inspect(path)["size"]
    table = 50_265 * 768 if answer == "logits" else 0
    flops, cases = 2 * TOKENS * (85_054_464 + table), []
    for mode, width in MODES.items():
        memory = weights["dense_bytes"] * width / 4 if width else sum(weights["parts"].values())
        least = {"seconds": harness.roofline(flops, memory), "above imports": (memory, "the weights")}
        for what, unit in (("seconds", "s"), ("above imports", "B"), ("peak", "B")):
            values = {
                harness.OURS if name == mode else name: [run[what] for run in found]
                for name, found in runs.items()
                if name == mode or name not in MODES
            }
            cases.append(harness.Case(f"{mode}: {WHAT[what]}", values, *least.get(what, (None, "")), unit))
    notes = [
        f"{TOKENS} tokens, files in the page cache, imports aside; memory: the peak of what is resident."
    ]
    harness.report(
        f"file_{answer}",
        f"From a roberta_base file to the first {answer}",
        cases,
        notes,
        args,
        {"runs": runs},
    )


def main() -> None:
    """Measure what was asked for."""
    parser = harness.arguments("file")
    parser.add_argument(
        "--only", nargs="+", choices=["sizes", "features", "logits"], default=["sizes", "features", "logits"]
    )
    parser.add_argument("--work", type=Path, help="folder for checkpoints, kept; default: a temporary one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        if "sizes" in args.only:
            sizes(args, work)
        folder = work / "roberta_base"
        for answer in [answer for answer in ("features", "logits") if answer in args.only]:
            checkpoint, path = checkpoints.write_checkpoint(folder), folder / "m.qn.safetensors"
            first_answers(
                answer,
                checkpoint,
                path if path.exists() else compressed(path, checkpoint, "roberta", 0),
                args,
            )


if __name__ == "__main__":
    main()
