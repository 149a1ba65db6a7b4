"""fairseq-qn: compress, inspect, verify, predict, import-hf, export-fairseq.

Exit status 0: done. 1: the input is bad, said in one line on stderr (one for each line that `predict` cannot
answer). 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fairseq_qn import api
from fairseq_qn.artifact.replacing import refuse_same
from fairseq_qn.errors import QNError, UnsupportedError, one_line
from fairseq_qn.report import SizeReport, mb, table
from fairseq_qn.schemes import SCHEMES


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status."""
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has had enough: | head -1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 0


def _run(argv: Sequence[str] | None) -> int:
    args = _parser().parse_args(argv)
    try:
        return args.command(args) or 0
    except BrokenPipeError:
        raise
    except (QNError, OSError) as error:
        _complain(error)
        return 1


def _complain(what: object) -> None:
    print(f"fairseq-qn: {one_line(str(what))}", file=sys.stderr)


def compress(args: argparse.Namespace) -> None:
    """A checkpoint of fairseq's -> the small file. What the training has not frozen yet is frozen here."""
    hub = _hub()
    refuse_same(args.output, args.checkpoint, args.recipe, *args.bpe_files)
    model, config, task = hub.load_checkpoint(args.checkpoint, args.data, args.recipe)
    if api.recipe_of(model) is None:
        raise UnsupportedError(f"{args.checkpoint}: carries no recipe; give one with --recipe")
    source, assets = (
        hub.carry_bpe(args.bpe, args.bpe_files, _options(args.bpe_option)) if args.bpe else ({}, {})
    )
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


def inspect(args: argparse.Namespace) -> None:
    """What is in a file, from its header."""
    data = api.inspect(args.file)
    if args.json:
        print(json.dumps(data))
        return
    size = SizeReport(**{key: value for key, value in data["size"].items() if key != "ratio"})
    model = (data["source"] or {}).get("model")
    name = model.get("_name") if isinstance(model, dict) else None
    print(f"{args.file}: {data['producer']}, format {data['version']}, {name or 'a model of your own'}")
    print(f"{str(size).partition(': ')[0]}\n")  # its parts are a table of their own
    print(
        table(
            [(name, f"{n:,}", f"{n / size.total:.1%}") for name, n in size.parts.items()],
            ("part", "bytes", "share"),
        )
    )
    print()
    print(
        table(
            [_row(name, n, data) for name, n in _largest(size.layers, args.all)],
            ("layer", "how", "shape", "bytes"),
        )
    )
    left = len(size.layers) - len(_largest(size.layers, args.all))
    if left:
        print(f"... and {left} smaller; --all lists them")
    for first, *others in data["ties"]:
        print(f"tied: {first} = {', '.join(others)}")


def verify(args: argparse.Namespace) -> None:
    """Read a whole file, check every digest, and build its model where the file says how."""
    file = api.read(args.file)
    parts = file.manifest["tensors"]
    built = "not built: the file does not say how"
    if file.manifest["source"]:
        model = file.load(args.mode)
        built = f"built {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} dense weights"
    result = {
        "file": str(args.file),
        "bytes": Path(args.file).stat().st_size,
        "tensors": len(parts),
        "model": built,
    }
    print(
        json.dumps(result)
        if args.json
        else f"{args.file}: good: {mb(result['bytes'])}, {len(parts)} tensors, {built}"
    )


def predict(args: argparse.Namespace) -> int:
    """Answer sentences: labels or the value of a classifier, fillings of <mask>, translations or
    continuations.

    What cannot be answered (too long, not UTF-8) is named by number on stderr, the rest is answered, and the
    exit status is 1. An empty line is answered as any other, so that answers stay in step with lines.
    """
    interface = _hub().load_interface(args.file, args.mode)
    if hasattr(interface, "classify"):  # what is wrong with every line is said once
        interface.encode("")
        if args.head:
            interface.labels_of(args.head)
    if not args.sentence:
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # as for the words of a command
    status = 0
    for number, line in enumerate(args.sentence or sys.stdin, 1):
        line = line.rstrip("\n")
        try:
            line.encode()
            answers = _answer(interface, line, args)
        except (QNError, UnicodeEncodeError) as error:
            why = "expected UTF-8, found other bytes" if isinstance(error, UnicodeEncodeError) else error
            _complain(f"{'sentence' if args.sentence else 'line'} {number}: {why}")
            status = 1
            continue
        if args.json:
            print(
                json.dumps(
                    {"input": line, "answers": [{"text": text, "score": score} for text, score in answers]}
                )
            )
            continue
        print(line)
        for text, score in answers:
            print(f"  {text}" if score is None else f"  {score:7.2%}  {text}")
    return status


def import_hf(args: argparse.Namespace) -> None:
    """A Hugging Face BERT or RoBERTa folder -> a fairseq checkpoint and dictionary."""
    from fairseq_qn.interop.hf import import_hf as run

    report = run(args.folder, args.output)
    print(json.dumps(vars(report), default=str) if args.json else report)


