"""learned_bits beside the package diffq: learned_bits_peer.py OUT; bytes and accuracy at the same lambda.

A perceptron on scikit-learn's digits (1,297 to train on, 500 held out), the same first weights, batches,
optimizer and number of updates. diffq is not a dependency, and its licence is not commercial: install it
where this script alone finds it (pip install --no-deps --target DIR diffq, PYTHONPATH=DIR). A cell is one
JSON file in OUT; finished cells are not run again.

bytes      of the file that is written: save(), and torch.save of get_quantized_state()
weights    of the quantised weights in it: parts of the file; true_model_size() less the biases
"""

from __future__ import annotations

import io
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fairseq_qn

GROUP, EPOCHS, BATCH, LR, LOGITS_LR = 16, 20, 64, 1e-3, 1e-2
LAMBDAS, SEEDS = (1.0, 10.0, 100.0), (1, 2, 3, 4, 5, 6, 7, 8, 9)
RULE = {"layers": ".*", "scheme": "learned_bits", "group_size": GROUP}


def data() -> tuple[Tensor, Tensor]:
    """Images [1797, 64] in 0 .. 1 and digits, shuffled."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.data / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def model() -> nn.Sequential:
    """64 - 256 - 256 - 10."""
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def fit(net: nn.Module, optimizer: torch.optim.Optimizer, penalty: object, weight: float, seed: int) -> None:
    """EPOCHS over the training images."""
    x, y = (t[:-500] for t in data())
    order = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x), generator=order).split(BATCH):
            optimizer.zero_grad()
            (cross_entropy(net(x[part]), y[part]) + weight * penalty()).backward()
            optimizer.step()


def accuracy(net: nn.Module) -> float:
    """Percent of the held-out digits."""
    x, y = (t[-500:] for t in data())
    with torch.no_grad():
        return 100 * float((net.eval()(x).argmax(1) == y).float().mean())


def ours(weight: float, seed: int, out: Path) -> dict[str, float]:
    """By this package, answered by the file."""
    net = model()
    recipe = {"version": 1, "noise": {"kind": "proxy", "p": 1.0}, "rules": [RULE]}
    fairseq_qn.apply(net, recipe, seed=seed)
    optimizer = torch.optim.Adam(fairseq_qn.parameter_groups(net, lr=LOGITS_LR), LR)
    fairseq_qn.follow(net, optimizer)
    fit(net, optimizer, lambda: fairseq_qn.size_penalty(net), weight, seed)
    real = float(fairseq_qn.size_penalty(net, rounded=False).detach()) * 2**20
    fairseq_qn.freeze(net)
    path = out / "ours.qn.safetensors"
    size = fairseq_qn.save(net, path).total
    rounded = float(fairseq_qn.size_penalty(net)) * 2**20
    found = {"bytes": size, "weights": rounded, "differentiable": real}
    return found | {"accuracy": accuracy(fairseq_qn.load(path, model=model()))}


def diffq(weight: float, seed: int, out: Path) -> dict[str, float]:
    """By the package diffq, as its page says."""
    from diffq import DiffQuantizer

    net = model()
    optimizer = torch.optim.Adam(net.parameters(), LR)
    quantizer = DiffQuantizer(net, min_size=0, group_size=GROUP, exclude=["bias"])
    quantizer.setup_optimizer(optimizer, lr=LOGITS_LR)
    fit(net, optimizer, quantizer.model_size, weight, seed)
    stream, biases = io.BytesIO(), 4 * sum(p.numel() for name, p in net.named_parameters() if "bias" in name)
    found = {"differentiable": float(quantizer.model_size().detach()) * 2**20 - biases}
    found |= {"accuracy": accuracy(net), "weights": quantizer.true_model_size() * 2**20 - biases}
    torch.save(quantizer.get_quantized_state(), stream)
    return found | {"bytes": stream.tell()}


def main() -> None:
    """Run what is not there yet; print the table."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    print(f"{len(SEEDS)} seeds")
    print(f"{'lambda':>6} {'package':9} {'bytes':>16} {'weights':>16} {'accuracy %':>14}")
    for weight in LAMBDAS:
        for name, run in (("ours", ours), ("diffq", diffq)):
            cells = []
            for seed in SEEDS:
                path = out / f"{name}-{weight:g}-{seed}.json"
                if not path.exists():
                    torch.manual_seed(seed)
                    begin = time.perf_counter()
                    cell = run(weight, seed, out) | {"seconds": time.perf_counter() - begin}
                    cell |= {"lambda": weight, "seed": seed, "torch": torch.__version__}
                    path.write_text(json.dumps(cell | {"machine": platform.processor() or "?"}) + "\n")
                cells.append(json.loads(path.read_text()))
            columns = [[cell[key] for cell in cells] for key in ("bytes", "weights", "accuracy")]
            shown = [f"{statistics.mean(c):9.1f} +- {statistics.stdev(c):.1f}" for c in columns]
            print(f"{weight:6g} {name:9} " + " ".join(shown), flush=True)


if __name__ == "__main__":
    main()
