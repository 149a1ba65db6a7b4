"""`fairseq-qn data`, and the same as the first step of `fairseq-qn train`."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from fairseq_qn.commands.common import bpe_options, hub, shown, user_dir
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.interop.tsv import read_tsv, values
from fairseq_qn.models.options import BPE_FILES

HEAD = "sentence_classification_head"  # fairseq's default name
README = """# Data for fairseq's sentence_prediction, made by `fairseq-qn data`

| path | what it is |
| --- | --- |
| `input0/`, `input1/` | the sentences, of pairs the second ones, as ids: `SPLIT.bin` and `SPLIT.idx` (fairseq's mmap format) and `dict.txt`, the model's dictionary. No `<s>` yet: `--init-token` and `--separator-token` add it |
| `label/` | {labels} |
| `model/` | the BPE's files, and, unless training starts from a checkpoint, `model.pt` and `dict.txt` |
| `data.json` | counts, labels, BPE and options, for programs |

Splits: {splits}. `train` is sorted by length, in random order among equals: `--no-shuffle` keeps neighbours
together in a batch, and fairseq shuffles the batches. Sentences beyond {limit} tokens were cut.

    {command}
"""  # noqa: E501
CLASSES = (
    "the classes: `dict.txt` has one a line, in the order of the head's outputs; sets as above, one id a row"
)
NUMBERS = "the numbers to learn, one a line: `SPLIT.label`"


@dataclass(frozen=True)
class Prepared:
    """What lies in a folder of data: all that a fairseq-train command has to know. Paths are absolute."""

    checkpoint: str
    model_options: list[str]
    width: int
    max_positions: int
    bpe: str
    bpe_files: list[str]
    bpe_options: list[str]
    head: str
    labels: list[str] | None  # None: numbers
    fine_tuned: bool
    sets: dict[str, dict[str, int]]

    @property
    def task_options(self) -> list[str]:
        """The words of a fairseq-train command that belong to the task and its data."""
        words = f"--task qn_sentence_prediction --num-classes {len(self.labels or [''])}".split()
        words += "--init-token 0 --separator-token 2 --no-shuffle".split()
        if self.head != HEAD:
            words += ["--classification-head-name", self.head]
        return words if self.labels is not None else [*words, "--regression-target"]

    @property
    def bpe_words(self) -> list[str]:
        """The words of a `fairseq-qn compress` command that take the BPE along."""
        words = ["--bpe", self.bpe, "--bpe-files", *self.bpe_files]
        return [*words, *(w for option in self.bpe_options for w in ("--bpe-option", option))]

    @property
    def checkpoint_bpe_words(self) -> list[str]:
        """The words of a fairseq-train command by which its checkpoints know their BPE."""
        endings = BPE_FILES[self.bpe].items()
        files = {option: next(f for f in self.bpe_files if f.endswith(ending)) for option, ending in endings}
        given = {**files, **dict(option.split("=", 1) for option in self.bpe_options)}
        words = ["--bpe", self.bpe]
        for option, value in given.items():
            flag = f"--{option.replace('_', '-')}"
            words += {"true": [flag], "false": []}.get(value, [flag, value])
        return words

    @property
    def start_options(self) -> list[str]:
        """The words that start training from this model."""
        return ["--finetune-from-model", self.checkpoint, *self.model_options]


def run(args: argparse.Namespace) -> None:
    """Labelled sentences -> what fairseq's sentence_prediction reads."""
    done = prepare(args, Path(args.output))
    if args.json:
        print(json.dumps({"folder": str(args.output), **asdict(done)}))
        return
    print(summary(done))
    print(f"{args.output}/README.md says what lies there, and how to train on it")


def summary(done: Prepared) -> str:
    """What was read and made, in a few lines."""
    what = "numbers" if done.labels is None else f"{len(done.labels):,} classes"
    lines = [f"{what}, head {done.head}; BPE {done.bpe}, up to {done.max_positions} tokens"]
    for name, size in done.sets.items():
        notes = [f"{size['rows']:,} rows, {size['tokens']:,} tokens, longest {size['longest']}"]
        notes += [f"{size['cut']:,} cut"] if size["cut"] else []
        notes += [f"{size['unknown']:,} pieces unknown"] if size["unknown"] else []
        lines.append(f"{name}: {', '.join(notes)}")
    return "\n".join(lines)


def prepare(args: argparse.Namespace, folder: Path) -> Prepared:
    """Read the sets and the model, and write the folder, all of it or nothing.

    args: model, train, valid, test, head, labels, bpe, bpe_files, bpe_option, seed. Raises QNError, OSError.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnsupportedError(f"{folder}: expected a new or an empty folder, found something in it")
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        done = _write(args, partial, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _write(args: argparse.Namespace, folder: Path, final: Path) -> Prepared:
    hub()  # fairseq, or a line why not
    from fairseq_qn.models import starting
    from fairseq_qn.tasks import sentence_data

    paths = {"train": args.train, "valid": args.valid, **({"test": args.test} if args.test else {})}
    sets = {name: read_tsv(path) for name, path in paths.items()}
    sentence_data.check_columns(sets, paths)
    numbers = args.labels == "numbers" or (
        args.labels is None and all(sentence_data.are_numbers(rows, paths[n]) for n, rows in sets.items())
    )
    names = None
    if numbers:
        for name, rows in sets.items():
            values(rows, paths[name])
    else:
        names = sentence_data.label_names(sets["train"], args.train)
        for name in sets.keys() - {"train"}:
            sentence_data.check_known(sets[name], names, paths[name], args.train)
    given = None
    if args.bpe:
        given = starting.bpe_of(args.bpe, args.bpe_files, bpe_options(args.bpe_option))
    start = starting.start_from(args.model, folder / "model", given)
    trained = start.trained_head == args.head and start.heads.get(args.head) == len(names or [""])
    if names is not None and trained and {*start.labels} == {*names}:
        names = list(start.labels)  # in the order of the outputs that are there
    sizes = sentence_data.write_sets(
        folder, sets, names, start.dictionary, start.bpe.build().encode, start.max_positions, args.seed
    )
    moved = lambda path: str(final / path.relative_to(folder) if folder in path.parents else path.resolve())  # noqa: E731
    done = Prepared(
        checkpoint=moved(start.checkpoint),
        model_options=[*start.options],
        width=start.width,
        max_positions=start.max_positions,
        bpe=start.bpe.name,
        bpe_files=[moved(file) for file in start.bpe.files],
        bpe_options=[
            f"{k}={str(v).lower() if v in (True, False) else v}" for k, v in start.bpe.options.items()
        ],
        head=args.head,
        labels=names,
        fine_tuned=trained and (start.regression if names is None else names == list(start.labels)),
        sets={name: asdict(size) for name, size in sizes.items()},
    )
    (folder / "data.json").write_text(json.dumps(asdict(done), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(done, final), encoding="utf-8")
    return done


def _readme(done: Prepared, folder: Path) -> str:
    start = ["fairseq-train", str(folder), "--user-dir", user_dir(), *done.task_options, *done.start_options]
    rest = "--criterion sentence_prediction --batch-size 32 --optimizer adam --lr 1e-4 --max-epoch 4"
    splits = ", ".join(f"`{name}` ({size['rows']:,} rows)" for name, size in done.sets.items())
    return README.format(
        labels=NUMBERS if done.labels is None else CLASSES,
        splits=splits,
        limit=done.max_positions,
        command=shown([*start, *rest.split(), "--save-dir", "checkpoints"]).replace("\n", "\n    "),
    )
