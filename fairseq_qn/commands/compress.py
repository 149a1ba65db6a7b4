"""`fairseq-qn compress`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from fairseq_qn import api
from fairseq_qn.artifact.replacing import refuse_same
from fairseq_qn.commands.common import carried, complain, hub
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.activations import refuse_unseen
from fairseq_qn.modules.pruning import STACKS
from fairseq_qn.modules.sharing import places
from fairseq_qn.modules.view import views_of


def run(args: argparse.Namespace) -> None:
    """A checkpoint of fairseq's -> the small file. What the training has not frozen yet is frozen here."""
    ours = hub()
    refuse_same(args.output, args.checkpoint, args.recipe, *args.bpe_files)
    model, config, task = ours.load_checkpoint(args.checkpoint, args.data, args.recipe)
    if api.recipe_of(model) is None:
        raise UnsupportedError(
            f"{args.checkpoint}: carries no recipe, none was trained with; give one, e.g. --recipe roberta"
        )
    model, kept = _pruned(model, args.prune)
    source, assets = carried(args)
    if not source:
        source, assets = ours.text_of(args.checkpoint)
    drop = args.drop or ([] if args.keep_head else getattr(model, "qn_unused", list)())
    saved = {"parts": args.parts, "drop": drop, "assets": assets, "source": source, "coder": args.coder}
    refuse_unseen(model, drop)
    api.predict_size(model, **saved)  # refuses, before k-means, what `save` would refuse after
    if args.seed is not None:
        for view in views_of(model):
            view.clock.seed = args.seed
    reports = api.freeze(model, iterations=args.iterations, progress=None if args.json else _progress)
    unreached = [
        stage for stage in getattr(task, "boundaries", {}) if any(r.stage == stage for r in reports)
    ]
    if unreached:
        count = sum(report.stage in unreached for report in reports)
        print(
            f"fairseq-qn: {args.checkpoint}: the training did not reach stages {', '.join(unreached)}: "
            f"{count} layers frozen here, with no training after; take a later checkpoint, or train on",
            file=sys.stderr,
        )
    size = api.save(model, args.output, **saved)
    if not source:
        complain(
            f"{args.output}: no BPE inside, so it will not answer text; add --bpe NAME --bpe-files FILE"
        )
    if args.json:
        layers = [vars(report) for report in reports]
        report = {
            "file": str(args.output),
            "size": size.to_dict(),
            "frozen_here": layers,
            "unreached": unreached,
            "dropped": drop,
            "kept": kept,
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
    for name, numbers in kept.items():
        print(f"{name}: kept layers {', '.join(map(str, numbers))}")
    if drop and not args.drop:
        print(f"left out: {', '.join(drop)}, which no classification asks (--keep-head keeps it)")
    print(f"{args.output}: {size}")


def _pruned(whole: Any, asked: Sequence[tuple[str, Any]]) -> tuple[Any, dict[str, list[int]]]:
    """The model without the layers that --prune, or else its recipe, leaves out; the numbers of those that
    are left, by stacks that lost some.
    """
    model = whole if asked else api.prune(whole)
    for side, keep in asked:
        model = api.prune(model, keep, rf"{side}\..*layers" if side else STACKS)
    stacks = {name: part for name, part in model.named_modules() if "_qn_places" in part.__dict__}
    found = {name: [*places(part).numbers] for name, part in stacks.items()}
    return model, {n: kept for n, kept in found.items() if len(kept) < len(whole.get_submodule(n))}


def _progress(views: Sequence[Any]) -> Any:
    from tqdm import tqdm

    return tqdm(views, desc="learning codebooks", unit="layer", leave=False, disable=None if views else True)
