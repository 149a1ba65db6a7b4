"""The command line, fairseq-qn: what each command takes. What it does stands in commands/, loaded when asked
for.

Exit status 0: done. 1: the input is bad, said in one line on stderr (one for each line that `predict` cannot
answer). 2: wrong usage.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairseq_qn.commands.common import complain
from fairseq_qn.errors import QNError
from fairseq_qn.lazy_import import postpone
from fairseq_qn.version import __version__

PREDICT = """Answer sentences: labels or a value, fillings of <mask>, translations or continuations.

Lines are answered --batch at a time, in their order; --batch 1 answers each line as it comes. Those of more
tokens than the model has positions are cut, which is said in one line at the end. What cannot be answered
(not UTF-8; too long with --no-cut, with <mask>, or to translate) is named by number on stderr, the rest is
answered, and the exit status is 1. An empty line is answered as any other.
"""


EVALUATE = """Score the answers to labelled sentences, and how fast they come.

TSV: UTF-8 lines of label<TAB>sentence or label<TAB>sentence<TAB>second sentence. A first line of names
(label or score; sentence; sentence2) is a header, and may put the columns in another order. Classes:
accuracy and macro F1 in percent. A head of one output: Pearson's and Spearman's correlation. --against:
agreement, the percent of sentences with the same answer (numbers: Pearson's correlation of both answers).
Time: median milliseconds a sentence, from text to answer. A checkpoint without a BPE of its own
takes that of --bpe, or of the file that it is compared with.
"""


DATA = """Labelled sentences, pairs or numbers -> what fairseq's sentence_prediction reads.

Numbers are regressed where one of them is not written as a whole number, or with --labels numbers. The
folder's README.md says what lies there, and with which fairseq-train command to train on it.
"""
TRAIN = """From a model and labelled sentences to the small file, by stock fairseq-train: fine-tuning, then
noise and stages taught by the fine-tuned model.

Prints the commands, and leaves them as train.sh in the folder of work, to be changed and run. Killed and
called again it goes on.
"""


LATER = (
    "torch", "numpy", "fairseq_qn.quant.reading",  # which a header or a recipe can be read without
    # with which fairseq loads scikit-learn and scipy, a quarter of what `predict` loads
    "fairseq.criterions.sentence_prediction", "fairseq.criterions.sentence_prediction_adapters",
    "fairseq.tasks.audio_classification",
)  # fmt: skip
# What a small file is answered without, a third of the start. It names our own classes alone, so none of
# fairseq's is looked up by its name; what is left out of torch is for its compilers.
LATER_FOR_ANSWERS = (
    "fairseq.models.*", "fairseq.tasks.*", "fairseq.criterions.*", "fairseq.scoring.*",
    "fairseq.optim.*", "fairseq.model_parallel", "fairseq.logging.progress_bar", "hydra.utils",
    "torch._meta_registrations", "torch._decomp", "torch.export", "torch.nested",
)  # fmt: skip


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
    if argv is None:  # a program of its own
        gc.set_threshold(100_000, 20, 100)  # imports make objects that stay: a tenth of the start
        postpone(*LATER)
        if args.command == "predict" and args.file.suffix == ".safetensors":
            postpone(*LATER_FOR_ANSWERS)
        logging.basicConfig(level=logging.WARNING)  # before fairseq asks for more
    try:
        if getattr(args, "recipe", None):
            from fairseq_qn.recipe import Recipe

            Recipe.load(args.recipe)  # refused before a command loads torch and fairseq
        command = importlib.import_module(f"fairseq_qn.commands.{args.command}")  # with what it needs, alone
        return command.run(args) or 0
    except BrokenPipeError:
        raise
    except (QNError, OSError) as error:
        complain(error)
        return 1


def _count(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return int(text)


def _kept(text: str) -> tuple[str, str | list[int]]:
    """(stack or "", layers to keep) of --prune, for argparse."""
    match = re.fullmatch(r"(?:(encoder|decoder)=)?(every_other|\d{1,5}(?:,\d{1,5})*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected every_other or numbers such as 0,2,4, found {text!r}")
    return match[1] or "", match[2] if match[2] == "every_other" else [int(n) for n in match[2].split(",")]


def _add_bpe(sub: argparse.ArgumentParser) -> None:
    names = "sentencepiece, gpt2, qn_wordpiece, fastbpe, subword_nmt"
    sub.add_argument("--bpe", help=f"{names}; default: the model's own")
    sub.add_argument(
        "--bpe-files", nargs="+", type=Path, default=[], metavar="FILE", help="its model and vocabulary"
    )
    sub.add_argument(
        "--bpe-option", action="append", default=[], metavar="KEY=VALUE", help="e.g. wordpiece_cased=true"
    )


def _add_answering(sub: argparse.ArgumentParser) -> None:
    """What `predict` and `evaluate` share."""
    sub.add_argument("file", type=Path, help="a small file, a folder with one, or a checkpoint (.pt)")
    sub.add_argument("--mode", choices=("dense", "packed"), default="dense")
    sub.add_argument("--head", help="classification head; default: the first")
    sub.add_argument("--batch", type=_count, default=64, metavar="N", help="sentences at a time")
    sub.add_argument(
        "--no-cut", action="store_true", help="refuse sentences of too many tokens instead of cutting them"
    )
    sub.add_argument("--data-dir", metavar="DIR", help="dictionaries of a checkpoint; default: its own")
    _add_bpe(sub)


def _add_hub(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    sub = command("card", "A model card for the Hub: sizes, scores, recipe, how to load.")
    sub.add_argument("file", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the card, README.md")
    sub.add_argument("--licence", "--license", metavar="L", help="of the weights, e.g. apache-2.0; required")
    sub.add_argument("--scores", type=Path, metavar="JSON", help="what evaluate --json printed")
    sub.add_argument("--name", help="of the model; default: the file's")
    sub = command("push", "A folder with a small file and its README.md -> a repository of the Hub.")
    sub.add_argument("folder", type=Path)
    sub.add_argument("repository", help="OWNER/NAME; made if it is not there")
    sub.add_argument("--private", action="store_true", help="make it a private one")
    sub = command("pull", "A repository of the Hub -> a folder, its small files checked.")
    sub.add_argument("repository", help="OWNER/NAME")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--revision", help="branch, tag or commit")


class _Intermixed(argparse.ArgumentParser):
    """Takes options before, between and after the other words."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.parse_known_args = super().parse_known_args  # which the next line calls
        return self.parse_known_intermixed_args(args, namespace)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fairseq-qn", description="Extreme compression of fairseq models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Intermixed)

    def command(name: str, description: str) -> argparse.ArgumentParser:
        first = description.partition("\n")[0]
        sub = commands.add_parser(name, help=first, description=description)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(command=name.replace("-", "_"))
        return sub

    sub = command(
        "compress",
        "A checkpoint of fairseq's -> the small file. What the training has not frozen yet is frozen here.",
    )
    sub.add_argument("checkpoint", type=Path, help="fairseq checkpoint (.pt), of a stock or a qn_ model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the small file, *.qn.safetensors")
    sub.add_argument("--recipe", help="YAML file, or a name that `recipes` lists; default: the checkpoint's")
    sub.add_argument("--data", help="folder with the dictionaries; default: the checkpoint's")
    sub.add_argument(
        "--parts",
        choices=("float16", "float32"),
        default="float16",
        help="dtype of codebooks and the dense rest",
    )
    sub.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="MODULE",
        help="leave out; default: what a classifier never asks",
    )
    sub.add_argument(
        "--prune",
        action="append",
        default=[],
        type=_kept,
        metavar="KEEP",
        help="layers to keep: every_other, or 0,2,4; of one stack: decoder=0,2; default: the recipe's",
    )
    sub.add_argument("--keep-head", action="store_true", help="keep a classifier's LM head (fill_mask)")
    sub.add_argument(
        "--coder",
        choices=("ans",),
        help="entropy coding, where it is smaller; needs the library constriction",
    )
    _add_bpe(sub)
    sub.add_argument("--iterations", type=_count, default=20, help="iterations of k-means")
    sub.add_argument("--seed", type=int, help="of k-means; default: the training's")
    sub = command("data", DATA)
    sub.add_argument("train", type=Path, help="lines of label<TAB>sentence[<TAB>second sentence]")
    sub.add_argument("valid", type=Path, help="likewise, to validate")
    sub.add_argument("-o", "--output", type=Path, required=True, help="a new folder")
    _labelled(sub)
    sub = command("train", TRAIN)
    sub.add_argument("--train", type=Path, required=True, help="label<TAB>sentence[<TAB>second sentence]")
    sub.add_argument("--valid", type=Path, required=True, help="likewise, to validate while training")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the small file, *.qn.safetensors")
    _labelled(sub)
    sub.add_argument("--recipe", help="YAML recipe, or a ready one by name; default: minilm")
    sub.add_argument("--epochs", type=_count, help="of dense fine-tuning; stages scale with it")
    sub.add_argument("--lr", type=float, help="learning rate; default: by the width of the encoder")
    sub.add_argument(
        "--size-weight", type=float, default=0.0, help="of the penalty on learned widths, for each MiB"
    )
    sub.add_argument("--work", type=Path, help="folder of data, logs and checkpoints; default: FILE.work")
    sub.add_argument("--dry-run", action="store_true", help="print what would be run, and write nothing")
    sub = command("inspect", "What is in a file, from its header.")
    sub.add_argument("file", type=Path)
    sub.add_argument("--all", action="store_true", help="list every layer")
    sub = command(
        "verify", "Read a whole file, check every digest, and build its model where the file says how."
    )
    sub.add_argument("file", type=Path)
    sub.add_argument("--mode", choices=("dense", "packed"), default="dense")
    sub = command("predict", PREDICT)
    _add_answering(sub)
    sub.add_argument(
        "sentence", nargs="*", help="default: lines of stdin; a tab separates the sentences of a pair"
    )
    sub.add_argument("--input", type=Path, metavar="FILE", help="a sentence or a pair a line, instead")
    sub.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines there, when all is done")
    sub.add_argument("--top", type=_count, default=3, help="answers a sentence")
    sub.add_argument("--beam", type=_count, default=5, help="hypotheses of a translation or continuation")
    sub = command("evaluate", EVALUATE)
    _add_answering(sub)
    sub.add_argument("--data", type=Path, required=True, metavar="TSV", help="labelled sentences")
    sub.add_argument("--against", type=Path, metavar="FILE", help="another file or checkpoint (.pt)")
    _add_hub(command)
    sub = command(
        "import-hf", "A Hugging Face BERT or RoBERTa folder -> a fairseq checkpoint and dictionary."
    )
    sub.add_argument("folder", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, help="the checkpoint, e.g. DIR/model.pt")
    sub = command("export-hf", "A qn_roberta, from a small file or a checkpoint -> a Hugging Face folder.")
    sub.add_argument("file", type=Path, help="a small file, or a checkpoint (.pt)")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the folder")
    sub.add_argument("--config", type=Path, metavar="FOLDER", help="the imported one: its tokeniser files")
    sub.add_argument("--data", help="folder with the dictionaries of a checkpoint; default: its own")
    sub = command(
        "export-fairseq", "A checkpoint of a qn_ model -> one that stock fairseq loads without the plugin."
    )
    sub.add_argument("checkpoint", type=Path, help="fairseq checkpoint (.pt) of a qn_ model")
    sub.add_argument("-o", "--output", type=Path, required=True, help="the stock checkpoint")
    sub.add_argument("--data", help="folder with the dictionaries; default: the checkpoint's")
    command("recipes", "The ready recipes by name, and what each is for.")
    command("user-dir", "The folder that fairseq's --user-dir takes, wherever the package is installed.")
    return parser


def _labelled(sub: argparse.ArgumentParser) -> None:
    """Arguments of the commands that read labelled sentences for a model."""
    sub.add_argument(
        "--model", type=Path, required=True, help="Hugging Face folder, fairseq checkpoint or small file"
    )
    sub.add_argument("--test", type=Path, help="a third set; `train` then measures on it")
    sub.add_argument("--head", default="sentence_classification_head", help="name of the head")
    sub.add_argument("--labels", choices=("classes", "numbers"), help="default: by what they look like")
    _add_bpe(sub)
    sub.add_argument("--seed", type=int, default=1)


if __name__ == "__main__":
    sys.exit(main())
