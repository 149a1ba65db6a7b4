"""The memory that opening a file takes, in a fresh process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forging import Manifest, Tensors, forge
from torch import nn

import fairseq_qn
from fairseq_qn.errors import UnsupportedError

ROWS, COLUMNS = 4096, 4096
MEASURE = rf"""
import re, sys
import torch
from torch import nn
import fairseq_qn
with torch.device("meta"):
    model = nn.Sequential(nn.Linear({COLUMNS}, {ROWS}, bias=False))
fairseq_qn.inspect(sys.argv[1])
memory = lambda what: 1024 * int(re.search(what + r":\s+(\d+)", open("/proc/self/status").read())[1])
before = memory("VmRSS")
fairseq_qn.load(sys.argv[1], model=model)
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_dense_load_takes_at_most_twice_what_it_decodes_to(tmp_path: Path) -> None:
    """67 MB. With blocks of one weight and codes of 16 bits, codes alone take as much as the weights."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    rule = {"layers": "0", "scheme": "product", "block_size": 1, "n_centroids": 2}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "small")

    def edit(tensors: Tensors, manifest: Manifest) -> None:
        manifest["layers"]["0.weight"].update(shape=[ROWS, COLUMNS], block_size=1, n_centroids=65536)
        tensors["0.weight/codes"] = torch.zeros(2 * ROWS * COLUMNS, dtype=torch.uint8)
        tensors["0.weight/codebook"] = torch.zeros(65536, 1, dtype=torch.float16)

    path = forge(tmp_path / "small", tmp_path / "large", edit)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 4 * ROWS * COLUMNS <= int(run.stdout) <= 2 * 4 * ROWS * COLUMNS + 20e6


def test_a_dense_load_of_more_than_its_size_may_take_is_refused(tmp_path: Path) -> None:
    """Blocks of 32 by 256 codewords: 10 MB that stand for 1.34 GB."""
    rows, columns = 4096, 81_920
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    rule = {"layers": "0", "scheme": "product", "block_size": 8, "n_centroids": 2}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "small")

    def edit(tensors: Tensors, manifest: Manifest) -> None:
        manifest["layers"]["0.weight"].update(shape=[rows, columns], block_size=32, n_centroids=256)
        tensors["0.weight/codes"] = torch.zeros(rows * columns // 32, dtype=torch.uint8)
        tensors["0.weight/codebook"] = torch.zeros(256, 32, dtype=torch.float16)

    path = forge(tmp_path / "small", tmp_path / "large", edit)
    with torch.device("meta"):
        fresh = nn.Sequential(nn.Linear(columns, rows, bias=False))
    with pytest.raises(UnsupportedError, match=r'layers in fp32: expected at most .* mode="packed", or'):
        fairseq_qn.load(path, model=fresh)
    packed = fairseq_qn.load(path, "packed", fresh)
    assert packed[0](torch.ones(1, columns)).shape == (1, rows)
