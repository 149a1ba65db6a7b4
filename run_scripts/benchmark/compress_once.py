"""One run of `fairseq-qn compress` in this process, or of a peer: compress_once.py CONTENDER CHECKPOINT
RECIPE OUT.

The last line of stdout is JSON: seconds of each step.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def command(checkpoint: str, recipe: str, out: str) -> dict[str, Any]:
    """The command itself."""
    from fairseq_qn import cli

    options = ["--data", str(Path(checkpoint).parent), "--recipe", recipe, "-o", out, "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main(["compress", checkpoint, *options])
    if status:
        raise SystemExit(status)
    return {}


def steps(checkpoint: str, recipe: str, out: str) -> dict[str, float]:
    """What the command does, step by step, with the seconds of each; k-means by stage of the recipe."""
    began = time.perf_counter()
    from fairseq_qn import api, hub

    imported = time.perf_counter()
    model, _, _ = hub.load_checkpoint(checkpoint, str(Path(checkpoint).parent), recipe)
    loaded = time.perf_counter()
    reports = api.freeze(model)
    frozen = time.perf_counter()
    api.save(model, out)
    seconds = {"import": imported - began, "load": loaded - imported}
    for stage in dict.fromkeys(report.stage for report in reports):
        seconds[f"k-means, {stage}"] = sum(report.seconds for report in reports if report.stage == stage)
    learned = sum(report.seconds for report in reports)
    return seconds | {
        "freeze beside k-means": frozen - loaded - learned,
        "encode and save": time.perf_counter() - frozen,
    }


def plain(checkpoint: str, recipe: str, out: str) -> dict[str, Any]:
    """The command without the compiled kernels."""
    from fairseq_qn.kernels import native

    native.library = lambda: None
    return command(checkpoint, recipe, out)


def with_faiss(checkpoint: str, recipe: str, out: str) -> dict[str, Any]:
    """The command with faiss' k-means in place of ours, on the same blocks."""
    import faiss

    from fairseq_qn.quant import product
    from fairseq_qn.quant.kmeans import Clusters

    def kmeans(x: torch.Tensor, k: int, *, iterations: int, seed: int, **_: Any) -> Clusters:
        blocks = x.float().contiguous()
        found = faiss.Kmeans(
            x.shape[1], k, niter=iterations, nredo=1, seed=seed % 2**31, max_points_per_centroid=len(x)
        )
        found.train(blocks.numpy())
        distances, codes = found.index.search(blocks.numpy(), 1)
        codes = torch.from_numpy(codes[:, 0]).int()
        codebook = torch.from_numpy(found.centroids)
        return Clusters(codes, codebook, (float(distances.sum()),), float(blocks.square().sum()))

    faiss.omp_set_num_threads(torch.get_num_threads())
    product.kmeans = kmeans
    return command(checkpoint, recipe, out)


def torch_save(checkpoint: str, recipe: str, out: str) -> dict[str, Any]:
    """The least that a command can do with a checkpoint: read it and write its model as it is."""
    torch.serialization.add_safe_globals([Namespace])  # the options of a checkpoint
    torch.save(torch.load(checkpoint, map_location="cpu", weights_only=True)["model"], out)
    return {}


CONTENDERS = {
    "command": command,
    "steps": steps,
    "plain": plain,
    "faiss": with_faiss,
    "torch.save": torch_save,
}

if __name__ == "__main__":
    print(json.dumps(CONTENDERS[sys.argv[1]](*sys.argv[2:])))
