"""The commands that `fairseq-qn train` runs, in order, and the script that it leaves."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fairseq_qn.commands.common import shown, user_dir
from fairseq_qn.commands.data import Prepared
from fairseq_qn.commands.schedule import BATCH, BATCH_TOKENS, Schedule

SCRIPT = """#!/usr/bin/env bash
# What `fairseq-qn train` runs, to be changed and run by hand. fairseq-train goes on from the
# checkpoint_last.pt of its --save-dir: delete that folder to train anew.
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"
export PATH={path}:"$PATH"
{commands}
"""
AT_ONCE = "at_once.qn.safetensors"


@dataclass(frozen=True)
class Step:
    """A command, run once, in the folder of work. updates: of a fairseq-train."""

    name: str
    what: str
    words: tuple[str, ...]
    updates: int = 0


def steps(
    data: Prepared, plan: Schedule, work: Path, output: Path, seed: int, cpu: bool, size_weight: float
) -> list[Step]:
    """The commands, which run in the folder of work. Paths of fairseq-qn's own are absolute."""
    made = []
    dense = data.checkpoint
    if not data.fine_tuned:
        words = [*_common(data, plan, work, seed, cpu), *_length("dense", plan.dense, plan.dense_warm_up, 0)]
        words += [*data.start_options, "--criterion", "sentence_prediction"]
        made.append(Step("dense", "fine-tuning, dense", (*words,), plan.dense))
        dense = "dense/checkpoint_last.pt"
    words = _common(data, plan, work, seed, cpu)
    words += _length("staged", plan.staged, plan.staged_warm_up, plan.end_rate)
    words += ["--finetune-from-model", dense, *data.model_options, "--quant-recipe", "recipe.yaml"]
    words += ["--quant-stage-updates", ",".join(map(str, plan.stages))]
    words += "--criterion quantization_aware --wrapped-criterion sentence_prediction".split()
    # 0.8 and 2.0 are minilm_mnli's, whose teacher is the dense model likewise
    words += ["--teacher-checkpoint", dense, *"--distill-weight 0.8 --distill-temperature 2.0".split()]
    if (
        size_weight
    ):  # Adam moves a logit by its rate an update, which falls to zero: 5 in all, from 8 bits to 2
        words += f"--size-weight {size_weight:g} --quant-logits-lr {10 / plan.staged:.2g}".split()
    made.append(Step("staged", "noise, then stages, taught by the dense model", (*words,), plan.staged))
    for name, what, source, target in (
        ("at_once", "the dense model frozen at once, to compare with", dense, work / AT_ONCE),
        ("small", "the small file", "staged/checkpoint_last.pt", output),
    ):
        words = ["fairseq-qn", "compress", str(work / source), "--recipe", str(work / "recipe.yaml")]
        words += ["--data", str(work / "data"), "-o", str(target)]
        made.append(Step(name, what, (*words, "--drop", "encoder.lm_head", *data.bpe_words)))
    return made


def _common(data: Prepared, plan: Schedule, work: Path, seed: int, cpu: bool) -> list[str]:
    """What both runs of fairseq-train are given."""
    epochs, every = plan.save
    words = ["fairseq-train", str(work / "data"), "--user-dir", user_dir(), *(["--cpu"] if cpu else [])]
    words += [*data.task_options, *data.checkpoint_bpe_words]
    most = max(BATCH_TOKENS, data.max_positions)
    words += f"--batch-size {BATCH} --max-tokens {most} --batch-size-valid {2 * BATCH}".split()
    words += "--required-batch-size-multiple 1".split()
    score = "loss" if data.labels is None else "accuracy --maximize-best-checkpoint-metric"
    options = (
        "--optimizer adam --adam-betas (0.9,0.98) --adam-eps 1e-6 --clip-norm 1.0",
        f"--weight-decay 0.01 --lr {plan.rate:g} --lr-scheduler polynomial_decay",
        "--dropout 0.1 --attention-dropout 0.1 --pooler-dropout 0.1",
        f"--no-epoch-checkpoints --save-interval {epochs} --validate-interval {epochs}",
        f"--save-interval-updates {every} --keep-interval-updates 1" if every else "",
        f"--best-checkpoint-metric {score}",
        f"--log-format json --log-interval 10 --num-workers 0 --seed {seed}",
    )
    return [*words, *" ".join(options).split()]


def _length(name: str, updates: int, warm_up: int, end: float) -> list[str]:
    """What says how long a run is, and where it goes."""
    words = f"--save-dir {name} --max-update {updates} --total-num-update {updates}"
    return f"{words} --warmup-updates {warm_up} --end-learning-rate {end:g}".split()


def script(made: Sequence[Step], programs: str) -> str:
    """The commands as an executable script; programs: the folder of fairseq-train and fairseq-qn."""
    parts = [f"\n# {step.what}\n{shown(step.words)}" for step in made]
    return SCRIPT.format(path=shlex.quote(programs), commands="\n".join(parts))
