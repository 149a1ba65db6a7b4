"""Sizes: what is predicted, what the disk holds, and what it is made of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from small import LAYERS, SCHEMES, Net, frozen, recipe

import fairseq_qn


@pytest.mark.parametrize("parts", ["float16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_predicted_sizes(scheme: str, parts: str, tmp_path: Path) -> None:
    model = Net(seed=1)
    groups = {"group_size": 1} if scheme == "group" else {}
    data = recipe(**{**SCHEMES[scheme], **groups})
    fairseq_qn.apply(model, data)
    before = fairseq_qn.predict_size(model, parts=parts)
    fairseq_qn.freeze(model)
    after = fairseq_qn.predict_size(model, parts=parts)
    size = fairseq_qn.save(model, tmp_path / "m", parts=parts)
    assert size.total == os.path.getsize(tmp_path / "m")
    assert before == pytest.approx(size.total, rel=0.01)
    assert after == size.total


def test_the_parts_add_up(tmp_path: Path) -> None:
    model = frozen()
    size = fairseq_qn.save(model, tmp_path / "m", assets={"bpe.model": b"abc" * 1000})
    assert sum(size.parts.values()) == size.total == (tmp_path / "m").stat().st_size
    assert sum(size.layers.values()) + size.parts["header"] + size.parts["assets"] == size.total
    blocks = {"embed": (19 + 1) * 2, "block.fc1": 16, "conv": 12}
    for name, n in blocks.items():  # 5 codewords: 3 bits
        d = LAYERS[name]
        assert size.layers[f"{name}.weight"] == -(-n * 3 // 8) + 5 * d * 2
    dense = 4 * sum(p.numel() for p in Net().parameters())
    assert size.dense_bytes == dense and size.ratio == dense / size.total
    assert 0 < size.parts["assets"] < 100
    assert f"{size.total / 1e6:.3f} MB on disk" in str(size) and size.to_dict()["total"] == size.total


def test_figures_for_logs() -> None:
    model = Net()
    fairseq_qn.apply(model, recipe())
    assert fairseq_qn.figures(model)["frozen_share"] == 0
    shares = []
    for stage in ("ffn", "emb", "conv"):
        errors = [report.error for report in fairseq_qn.freeze(model, stage)]
        figures = fairseq_qn.figures(model)
        shares.append(figures["frozen_share"])
        assert figures[f"distortion_{stage}"] == pytest.approx(sum(errors) / len(errors))
        assert figures["predicted_mb"] == fairseq_qn.predict_size(model) / 1e6
    assert shares == sorted(shares) and shares[-1] == 1
