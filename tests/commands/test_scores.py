"""Scores against scikit-learn's and scipy's definitions, by hand where a library is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.commands.scores import accuracy, macro_f1, pearson, spearman

NUMBERS = st.lists(
    st.tuples(st.integers(-5, 5).map(float), st.integers(-5, 5).map(float)), min_size=2, max_size=30
)


@given(pairs=st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd")), min_size=1, max_size=30))
def test_shares(pairs: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    found, expected = zip(*pairs, strict=True)
    assert accuracy(found, expected) == pytest.approx(100 * metrics.accuracy_score(expected, found))
    theirs = metrics.f1_score(expected, found, average="macro", zero_division=0)
    assert macro_f1(found, expected) == pytest.approx(100 * theirs)


@given(pairs=NUMBERS)
def test_correlations(pairs: list[tuple[float, float]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len({*x}) == 1 or len({*y}) == 1:
        assert pearson(x, y) is spearman(x, y) is None
        return
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-9)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
