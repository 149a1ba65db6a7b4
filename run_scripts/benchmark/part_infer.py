"""Answering: a RoBERTa-base from the small file, packed and dense, beside the dense fp32 model and other
ways to pack it.

Every contender is the same network with the same decoded weights: its Linears (and its LM head) are
replaced, nothing else.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch
from checkpoints import write_checkpoint
from peers import aqlm_linear, dynamic_int8, fairseq_linear, replaced
from torch import Tensor, nn

RECIPE = Path(__file__).parents[2] / "configs/recipes/roberta.yaml"
GROUPS_OF_8 = {
    "version": 1,
    "rules": [
        {
            "layers": r".*(fc[12]|embed_tokens|(q|k|v|out)_proj)",
            "scheme": "product",
            "block_size": 8,
            "n_centroids": 256,
        },
    ],
}
SHAPES = ((1, 32), (1, 128), (16, 128))
PAD, THREADS = 1, torch.get_num_threads()
TOLERANCE = {"packed": 1e-5, "bfloat16": 5e-2}  # of the largest logit of the dense fp32 model


def small_file(folder: Path, checkpoint: Path, recipe: Any, name: str) -> Path:
    """The small file of a checkpoint; one iteration of k-means, as speed does not depend on the codes."""
    import fairseq_qn
    from fairseq_qn import hub

    path = folder / f"{name}.qn.safetensors"
    if not path.exists():
        model, _, _ = hub.load_checkpoint(checkpoint, None, recipe)
        fairseq_qn.freeze(model, iterations=1)
        fairseq_qn.save(model, path)
    return path


def contenders(path: Path) -> dict[str, nn.Module]:
    """The models by name. All of them answer from the same file."""
    import fairseq_qn

    def load(mode: str = "dense", **options: Any) -> nn.Module:
        return fairseq_qn.load(path, mode=mode, **options)

    dense = load()
    packed = load("packed")
    return {
        harness.OURS: packed,
        "dense fp32": dense,
        "ours, mode=dense": load(),
        "ours, packed bf16": load("packed", dtype=torch.bfloat16),
        "ours, dense bf16": load(dtype=torch.bfloat16),
        "torch dynamic int8": dynamic_int8(load()),
        "aqlm": replaced(load(), packed, aqlm_linear),
        "fairseq PQLinear": replaced(load(), packed, fairseq_linear),
    }


def answer(model: nn.Module, tokens: Tensor, logits: bool) -> Callable[[], Tensor]:
    @torch.inference_mode()
    def run() -> Tensor:
        torch.set_num_threads(THREADS)  # aqlm's numba leaves all of OpenMP at its own number
        return model(tokens, features_only=not logits)[0]

    return run


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest, over the largest value. Without the logit of the pad row, which the peers' layouts cannot
    hold at zero.
    """
    keep = [i for i in range(expected.shape[-1]) if i != PAD] if expected.shape[-1] > 50_000 else slice(None)
    return float((found.float() - expected)[..., keep].abs().max() / expected.abs().max())


def limit(packed: nn.Module, tokens: Tensor, logits: bool) -> tuple[float, str]:
    """Of the lookup: a product with each codeword and an addition for each code; codes are read once."""
    batch, length = tokens.shape
    flops = memory = 0.0
    for name, module in packed.named_modules():
        codes = getattr(module, "codes", None)
        if codes is None or ("embed_tokens" in name and not logits):
            continue
        k, d = module.codebook.shape
        flops += batch * length * (2 * k * d * codes.shape[1] + codes.numel())
        memory += codes.numel()
    layers, width = (
        len(packed.encoder.sentence_encoder.layers),
        packed.encoder.sentence_encoder.layers[0].embed_dim,
    )
    flops += layers * 4 * batch * length**2 * width  # attention itself
    return harness.roofline(flops, memory)


def weights_in_memory(model: nn.Module) -> int:
    """Bytes of all tensors that the model holds, once each."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def measure(path: Path, name: str, logits: bool, repeats: int) -> tuple[list[harness.Case], list[str]]:
    cases, notes = [], []
    models = contenders(path)
    held = weights_in_memory(models[harness.OURS])
    ratio = held / path.stat().st_size
    notes.append(f"{name}: packed weights in memory {held / 1e6:.1f} MB, {ratio:.2f} of the file")
    for batch, length in SHAPES[:2] if logits else SHAPES:
        tokens = torch.randint(4, 50_000, (batch, length), generator=torch.Generator().manual_seed(0))
        tokens[:, 0], tokens[:, -1] = 0, 2
        runs = {key: answer(model, tokens, logits) for key, model in models.items()}
        # aqlm goes row by row: minutes, so only once, in the layout that is its own
        if batch > 1 and name != "all 8":
            del runs["aqlm"]
        reference = runs["dense fp32"]()
        errors = {key: difference(run(), reference) for key, run in runs.items()}
        assert errors[harness.OURS] <= TOLERANCE["packed"], errors
        assert max(errors["ours, packed bf16"], errors["ours, dense bf16"]) <= TOLERANCE["bfloat16"], errors
        what = f"{name}, {'all logits' if logits else 'features'}, {batch}x{length}"
        harness.progress(what)
        seconds = harness.race(runs, repeats)
        torch.set_num_threads(THREADS)
        bound, by = limit(models[harness.OURS], tokens, logits)
        cases.append(
            harness.Case(
                what, seconds, bound, by, extra={"error_over_largest": errors, "memory_over_file": ratio}
            )
        )
    return cases, notes


def main() -> None:
    parser = harness.arguments("infer")
    recipes = {"attention 4": RECIPE, "all 8": GROUPS_OF_8}
    parser.add_argument("--only", nargs="+", choices=recipes, default=list(recipes), help="some recipes")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    cases, notes = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        checkpoint = write_checkpoint(folder)
        for name in args.only:
            path = small_file(folder, checkpoint, recipes[name], name.replace(" ", "-"))
            for logits in (False, True) if name == "attention 4" else (False,):
                more, said = measure(path, name, logits, args.repeats)
                cases, notes = cases + more, [*notes, *(line for line in said if line not in notes)]
    worst = {key: max(c.extra["error_over_largest"].get(key, 0) for c in cases) for key in cases[0].values}
    differences = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    notes.append(f"largest difference to dense fp32, over the largest value: {differences}")
    torch.set_num_threads(THREADS)
    harness.report(
        "infer",
        "Answering: RoBERTa-base, from tokens to features or to all 50,265 logits",
        cases,
        notes,
        args,
    )


if __name__ == "__main__":
    main()
