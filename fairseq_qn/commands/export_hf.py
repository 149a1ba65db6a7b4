"""`fairseq-qn export-hf`."""

from __future__ import annotations

import argparse
import json

from fairseq_qn import api
from fairseq_qn.commands.common import complain, hub
from fairseq_qn.interop.hf_export import export_hf
from fairseq_qn.modules.activations import placed


def run(args: argparse.Namespace) -> None:
    """A qn_roberta, from a small file or a checkpoint -> a Hugging Face folder."""
    ours = hub()
    if ours.is_small(args.file):
        file = api.read(ours.find_file(args.file))
        model, source, assets = file.load(), file.manifest["source"], file.assets
    else:
        model, _, _ = ours.load_checkpoint(args.file, args.data)
        source, assets = model.qn_describe()
    if placed(model):
        complain("transformers' model computes with inputs as they are, this one rounds them")
    report = export_hf(api.decoded_state_dict(model), source, assets, args.output, args.config)
    print(json.dumps(vars(report), default=str) if args.json else report)
