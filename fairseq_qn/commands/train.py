"""`fairseq-qn train`: from a model and labelled sentences to the small file, by stock fairseq-train."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fairseq_qn import api
from fairseq_qn.artifact.replacing import replacing
from fairseq_qn.cli import main
from fairseq_qn.commands.common import shown
from fairseq_qn.commands.data import Prepared, prepare, summary
from fairseq_qn.commands.plan import Step, script, steps
from fairseq_qn.commands.progress import SLOWER, Progress, duration, environment, watch
from fairseq_qn.commands.schedule import Schedule, schedule
from fairseq_qn.commands.score import Score, score
from fairseq_qn.config_dir import recipe_file
from fairseq_qn.errors import TrainingError, UnsupportedError
from fairseq_qn.plugin import quiet
from fairseq_qn.recipe import Recipe
from fairseq_qn.report import table

RECIPE = "minilm"  # found on a real encoder: for its reasons see configs/recipes/minilm.yaml
ROWS = {"dense": "dense, fp32", "at_once": "frozen at once", "small": "noise, then stages"}


def run(args: argparse.Namespace) -> None:
    """Import, data, fine-tuning, noise and stages, the small file, and what each is worth."""
    recipe = Recipe.load(args.recipe or RECIPE)  # says what is wrong, also that there is none
    text = recipe_file(args.recipe or RECIPE).read_text(encoding="utf-8")
    if args.output.is_dir():
        raise UnsupportedError(f"{args.output}: expected the name of a file, found a folder")
    work = args.work or args.output.with_name(f"{args.output.name.partition('.')[0]}.work")
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            data = prepare(args, Path(folder) / "data")
            made = [f"# {step.what}\n{shown(step.words)}" for step in _steps(data, recipe, work, args)]
            plan = _plan(data, _schedule(data, recipe, args))
            print("\n\n".join([plan, *made]).replace(str(Path(folder).resolve()), str(work.resolve())))
        return
    work.mkdir(parents=True, exist_ok=True)
    with _alone(work) as lock:
        _same(work, args, text)
        _say(args, f"work, logs and train.sh: {work}")
        done = work / "data" / "data.json"
        data = Prepared(**json.loads(done.read_text())) if done.is_file() else prepare(args, work / "data")
        _say(args, _plan(data, _schedule(data, recipe, args)))
        (work / "recipe.yaml").write_text(text, encoding="utf-8")
        made = _steps(data, recipe, work, args)
        if not (work / "train.sh").exists():  # it may have been changed
            (work / "train.sh").write_text(script(made, os.path.dirname(sys.executable)), encoding="utf-8")
            (work / "train.sh").chmod(0o755)
        _run(made, work, lock, args)
        rows = _scores(made, data, work, args)
    with replacing(work / "result.json") as file:
        file.write((json.dumps(rows, indent=1) + "\n").encode())
    print(
        json.dumps({"file": str(args.output), "work": str(work), "rows": rows})
        if args.json
        else _table(rows)
    )


def _schedule(data: Prepared, recipe: Recipe, args: argparse.Namespace) -> Schedule:
    train = data.sets["train"]
    return schedule(train["rows"], train["tokens"], data.width, len(recipe.stages), args.epochs, args.lr)


def _steps(data: Prepared, recipe: Recipe, work: Path, args: argparse.Namespace) -> list[Step]:
    import torch

    plan, cpu = _schedule(data, recipe, args), not torch.cuda.is_available()
    return steps(data, plan, work.resolve(), args.output.resolve(), args.seed, cpu, args.size_weight)


def _plan(data: Prepared, plan: Schedule) -> str:
    """What was read, and how long will be trained on it."""
    lines = [summary(data), f"an epoch: {plan.epoch:,} updates; learning rate {plan.rate:g}"]
    lines.append(f"dense: {plan.dense:,} updates")
    if data.fine_tuned:
        lines[-1] = "fine-tuned for these labels already: no dense fine-tuning"
    stages = ", ".join(f"{n:,}" for n in plan.stages)
    lines.append(f"with noise: {plan.staged:,} updates; a stage is frozen after each of {stages}")
    return "\n".join(lines)


def _run(made: Sequence[Step], work: Path, lock: int, args: argparse.Namespace) -> None:
    """The steps that are not done yet; each leaves a mark."""
    for i, step in enumerate(made):
        mark, log = work / f"{step.name}.done", work / f"{step.name}.log"
        if mark.exists() and (step.name != "small" or args.output.exists()):
            _say(args, f"{step.what}: done before")
            continue
        _say(args, f"\n# {step.what}\n{shown(step.words)}\n")
        begun, later = time.monotonic(), sum(s.updates for s in made[i + 1 :])
        after = SLOWER * later if step.name == "dense" else later
        watching = Progress(step.name, step.updates, after) if step.updates and not args.json else None
        if step.updates:
            watch(step.words, work, log, environment(), lock, watching)
        else:
            _here(step, log)
        took = duration(time.monotonic() - begun)
        mark.write_text(f"{took}\n")
        _say(args, f"{step.what}: {took}")


def _here(step: Step, log: Path) -> None:
    """One of our own commands, in this process: fairseq, once more, would take seconds."""
    logging.disable(logging.INFO)
    try:
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            status = main(step.words[1:])
    finally:
        logging.disable(logging.NOTSET)
    if status:
        raise TrainingError(f"{step.what}: fairseq-qn {step.words[1]} failed, for the reason above")


def _scores(
    made: Sequence[Step], data: Prepared, work: Path, args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """What each model weighs and answers, on the test set, or else the validation set."""
    rows = args.test or args.valid
    dense = next((step for step in made if step.name == "dense"), None)
    paths = {
        "dense": work / "dense" / "checkpoint_last.pt" if dense else Path(data.checkpoint),
        "at_once": work / "at_once.qn.safetensors",
        "small": args.output,
    }
    fp32 = api.inspect(paths["at_once"])["size"]["dense_bytes"]
    found = {}
    for name, path in paths.items():
        with quiet():
            got: Score = score(path, rows, data, work)
        size = fp32 if name == "dense" else os.path.getsize(path)
        found[name] = {
            "file": str(path),
            "bytes": size,
            got.measure: got.value,
            "rows": got.rows,
            "on": str(rows),
        }
        _say(args, f"{ROWS[name]}: {got.measure} {got.value:.2f}")
    return found


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    first = rows["dense"]
    measure = next(key for key in first if key in ("accuracy", "spearman"))
    lines = [
        (ROWS[name], f"{row['bytes']:,}", f"{first['bytes'] / row['bytes']:.1f}x", f"{row[measure]:.2f}",
         f"{row[measure] - first[measure]:+.2f}")
        for name, row in rows.items()
    ]  # fmt: skip
    try_it = shown(["fairseq-qn", "predict", rows["small"]["file"], "..."])
    head = ("", "bytes", "smaller", f"{measure}{' %' if measure == 'accuracy' else ' x 100'}", "change")
    return f"\n{table(lines, head)}\n{first['rows']:,} rows of {first['on']}\n{try_it}"


def _same(work: Path, args: argparse.Namespace, recipe: str) -> None:
    """Raise UnsupportedError where the folder holds another training than this one. Until there is data none
    does: what is wrong with a file of sentences may be mended.
    """
    texts = {name: Path(path).read_bytes() for name, path in (("train", args.train), ("valid", args.valid))}
    asked = {
        "model": str(Path(args.model).resolve()),
        **{name: hashlib.sha256(text).hexdigest() for name, text in texts.items()},
        "recipe": hashlib.sha256(recipe.encode()).hexdigest(),
        **{name: getattr(args, name) for name in ("epochs", "lr", "seed", "head", "labels", "bpe")},
        "size_weight": args.size_weight,
    }
    file = work / "asked.json"
    begun = file.is_file() and (work / "data").is_dir()
    before = json.loads(file.read_text()) if begun else asked
    before.setdefault("size_weight", 0.0)  # of a training that an older release began
    if differ := [name for name in asked if before.get(name) != asked[name]]:
        raise UnsupportedError(
            f"{work}: holds a training with another {', '.join(differ)}; go on with the same, give another "
            "--work, or delete the folder"
        )
    with replacing(file) as out:
        out.write(json.dumps(asked, indent=1).encode())


@contextlib.contextmanager
def _alone(work: Path) -> Iterator[int]:
    """A lock on the folder, which the commands that run in it hold as well."""
    with (work / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UnsupportedError(f"{work}: another training is at work there; wait for its end") from None
        yield file.fileno()


def _say(args: argparse.Namespace, text: str) -> None:
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)
