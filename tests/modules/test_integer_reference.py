"""A whole network on integers, against the same in Python's own: lists and ints."""

from __future__ import annotations

import struct
from math import frexp, sqrt
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import RULE
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.modules.integer_program import integer_model

SIDE, INT32 = 4, 2**31


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.b, self.b_norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.out = nn.Linear(2 * 2 * 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.a_norm(self.a(x)))
        y = self.b_norm(self.b(x))
        y += x
        return self.out(torch.flatten(F.avg_pool2d(y, 2), 1))


# -- the reference: numbers of the file by Python's floats, from there on integers


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def affine(low: float, high: float) -> tuple[float, int]:
    scale = f32(f32(high / 255) - f32(low / 255))
    return scale, max(0, min(255, round(f32(-low / scale))))


def shifted(x: int, n: int) -> int:
    """x / 2^n to the nearest, halves away from zero."""
    size = (abs(x) * 2 + (1 << n)) >> (n + 1)
    return size if x >= 0 else -size


def clamp(x: int) -> int:
    return max(-INT32, min(INT32 - 1, x))


def times(x: int, m: float) -> int:
    """x M, by M = 2^-n M0."""
    mantissa, exponent = frexp(m)
    factor, n = round(mantissa * INT32), -exponent
    if factor == INT32:
        factor, n = INT32 // 2, n - 1
    if n > 62:
        n = 62
    return shifted(clamp(shifted(x * factor, 31 + min(n, 0))), max(n, 0))


def folded(layer: dict[str, Any], norm: dict[str, Any] | None, scale: float) -> tuple[list, list, list]:
    """(levels by output, biases, scales)."""
    rows, biases, scales = [], [], []
    for o, row in enumerate(layer["levels"]):
        gain, offset = 1.0, 0.0
        if norm:
            gain = 1.0 / sqrt(norm["var"][o] + norm["eps"]) * norm["weight"][o]
            offset = norm["bias"][o] - norm["mean"][o] * gain
        size = layer["scale"][o % len(layer["scale"])] * scale
        bias = layer["bias"][o] * gain + offset
        coarse = max(abs(size * gain), abs(bias) / 2**30) or 1.0
        rows.append([round(level * (size * gain / coarse)) for level in row])
        biases.append(round(bias / coarse))
        scales.append(coarse)
    return rows, biases, scales


def convolve(image: list, zero: int, rows: list, biases: list) -> list:
    """[in][y][x] -> [out][y][x], kernels of 3 x 3, which run over [in][3][3]."""
    at = lambda c, y, x: image[c][y][x] - zero if 0 <= y < SIDE and 0 <= x < SIDE else 0  # noqa: E731
    taps = [(c, dy, dx) for c in range(len(image)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return [
        [
            [sum(w * at(c, y + dy, x + dx) for w, (c, dy, dx) in zip(row, taps, strict=True)) + bias
             for x in range(SIDE)] for y in range(SIDE)
        ] for row, bias in zip(rows, biases, strict=True)
    ]  # fmt: skip


def each(image: list, function: Any) -> list:
    """function(value, channel) of each value."""
    return [[[function(v, c) for v in row] for row in rows] for c, rows in enumerate(image)]


def uint8(image: list, scales: list, scale: float, zero: int) -> list:
    return each(image, lambda v, c: max(0, min(255, times(v, scales[c] / scale) + zero)))


def reference(q: list, net: dict[str, Any]) -> list[int]:
    """Of one image of uint8 [1][4][4]."""
    ranges = {name: affine(*net[name]["range"]) for name in ("a", "b", "out")}
    rows, biases, of_a = folded(net["a"], net["a_norm"], ranges["a"][0])
    x = convolve(q, ranges["a"][1], rows, biases)
    x = each(x, lambda v, c: max(0, min(v, min(round(6 / of_a[c]), INT32 - 1))))
    rows, biases, of_b = folded(net["b"], net["b_norm"], ranges["b"][0])
    y = convolve(uint8(x, of_a, *ranges["b"]), ranges["b"][1], rows, biases)
    both = [max(pair) for pair in zip(of_b, of_a, strict=True)]
    y = [
        [[clamp(times(u, of_b[c] / both[c]) + times(v, of_a[c] / both[c]))
          for u, v in zip(*rows, strict=True)] for rows in zip(y[c], x[c], strict=True)] for c in range(2)
    ]  # fmt: skip
    flat = []
    for c in range(2):
        for top in (0, 2):
            for left in (0, 2):
                total = sum(y[c][top + i][left + j] for i in (0, 1) for j in (0, 1))
                flat.append(times(shifted(total, 2), both[c] / max(both)))
    scale, zero = ranges["out"]
    flat = [max(0, min(255, times(v, max(both) / scale) + zero)) for v in flat]
    rows, biases, _ = folded(net["out"], None, scale)
    return [
        sum(w * (v - zero) for w, v in zip(row, flat, strict=True)) + bias
        for row, bias in zip(rows, biases, strict=True)
    ]


def numbers(model: nn.Module) -> dict[str, Any]:
    """What a packed model holds, as lists."""
    net: dict[str, Any] = {}
    for name in ("a", "b", "out"):
        layer: Any = model.get_submodule(name)
        levels, scale = layer.qn_stored.signed()
        bias = [0.0] * len(levels) if layer.bias is None else layer.bias.tolist()
        ends = layer._qn_activation.low, layer._qn_activation.high
        net[name] = {
            "levels": levels.flatten(1).tolist(),
            "scale": scale.tolist(),
            "bias": bias,
            "range": ends,
        }
    for name in ("a_norm", "b_norm"):
        norm: Any = model.get_submodule(name)
        stored = {
            "weight": norm.weight,
            "bias": norm.bias,
            "mean": norm.running_mean,
            "var": norm.running_var,
        }
        net[name] = {key: tensor.tolist() for key, tensor in stored.items()} | {"eps": norm.eps}
    return net


GAINS = st.lists(st.sampled_from([0.0, 1e-20, 1e-3, -0.5, 1.0, 30.0]), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), GAINS, st.sampled_from(["tensor", "channel"]), st.booleans())
def test_every_integer_is_that_of_the_reference(
    tmp_path_factory: Any, seed: int, gains: list[float], granularity: str, fold: bool
) -> None:
    torch.manual_seed(seed)
    model, x = Net(), torch.randn(6, 1, SIDE, SIDE)
    rule = {**RULE, "granularity": granularity, "fold_batch_norm": fold}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    model.train()(x * 3)
    with torch.no_grad():
        for norm, gain in zip((model.a_norm, model.b_norm), (gains[:2], gains[2:]), strict=True):
            norm.weight.copy_(torch.tensor(gain))
            norm.bias.normal_(0, 3)
    fairseq_qn.freeze(model.eval())
    path = tmp_path_factory.mktemp("reference") / "m"
    fairseq_qn.save(model, path, parts="float32")
    packed = fairseq_qn.load(path, "packed", Net())
    net, program = numbers(packed), integer_model(packed)
    q = torch.randint(0, 256, (3, 1, SIDE, SIDE)).to(torch.uint8)
    q[0] = torch.where(q[0] < 128, 0, 255)
    assert program.integers(q).tolist() == [reference(image, net) for image in q.tolist()]
