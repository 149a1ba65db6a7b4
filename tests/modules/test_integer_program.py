"""A loaded network on integers alone: nothing else in between, the answers of the packed model, refusals."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integers import RULE, IntegersAlone, loaded, trained
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import UnsupportedError


class Residual(nn.Module):
    """All that is known, in one network of 1 x 8 x 8 images."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding="same", groups=2), nn.BatchNorm2d(8)
        self.act, self.drop = nn.ReLU6(inplace=True), nn.Dropout(0.1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2)
        self.fc, self.fc_norm, self.out = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 2)
        y = self.act(self.norm(self.conv(x)))
        y += x
        y = self.down(F.avg_pool2d(y, 2, 1)).relu()
        y = self.drop(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))
        return self.out(torch.relu(self.fc_norm(self.fc(y))))


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU6(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


CODEBOOK = {
    "scheme": "product", "codebook_bits": 8, "n_centroids": 16, "activations": RULE["activations"],
}  # fmt: skip
RULES = {
    "tensor": [{**RULE, "granularity": "tensor"}],
    "channel": [{**RULE, "granularity": "channel"}],
    "int8 codebooks": [
        {**CODEBOOK, "layers": "stem|conv|down", "block_size": 9},
        {**CODEBOOK, "layers": "fc|out", "block_size": 4},
    ],
}


@pytest.mark.parametrize("rules", RULES)
def test_integers_alone_between_input_and_output(rules: str, tmp_path: Path) -> None:
    x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Residual()
    with torch.no_grad():  # gains of batch norms: below 0, nothing, nearly nothing
        model.norm.weight[:3] = torch.tensor([-0.7, 0.0, 1e-20])
        model.norm.bias.copy_(torch.linspace(-1, 7, 8))
    trained(model, x, steps=3, rules=RULES[rules])
    program = loaded(model, tmp_path / "m", Residual(1))
    expected = model(x)
    assert (program(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.equal(pickle.loads(pickle.dumps(program))(x), program(x))
    q = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    with IntegersAlone():
        found = program.integers(q)
    assert found.dtype == torch.int32 and found.shape == (32, 10)
    with pytest.raises(AssertionError), IntegersAlone():
        model(x)


def test_digits(tmp_path: Path) -> None:
    """Within a point of the float network, on images that it has not seen."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(data.images[:, None] / 16).float(), torch.tensor(data.target)
    torch.manual_seed(0)
    model = trained(small(), x[:1200], y[:1200], steps=60)
    plain = model(x[1200:])
    program = loaded(model, tmp_path / "m", small())
    right = [float((found.argmax(1) == y[1200:]).float().mean()) for found in (plain, program(x[1200:]))]
    assert right[0] > 0.85 and abs(right[0] - right[1]) <= 0.01


class With(nn.Module):
    """Two layers, and something else between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Linear(4, 4), nn.Linear(4, 4), between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


X = torch.linspace(-1, 1, 24).view(6, 4)


@pytest.mark.parametrize(
    ("between", "found"),
    [
        (nn.GELU(), r"between \(GELU\): not supported; known are Linear,"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), r"between.1 \(BatchNorm1d\): not supported"),
        (torch.sigmoid, "sigmoid: not supported"),
        (lambda x: x + 1, "add: not supported"),
        (lambda x: x * x, "mul: not supported"),
        (lambda x: x + F.relu(x, inplace=True), "relu: changes in place what others read"),
        (lambda x: x + operator.iadd(x, F.relu(x)), "iadd: changes in place what others read"),
        (lambda x: operator.isub(x, F.relu(x)), "sub: not supported"),
        (lambda x: x if x.sum() > 0 else -x, "the model cannot be traced by torch.fx: "),
    ],
)
def test_what_is_not_known_is_refused_by_name(between: Any, found: str, tmp_path: Path) -> None:
    model = trained(With(between), X, steps=1)
    with pytest.raises(UnsupportedError, match=f"^mode integer: {found}"):
        loaded(model, tmp_path / "m", With(between))


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ({"symmetric": False}, "a: expected symmetric integers over a tensor or channels; its rule has to"),
        (
            {"granularity": "group", "group_size": 2},
            "a: expected symmetric integers over a tensor or channels",
        ),
        (
            {"activations": 8},
            "a: expected a static range of 8 bits for its input; its rule needs activations",
        ),
        ({"activations": {"bits": 7, "ranges": "static"}}, "a: expected a static range of 8 bits"),
        ({"layers": "a"}, "b: expected symmetric integers"),
        (
            {"rules": [{**CODEBOOK, "layers": "a|b", "block_size": 2, "codebook_bits": 16}]},
            "a: expected symm",
        ),
    ],
)
def test_layers_of_other_rules_are_refused_by_name(rule: dict[str, Any], found: str, tmp_path: Path) -> None:
    model = trained(With(nn.ReLU()), X, steps=1, **rule)
    with pytest.raises(UnsupportedError, match=f"^mode integer: {found}"):
        loaded(model, tmp_path / "m", With(nn.ReLU()))


def test_a_linear_of_more_dimensions_is_refused(tmp_path: Path) -> None:
    program = loaded(trained(With(nn.ReLU()), X, steps=1), tmp_path / "m", With(nn.ReLU()))
    with pytest.raises(UnsupportedError, match=r"reads \[batch, features\], found 3 dimensions"):
        program(X[None])
    with pytest.raises(UnsupportedError, match="^load: dtype: mode integer has its own"):
        fairseq_qn.load(tmp_path / "m", "integer", With(nn.ReLU()), dtype=torch.float16)
