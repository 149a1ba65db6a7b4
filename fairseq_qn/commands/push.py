"""`fairseq-qn push`."""

from __future__ import annotations

import argparse
import json

from fairseq_qn.commands.common import hub_client, hub_says
from fairseq_qn.errors import UnsupportedError

CARRIED = ["*.qn.safetensors", "README.md", "LICENSE*", "NOTICE*"]  # nothing else goes up or comes down


def run(args: argparse.Namespace) -> None:
    """A folder with a small file and its card -> a repository of the Hub."""
    if not args.folder.is_dir() or not [*args.folder.glob(CARRIED[0])]:
        raise UnsupportedError(f"{args.folder}: expected a folder with a *.qn.safetensors file")
    if not (args.folder / "README.md").is_file():
        raise UnsupportedError(
            f"{args.folder}: has no README.md; write one with "
            f"fairseq-qn card FILE -o {args.folder}/README.md --licence L"
        )
    client = hub_client()
    with hub_says(args.repository):
        client.create_repo(args.repository, private=args.private or None, exist_ok=True)
        client.upload_folder(
            repo_id=args.repository,
            folder_path=args.folder,
            allow_patterns=CARRIED,
            commit_message="Upload with fairseq-qn",
        )
    print(json.dumps({"repository": args.repository}) if args.json else f"{args.repository}: uploaded")
