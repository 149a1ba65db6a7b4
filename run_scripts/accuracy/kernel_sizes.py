"""Bits per weight of convolutions whose kernels are codewords: kernel_sizes.py [OUT]; VGG-16 and ResNet-18.

Of files with random weights, saved to OUT (default: a temporary folder): indices, codebooks of 6 bits and
what stays dense, in fp16, over the number of weights of all convolutions. Kernel Quantization (Yu et al.
2020) reports 1.05 for VGG-16 and 1.62 for ResNet-18, and says no K.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fairseq_qn

# (output channels, input channels, kernel) of each convolution, in order
VGG_16 = [
    (64, 3, 3), (64, 64, 3), (128, 64, 3), (128, 128, 3), (256, 128, 3), *[(256, 256, 3)] * 2, (512, 256, 3),
    *[(512, 512, 3)] * 5,
]  # fmt: skip
RESNET_18 = [(64, 3, 7), *[(64, 64, 3)] * 4]
for WIDTH in (128, 256, 512):  # two blocks each, the first with a 1x1 convolution beside it
    HALF = WIDTH // 2
    RESNET_18 += [(WIDTH, HALF, 3), (WIDTH, WIDTH, 3), (WIDTH, HALF, 1), *[(WIDTH, WIDTH, 3)] * 2]

THREE, OF_256 = r"conv\d+_3", "conv[567]_3"  # names end in the size of the kernel
CELLS: list[tuple[str, list[tuple[int, int, int]], dict[str, int], float | None]] = [
    ("VGG-16, K 512", VGG_16, {THREE: 512}, None),
    ("VGG-16, K 512, of 256 inputs 1024", VGG_16, {OF_256: 1024, THREE: 512}, 1.05),
    ("VGG-16, K 1024", VGG_16, {THREE: 1024}, None),
    ("ResNet-18, K 1024, 1x1 and 7x7 in fp16", RESNET_18, {THREE: 1024}, None),
    ("ResNet-18, K 2048, 1x1 and 7x7 in fp16", RESNET_18, {THREE: 2048}, 1.62),
    ("ResNet-18, K 2048, 1x1 and 7x7 too", RESNET_18, {".*": 2048}, None),
]


def model(shapes: list[tuple[int, int, int]]) -> nn.Module:
    """Its convolutions alone, as torch makes them."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            f"conv{i}_{k}": nn.Conv2d(inputs, outputs, k, bias=False)
            for i, (outputs, inputs, k) in enumerate(shapes)
        }
    )


def measured(shapes: list[tuple[int, int, int]], sizes: dict[str, int], path: Path) -> tuple[int, float]:
    """(bytes of the file, bits a weight of what is in it beside the header)."""
    net = model(shapes)
    rules: list[dict[str, Any]] = [
        {"layers": layers, "scheme": "kernel", "n_centroids": k, "codebook_bits": 6}
        for layers, k in sizes.items()
    ]
    fairseq_qn.apply(net, {"version": 1, "rules": rules}, seed=0)
    fairseq_qn.freeze(net, iterations=1)  # the codes' values do not change their size
    report = fairseq_qn.save(net, path)
    n = sum(outputs * inputs * k * k for outputs, inputs, k in shapes)
    return report.total, 8 * sum(report.parts[part] for part in ("codes", "codebooks", "dense")) / n


def main() -> None:
    """A line for each of CELLS."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        out.mkdir(parents=True, exist_ok=True)
        print(f"{'':42} {'bytes':>10} {'bits':>6} {'paper':>6}")
        for name, shapes, sizes, paper in CELLS:
            path = out / (re.sub(r"\W+", "-", name) + ".qn.safetensors")
            total, bits = measured(shapes, sizes, path)
            print(f"{name:42} {total:10,} {bits:6.3f} {paper or '':>6}", flush=True)


if __name__ == "__main__":
    main()
