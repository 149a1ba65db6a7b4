"""A training step of fairseq's masked LM with weight views, against the same model without, beside fairseq's
own noise.

A RoBERTa of 6 layers, 384 wide, 16 x 128 tokens, fp32. A step is what fairseq's trainer does: forward, loss,
backward, scale, clip, Adam. Memory is the peak of a process of its own, which differs by some 30 MB from run
to run: the median of two.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from checkpoints import build, settings, write_dictionary
from harness import OURS, Case, arguments, peak_memory, progress, race, report, run_fresh

LAYERS, WIDTH, HEADS, SENTENCES, TOKENS = 6, 384, 6, 16, 128
TABLE = 50_265 * WIDTH * 4  # bytes of the largest layer
WARM, MEASURED = 2, 3  # steps that bring the optimiser's state into being; steps that the profile adds up
FRESH = 2  # processes whose memory is measured
DENSE, HOOK = "without views", "fairseq --quant-noise-pq 0.1"
RECIPE = Path(__file__).parents[2] / "configs" / "recipes" / "roberta.yaml"

Step = Callable[[], Any]


def integer(bits: int, p: float, **more: Any) -> dict[str, Any]:
    return {"noise": {"kind": "proxy", "p": p}, "rule": {"scheme": "integer", "bits": bits, **more}}


VARIANTS: dict[str, dict[str, Any]] = {
    "proxy noise, p = 0.1": {"noise": {"kind": "proxy", "p": 0.1}},
    "int8 by channel, p = 0.1": integer(8, 0.1),
    "int4 by groups of 64, p = 0.1": integer(4, 0.1, granularity="group", group_size=64),
    "int8 by channel, p = 1": integer(8, 1.0),
    "int4 by groups of 64, p = 1": integer(4, 1.0, granularity="group", group_size=64),
    "exact PQ noise, p = 0.1": {"noise": {"kind": "exact", "p": 0.1}},
    "all layers frozen (PQ)": {"noise": {"kind": "none"}, "frozen": True},
}


def recipe(noise: dict[str, Any], rule: dict[str, Any] | None = None) -> Any:
    """The recipe of RoBERTa with another noise, or another scheme on the same layers."""
    import fairseq_qn

    data = json.loads(fairseq_qn.Recipe.load(RECIPE).to_json())
    data["noise"] = noise
    if rule:
        data["rules"] = [{"layers": r["layers"], "stage": r["stage"], **rule} for r in data["rules"]]
    return fairseq_qn.Recipe.load(data)


def batch(task: Any) -> dict[str, Any]:
    """16 x 128 words as frequent as Zipf's law says; the loss is on 15% of them."""
    import torch

    generator = torch.Generator().manual_seed(0)
    counts = 1 / torch.arange(1.0, len(task.source_dictionary) - 4)
    tokens = 4 + torch.multinomial(counts, SENTENCES * TOKENS, True, generator=generator).view(
        SENTENCES, TOKENS
    )
    masked = torch.rand(tokens.shape, generator=generator) < 0.15
    target = tokens.where(masked, torch.tensor(task.source_dictionary.pad()))
    lengths = torch.full((SENTENCES,), TOKENS)
    return {"net_input": {"src_tokens": tokens.masked_fill(masked, task.mask_idx), "src_lengths": lengths},
            "target": target, "ntokens": int(masked.sum()), "nsentences": SENTENCES}  # fmt: skip


def trainee(name: str, folder: Path) -> Step:
    """A model of its own, and the function that trains it by one step."""
    from fairseq.criterions.masked_lm import MaskedLmConfig, MaskedLmLoss
    from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig

    import fairseq_qn  # registers with fairseq

    hook = {"quant_noise_pq": 0.1, "quant_noise_pq_block_size": 8} if name == HOOK else {}
    task, model = build(settings(LAYERS, WIDTH, HEADS, folder, **hook))
    if name in VARIANTS:
        variant = VARIANTS[name]
        fairseq_qn.apply(model, recipe(variant["noise"], variant.get("rule")))
        fairseq_qn.freeze(model, iterations=1) if variant.get("frozen") else fairseq_qn.refresh(model)
    config = FairseqAdamConfig(
        adam_betas="(0.9, 0.98)", adam_eps=1e-6, weight_decay=0.01, tpu=False, lr=[1e-4]
    )
    optimizer = FairseqAdam(config, list(model.parameters()))
    criterion, sample, update = MaskedLmLoss(MaskedLmConfig(tpu=False), task), batch(task), 0

    def step() -> Any:
        nonlocal update
        update += 1
        model.train()
        optimizer.zero_grad()
        if name in VARIANTS:
            fairseq_qn.set_update(model, update)
        loss, size, _ = criterion(model, sample)
        optimizer.backward(loss)
        optimizer.multiply_grads(1 / size)
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        return loss

    return step


