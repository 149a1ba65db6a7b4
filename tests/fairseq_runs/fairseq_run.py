"""Run fairseq's own commands inside the test process (importing them anew costs seconds) or in a fresh
one.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from fairseq import checkpoint_utils, options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm as fairseq_eval_lm
from fairseq_cli import generate as fairseq_generate
from fairseq_cli import train as fairseq_train
from torch import Tensor

from fairseq_qn.modules.view import WeightView

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "fairseq_qn"
BIN = Path(sys.executable).parent

STAGES = ("ffn", "emb", "attn")
SIZE = {
    "--encoder-layers": 2,
    "--encoder-embed-dim": 32,
    "--encoder-ffn-embed-dim": 64,
    "--encoder-attention-heads": 2,
    "--max-positions": 64,
}
LM_SIZE = {
    "--decoder-layers": 2,
    "--decoder-embed-dim": 32,
    "--decoder-ffn-embed-dim": 64,
    "--decoder-attention-heads": 2,
}
MT_SIZE = {**LM_SIZE, **{key: size for key, size in SIZE.items() if key != "--max-positions"}}
LOOP = {
    "--batch-size": 8,
    "--optimizer": "adam",
    "--lr": 1e-3,
    "--lr-scheduler": "polynomial_decay",
    "--warmup-updates": 2,
    "--total-num-update": 40,
    "--log-format": "json",
    "--log-interval": 1,
    "--num-workers": 0,
    "--seed": 3,
    "--required-batch-size-multiple": 1,
}

MLM = {"--task": "qn_masked_lm", "--arch": "qn_roberta", "--criterion": "quantization_aware",
       "--wrapped-criterion": "masked_lm", "--tokens-per-sample": 32, **SIZE, **LOOP}  # fmt: skip
CLASSES = {
    **MLM,
    "--task": "qn_sentence_prediction",
    "--wrapped-criterion": "sentence_prediction",
    "--num-classes": 2,
    "--init-token": 0,
    "--separator-token": 2,
}
del CLASSES["--tokens-per-sample"]
VALUES = {**CLASSES, "--num-classes": 1, "--regression-target": None}
LANGUAGE = {
    "--task": "qn_language_modeling",
    "--arch": "qn_transformer_lm",
    "--share-decoder-input-output-embed": None,
    "--criterion": "quantization_aware",
    "--wrapped-criterion": "cross_entropy",
    "--tokens-per-sample": 32,
    **LM_SIZE,
    **LOOP,
}
PAIRS = {
    "--task": "qn_translation",
    "--arch": "qn_transformer",
    "--share-all-embeddings": None,
    "--criterion": "quantization_aware",
    "--wrapped-criterion": "cross_entropy",
    **MT_SIZE,
    **LOOP,
}
RESETS = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--reset-lr-scheduler"]
EACH = {"--save-interval-updates": 1, "--keep-interval-updates": -1}


def recipe(noise: dict[str, Any] | None = None, block_size: int = 8, **more: Any) -> dict[str, Any]:
    """A recipe of three stages that fits every tiny model here."""
    rule = {"scheme": "product", "n_centroids": 32, "block_size": block_size}
    rules = [
        {"layers": r".*\.fc[12]", "stage": "ffn", **rule},
        {"layers": ".*embed_tokens", "stage": "emb", **rule},
        {"layers": r".*attn\.(q|k|v|out)_proj", "stage": "attn", **rule, "block_size": 4},
    ]
    return {
        "version": 1,
        "noise": noise or {"kind": "proxy", "p": 0.2},
        "rules": rules,
        "stages": [*STAGES],
        **more,
    }


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    """A recipe as a YAML file."""
    path.write_text(yaml.safe_dump(data))
    return path


def arguments(*parts: Any) -> list[str]:
    """Command-line words from words, lists, and mappings of options; an option whose value is None is a
    flag.
    """
    words: list[str] = []
    for part in parts:
        if isinstance(part, dict):
            for key, value in part.items():
                words += [str(key)] if value is None else [str(key), str(value)]
        elif isinstance(part, (list, tuple)):
            words += arguments(*part)
        else:
            words.append(str(part))
    return words


@dataclass
class Run:
    """A finished training: its folder, its trainer, and what fairseq logged."""

    folder: Path
    trainer: Any
    lines: list[tuple[str, str]] = field(default_factory=list)

    def logged(self, logger: str = "train_inner") -> list[dict[str, float]]:
        """The figures that one of fairseq's loggers printed, in order."""
        found = [json.loads(text) for name, text in self.lines if name == logger and text.startswith("{")]
        return [
            {key: float(value) for key, value in figures.items() if value is not None} for figures in found
        ]

    def state(self, name: str = "checkpoint_last.pt") -> dict[str, Any]:
        """A checkpoint of this run, read with torch's safe loading."""
        return torch.load(self.folder / name, map_location="cpu", weights_only=True)

    def at(self, update: int) -> dict[str, Any]:
        """The checkpoint after an update."""
        return self.state(self.path(update).name)

    def path(self, update: int) -> Path:
        """Where the checkpoint after an update lies; fairseq does not name it after the update at the end of
        an epoch.
        """
        found = list(self.folder.glob(f"checkpoint_*_{update}.pt"))
        for path in [] if found else self.folder.glob("checkpoint*.pt"):
            if self.state(path.name)["optimizer_history"][-1]["num_updates"] == update:
                found.append(path)
        return found[0]

    @property
    def model(self) -> Any:
        """The trained model itself, in eval mode."""
        return self.trainer.model.eval()


