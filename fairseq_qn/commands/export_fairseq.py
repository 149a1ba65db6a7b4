"""`fairseq-qn export-fairseq`."""

from __future__ import annotations

import argparse
import json

from fairseq_qn.commands.common import hub


def run(args: argparse.Namespace) -> None:
    """A checkpoint of a qn_ model -> one that stock fairseq loads without the plugin."""
    report = hub().export_fairseq(args.checkpoint, args.output, args.data)
    if args.json:
        print(json.dumps(report))
        return
    decoded = (
        f"{report['frozen_layers']} frozen layers decoded"
        if report["frozen_layers"]
        else "weights as they are"
    )
    print("\n".join(filter(None, (f"{args.output}: {report['architecture']}, {decoded}", report["note"]))))
