"""`fairseq-qn pull`."""

from __future__ import annotations

import argparse
import json

from fairseq_qn import api
from fairseq_qn.commands.common import hub_client, hub_says
from fairseq_qn.commands.push import CARRIED
from fairseq_qn.errors import FormatError


def run(args: argparse.Namespace) -> None:
    """A repository of the Hub -> a folder; its small files are checked, each digest too."""
    client = hub_client()
    with hub_says(args.repository):
        client.snapshot_download(
            args.repository, local_dir=args.folder, revision=args.revision, allow_patterns=CARRIED
        )
    files = sorted(args.folder.glob(CARRIED[0]))
    if not files:
        raise FormatError(f"{args.repository}: expected a *.qn.safetensors file in it, found none")
    for file in files:
        api.read(file)
    names = [str(file) for file in files]
    print(json.dumps({"files": names}) if args.json else "\n".join(f"{name}: good" for name in names))
