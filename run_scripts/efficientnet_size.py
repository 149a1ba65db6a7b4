"""The small file of an EfficientNet with random weights: its bytes; it loads from the file alone, and runs.

    efficientnet_size.py [--arch b3] [--classes 1000] [--recipe efficientnet] [-o FILE]

Prints a line; exit status 1 where B3 is over 3.3 MB (10^6 bytes).
"""

import argparse
import tempfile
import time
from argparse import Namespace
from pathlib import Path

import fairseq  # noqa: F401  (registers the models)
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

import fairseq_qn
from fairseq_qn import hub

SIZES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300}
LIMIT = 3_300_000


def build(arch: str, classes: int) -> torch.nn.Module:
    """A model with random weights, and its task, as fairseq-train makes them."""
    name = "qn_image_classification"
    options = {"num_classes": classes, "image_size": SIZES[arch], "image_channels": 3}
    task = TASK_REGISTRY[name](OmegaConf.create({"_name": name, "data": "", **options}))
    given = Namespace(arch=f"qn_efficientnet_{arch}")
    ARCH_CONFIG_REGISTRY[given.arch](given)
    given.stochastic_depth, given.norm_momentum = 0.2, 1.0  # its statistics are those of one batch
    return MODEL_REGISTRY["qn_efficientnet"].build_model(given, task)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", choices=list(SIZES), default="b3")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--recipe", default="efficientnet")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(args.arch, args.classes)
    images = torch.randint(0, 256, (4, 320, 320, 3), dtype=torch.uint8)
    with torch.no_grad():
        model.train()(hub.prepared(images, SIZES[args.arch]))
    model.eval()
    count = sum(p.numel() for p in model.parameters())
    fairseq_qn.apply(model, args.recipe, seed=0)
    predicted = fairseq_qn.predict_size(model)
    began = time.monotonic()
    fairseq_qn.freeze(model, iterations=1)  # random weights have no clusters to find
    with tempfile.TemporaryDirectory() as folder:
        path = args.output or Path(folder) / "model.qn.safetensors"
        report = fairseq_qn.save(model, path)
        seconds = time.monotonic() - began
        with torch.inference_mode():
            expected = model(hub.prepared(images, SIZES[args.arch]))
        found = hub.load_interface(path, "packed").logits(images)
        difference = float((found - expected).abs().max() / expected.abs().max())
    print(
        f"{args.arch}: {count:,} parameters, {4 * count:,} bytes in fp32; predicted {predicted:,}, on disk "
        f"{report.total:,} bytes, {4 * count / report.total:.1f} times fewer; frozen and saved in "
        f"{seconds:.0f} s; loaded, its logits differ by {difference:.1e} of the largest"
    )
    return int(args.arch == "b3" and report.total > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