@contextmanager
def timed(owner: Any, name: str, into: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds in owner.name; a static method stays one."""
    original, kind = getattr(owner, name), owner.__dict__[name]

    def measured(*args: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args)
        finally:
            into[name] = into.get(name, 0) + time.perf_counter() - began

    setattr(owner, name, staticmethod(measured) if isinstance(kind, staticmethod) else measured)
    try:
        yield
    finally:
        setattr(owner, name, kind)


def profile(step: Step) -> dict[str, float]:
    """Seconds of a step that go into the views' reads and into their gradients."""
    from fairseq_qn.modules import view
    from fairseq_qn.quant import reading

    seconds: dict[str, float] = {}
    with timed(view.WeightView, "read", seconds), timed(reading.Read, "backward", seconds):
        for _ in range(MEASURED):
            step()
    return {"reads": seconds.get("read", 0) / MEASURED, "gradients": seconds.get("backward", 0) / MEASURED}


def main() -> None:
    parser = arguments("a training step with weight views")
    parser.add_argument("--memory-of", help="print the peak memory of this contender, and nothing else")
    parser.add_argument("--folder", type=Path, help="where the dictionary is, for --memory-of")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="some variants")
    args = parser.parse_args()
    if args.memory_of:
        step = trainee(args.memory_of, args.folder)
        for _ in range(WARM + 1):
            step()
        print(json.dumps({"bytes": peak_memory()}))
        return
    with tempfile.TemporaryDirectory() as name:
        write_dictionary(Path(name))
        measure(args, Path(name))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Each variant against the two peers in a race of its own, and in processes of its own."""
    cases: list[Case] = []
    peers = {name: trainee(name, folder) for name in (DENSE, HOOK)}
    for name in args.only:
        step = trainee(name, folder)
        for train in (step, *peers.values()):
            for _ in range(WARM):
                train()
        seconds = race({OURS: step, **peers}, args.repeats, inner=2)
        cases.append(Case(name, seconds, extra={"profile": profile(step)}))
        progress(
            f"{name}: {cases[-1].ratio(DENSE):.3f} of the step without views, {cases[-1].extra['profile']}"
        )
    memory: dict[str, list[int]] = {name: [] for name in (DENSE, HOOK, *args.only)}
    for _ in range(FRESH):
        for name, values in memory.items():
            values.append(run_fresh(__file__, "--memory-of", name, "--folder", folder)["bytes"])
            progress(f"{name}: peak memory {values[-1] / 1e6:.0f} MB")
    limit = median(memory[DENSE]) + TABLE
    for name in args.only:
        values = {OURS: memory[name], DENSE: memory[DENSE], HOOK: memory[HOOK]}
        layers = (median(memory[name]) - median(memory[DENSE])) / TABLE
        cases.append(
            Case(f"{name}: peak memory", values, limit, "one layer more", "B", {"extra_layers": layers})
        )
    notes = [
        f"RoBERTa of {LAYERS} layers, {WIDTH} wide, {SENTENCES} x {TOKENS} tokens, fp32, masked LM, "
        "fairseq's Adam; layers and "
        f"block sizes of {RECIPE.name}. The largest layer, the table, takes {TABLE / 1e6:.0f} MB.",
        "Reads and gradients of the views, ms a step: "
        + "; ".join(
            f"{c.name} {c.extra['profile']['reads'] * 1e3:.0f} and "
            f"{c.extra['profile']['gradients'] * 1e3:.0f}"
            for c in cases
            if "profile" in c.extra
        )
        + ".",
    ]
    report("train", "A training step", cases, notes, args)


if __name__ == "__main__":
    sys.exit(main())