def train(folder: Path, *parts: Any, watch: Callable[[Any], None] | None = None) -> Run:
    """fairseq-train in this process, on the CPU. watch(trainer) is called before the first update."""
    words = arguments(*parts, {"--save-dir": folder, "--cpu": None})
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    run = Run(folder, None)

    class Watched(fairseq_train.Trainer):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            run.trainer = self
            if watch is not None:
                watch(self)

    for function in (checkpoint_utils.save_checkpoint, fairseq_train.should_stop_early):
        vars(function).pop("best", None)  # fairseq keeps the best scores in attributes of functions
    original, fairseq_train.Trainer = fairseq_train.Trainer, Watched
    try:
        with listening(run.lines):
            fairseq_train.main(convert_namespace_to_omegaconf(args))
    finally:
        fairseq_train.Trainer = original
    return run


def evaluate(program: str, *parts: Any) -> tuple[Any, list[tuple[str, str]], list[str]]:
    """fairseq-generate or fairseq-eval-lm in this process: (what it returns, what it logged, what it
    printed).
    """
    module = {"fairseq-generate": fairseq_generate, "fairseq-eval-lm": fairseq_eval_lm}[program]
    make = {
        "fairseq-generate": options.get_generation_parser,
        "fairseq-eval-lm": options.get_eval_lm_parser,
    }[program]
    args = options.parse_args_and_arch(make(), input_args=arguments(*parts, "--cpu"))
    lines: list[tuple[str, str]] = []
    printed = io.StringIO()
    with listening(lines), contextlib.redirect_stdout(printed):
        result = module.main(convert_namespace_to_omegaconf(args))
    return result, lines, printed.getvalue().splitlines()


@dataclass
class Built:
    """What fairseq-train sets up before it trains, and the first batch."""

    task: Any
    model: Any
    criterion: Any
    sample: dict[str, Any]


def build(*parts: Any) -> Built:
    """The task, model, criterion and first training batch of a fairseq-train command line."""
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments(*parts))
    cfg = convert_namespace_to_omegaconf(args)
    np.random.seed(cfg.common.seed)  # noqa: NPY002  fairseq's masking draws from it
    torch.manual_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    task.load_dataset("train")
    batches = task.get_batch_iterator(task.dataset("train"), max_sentences=cfg.dataset.batch_size, seed=1)
    return Built(
        task, model, task.build_criterion(cfg.criterion), next(batches.next_epoch_itr(shuffle=False))
    )


@contextlib.contextmanager
def listening(lines: list[tuple[str, str]]) -> Iterator[None]:
    """Append (logger, message) of everything that is logged at INFO or above."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append((record.name, record.getMessage()))

    root, handler = logging.getLogger(), Handler(logging.INFO)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def command(
    *words: Any, cwd: Path, stdin: str = "", plugin: bool = True
) -> subprocess.CompletedProcess[str]:
    """A command of the environment in a fresh process. Without `plugin`, fairseq_qn cannot be imported
    there.
    """
    program, *rest = arguments(*words)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not plugin:
        (cwd / "blocked").mkdir(exist_ok=True)
        (cwd / "blocked" / "fairseq_qn.py").write_text(
            "raise ImportError('the plugin is not to be imported here')\n"
        )
        env["PYTHONPATH"] = str(cwd / "blocked")
        # fairseq by itself cannot restore anything under torch >= 2.6
        env["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    return subprocess.run(
        [str(BIN / program), *rest],
        cwd=cwd,
        env=env,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def differing(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors and values are not bit-identical."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted({*a, *b}, key=str)
        return [
            w
            for key in keys
            for w in (differing(a[key], b[key], f"{where}/{key}") if key in a and key in b else [where])
        ]
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str) and len(a) == len(b):
        return [w for i, (x, y) in enumerate(zip(a, b)) for w in differing(x, y, f"{where}[{i}]")]
    return [] if a == b else [where]


def together(values: Tensor, view: WeightView) -> bool:
    """Whether all blocks of each codeword hold the same values, to the bit; the pad row aside."""
    kept = torch.arange(len(values)) != (-1 if view.padding_idx is None else view.padding_idx)
    codes, blocks = view.buffer("codes")[kept].flatten(), values[kept].reshape(-1, view.scheme.block_size)
    return all(bool((blocks[codes == code] == blocks[codes == code][0]).all()) for code in codes.unique())


def sentences(n: int, seed: int) -> list[str]:
    """n lower-case sentences of 4 to 11 words out of 80, the frequent ones often; each word likes some
    followers.
    """
    spell = random.Random(0)
    syllables = ("ka", "lo", "mi", "ter", "su", "ben")
    words = sorted({"".join(spell.choice(syllables) for _ in range(2 + i % 3)) for i in range(110)})[:80]
    draw = random.Random(seed)
    lines = []
    for _ in range(n):
        index, line = int(80 * draw.random() ** 2), []
        for _ in range(draw.randint(4, 11)):
            line.append(words[index])
            index = (index * 7 + 3) % 80 if draw.random() < 0.6 else int(80 * draw.random() ** 2)
        lines.append(" ".join(line))
    return lines