def export_fairseq(args: argparse.Namespace) -> None:
    """A checkpoint of a qn_ model -> one that stock fairseq loads without the plugin."""
    report = _hub().export_fairseq(args.checkpoint, args.output, args.data)
    if args.json:
        print(json.dumps(report))
        return
    decoded = (
        f"{report['frozen_layers']} frozen layers decoded"
        if report["frozen_layers"]
        else "weights as they are"
    )
    print("\n".join(filter(None, (f"{args.output}: {report['architecture']}, {decoded}", report["note"]))))


def _answer(interface: Any, line: str, args: argparse.Namespace) -> list[tuple[str, float | None]]:
    if not hasattr(interface, "classify"):
        return [(interface.translate(line, beam=args.beam), None)]
    if "<mask>" in line:
        return [(text, score) for text, score, _ in interface.fill_mask(line, topk=args.top)]
    sentences = line.split("\t")
    if interface.is_regression(args.head):
        return [(f"{interface.regress(*sentences, head=args.head):.4f}", None)]
    return interface.classify(*sentences, head=args.head)[: args.top]


def _hub() -> Any:
    try:
        from fairseq_qn import hub
    except ImportError as error:
        raise UnsupportedError(f"this command needs fairseq, which cannot be imported: {error}") from None
    return hub


def _row(name: str, size: int, data: dict[str, Any]) -> tuple[str, str, str, str]:
    entry = data["layers"].get(name)
    if entry is None:
        record = data["tensors"][name]
        return name, record["dtype"], "x".join(map(str, record["shape"])) or "-", f"{size:,}"
    how = SCHEMES[entry["scheme"]].label(entry)
    return name, how, "x".join(map(str, entry["shape"])), f"{size:,}"


def _largest(layers: dict[str, int], everything: bool) -> list[tuple[str, int]]:
    ordered = sorted(layers.items(), key=lambda item: (-item[1], item[0]))
    return ordered if everything else ordered[:20]


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UnsupportedError(f"--bpe-option: expected KEY=VALUE, found {pair!r}")
        options[key] = {"true": True, "false": False}.get(value.lower(), value)
    return options


def _progress(views: Sequence[Any]) -> Any:
    from tqdm import tqdm

    return tqdm(views, desc="learning codebooks", unit="layer", leave=False, disable=None if views else True)


def _count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


class _Intermixed(argparse.ArgumentParser):
    """Takes options before, between and after the other words."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.parse_known_args = super().parse_known_args  # which the next line calls
        return self.parse_known_intermixed_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-qn", description="Extreme compression of fairseq models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Intermixed)

    def command(name: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(command=run)
        return sub

    sub = command("compress", compress)
    sub.add_argument("checkpoint", type=Path, help="fairseq checkpoint (.pt), of a stock or a qn_ model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the small file, *.qn.safetensors")
    sub.add_argument("--recipe", help="YAML recipe; default: the one in the checkpoint")
    sub.add_argument("--data", help="folder with the dictionaries; default: the checkpoint's")
    sub.add_argument(
        "--parts",
        choices=("float16", "float32"),
        default="float16",
        help="dtype of codebooks and the dense rest",
    )
    sub.add_argument(
        "--drop", action="append", default=[], metavar="MODULE", help="leave out, e.g. encoder.lm_head"
    )
    sub.add_argument("--bpe", help="sentencepiece, gpt2, qn_wordpiece, fastbpe, subword_nmt")
    sub.add_argument(
        "--bpe-files", nargs="+", type=Path, default=[], metavar="FILE", help="travel inside the file"
    )
    sub.add_argument(
        "--bpe-option", action="append", default=[], metavar="KEY=VALUE", help="e.g. wordpiece_cased=true"
    )
    sub.add_argument("--iterations", type=_count, default=20, help="iterations of k-means")
    sub = command("inspect", inspect)
    sub.add_argument("file", type=Path)
    sub.add_argument("--all", action="store_true", help="list every layer")
    sub = command("verify", verify)
    sub.add_argument("file", type=Path)
    sub.add_argument("--mode", choices=("dense", "packed"), default="dense")
    sub = command("predict", predict)
    sub.add_argument("file", type=Path, help="a small file, or a folder with one")
    sub.add_argument(
        "sentence", nargs="*", help="default: lines of stdin; a tab separates the sentences of a pair"
    )
    sub.add_argument("--mode", choices=("dense", "packed"), default="dense")
    sub.add_argument("--head", help="classification head; default: the first")
    sub.add_argument("--top", type=_count, default=3, help="answers a sentence")
    sub.add_argument("--beam", type=_count, default=5, help="hypotheses of a translation or continuation")
    sub = command("import-hf", import_hf)
    sub.add_argument("folder", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint, e.g. DIR/model.pt")
    sub = command("export-fairseq", export_fairseq)
    sub.add_argument("checkpoint", type=Path, help="fairseq checkpoint (.pt) of a qn_ model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the stock checkpoint")
    sub.add_argument("--data", help="folder with the dictionaries; default: the checkpoint's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
