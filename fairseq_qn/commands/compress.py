"""`fairseq-qn compress`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from fairseq_qn import api
from fairseq_qn.artifact.replacing import refuse_same
from fairseq_qn.commands.common import carried, hub
from fairseq_qn.errors import UnsupportedError


def run(args: argparse.Namespace) -> None:
    """A checkpoint of fairseq's -> the small file. What the training has not frozen yet is frozen here."""
    ours = hub()
    refuse_same(args.output, args.checkpoint, args.recipe, *args.bpe_files)
    model, config, task = ours.load_checkpoint(args.checkpoint, args.data, args.recipe)
    if api.recipe_of(model) is None:
        raise UnsupportedError(f"{args.checkpoint}: carries no recipe; give one with --recipe")
    source, assets = carried(args)
    reports = api.freeze(model, iterations=args.iterations, progress=None if args.json else _progress)
    unreached = [
        stage for stage in getattr(task, "boundaries", {}) if any(r.stage == stage for r in reports)
    ]
    if unreached:
        count = sum(report.stage in unreached for report in reports)
        print(
            f"fairseq-qn: {args.checkpoint}: the training did not reach stages {', '.join(unreached)}: "
            f"{count} layers frozen "
            "here, with no training after; take a later checkpoint, or train on",
            file=sys.stderr,
        )
    size = api.save(model, args.output, parts=args.parts, drop=args.drop, assets=assets, source=source)
    if args.json:
        layers = [vars(report) for report in reports]
        report = {
            "file": str(args.output),
            "size": size.to_dict(),
            "frozen_here": layers,
            "unreached": unreached,
        }
        print(json.dumps(report))
        return
    if reports:
        worst = max(reports, key=lambda report: report.error)
        seconds = sum(report.seconds for report in reports)
        print(
            f"froze {len(reports)} layers in {seconds:.1f} s; largest relative error {worst.error:.4f} "
            f"({worst.name})"
        )
    print(f"{args.output}: {size}")


def _progress(views: Sequence[Any]) -> Any:
    from tqdm import tqdm

    return tqdm(views, desc="learning codebooks", unit="layer", leave=False, disable=None if views else True)
