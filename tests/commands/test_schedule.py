"""How long to train: the published and the tried settings, and every number of sentences between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.commands.schedule import schedule

SENTENCES = st.integers(1_000, 400_000)
WIDTHS = st.sampled_from([128, 256, 312, 384, 512, 768, 1024])


def test_minilm_mnli() -> None:
    """run_scripts/minilm_mnli.sh: 4 epochs at 1e-4; stages as epochs 2, 3 and 4 of 5 begin; down to 1e-5."""
    plan = schedule(8_999, 8_999 * 33, 384, 3)
    assert (plan.epoch, plan.rate, plan.dense, plan.staged) == (282, 1e-4, 4 * 282, 5 * 282)
    assert plan.stages == (282, 564, 846) and plan.end_rate == 1e-5
    assert abs(plan.dense_warm_up - 282 // 4) <= 3


def test_published() -> None:
    """RoBERTa-base on MNLI and RTE: rates of 1e-5 to 3e-5, warm-up of 6%; iPQ on RTE: 2,036 a stage at
    most.
    """
    mnli, rte = schedule(392_702, 392_702 * 40, 768, 3), schedule(2_490, 2_490 * 70, 768, 3)
    assert 1e-5 <= mnli.rate <= 3e-5 and mnli.dense == 3 * mnli.epoch
    assert mnli.stages == (2036, 4072, 6108) and mnli.dense_warm_up == -(-mnli.dense * 6 // 100)
    assert 1_100 <= rte.dense <= 2_036 and rte.stages[0] >= 280


def test_the_quickstart() -> None:
    """Its model of width 256 takes 5e-4, and 1,782 updates with each stage 300."""
    plan = schedule(9_503, 9_503 * 24, 256, 3)
    assert plan.rate == 5e-4 and plan.stages[1] - plan.stages[0] == 297 and plan.staged == 5 * 297


@given(SENTENCES, st.integers(4, 300), WIDTHS, st.integers(1, 5), st.none() | st.integers(1, 40))
def test_everywhere(n: int, length: int, width: int, n_stages: int, epochs: int | None) -> None:
    plan = schedule(n, n * length, width, n_stages, epochs)
    assert plan.epoch >= n / 32 and plan.dense % plan.epoch == 0
    lengths = [b - a for a, b in zip((0, *plan.stages), (*plan.stages, plan.staged))]
    assert len(plan.stages) == n_stages and lengths[-1] == 2 * lengths[0]  # noise, stages, two for the last
    assert len({*lengths[:-1]}) <= 1 and min(lengths) >= 1
    assert 0 < plan.dense_warm_up <= plan.dense and 0 < plan.staged_warm_up <= plan.staged
    assert plan.staged_warm_up <= plan.stages[0]
    assert 0 < plan.end_rate < plan.rate <= 5e-4
    if epochs is None:
        assert 3 <= plan.dense // plan.epoch <= 20 and plan.dense >= 640
    else:
        assert plan.dense == epochs * plan.epoch


@given(SENTENCES, SENTENCES, WIDTHS)
def test_more_sentences_never_train_less(a: int, b: int, width: int) -> None:
    few, many = (schedule(n, 30 * n, width, 3) for n in sorted((a, b)))
    # an epoch more or less, where the number of epochs steps down
    assert few.dense <= many.dense + many.epoch and few.stages <= many.stages


@given(SENTENCES, WIDTHS, st.integers(1, 20))
def test_twice_the_epochs_are_twice_the_work(n: int, width: int, epochs: int) -> None:
    once, twice = (schedule(n, 20 * n, width, 3, epochs=e) for e in (epochs, 2 * epochs))
    assert twice.dense == 2 * once.dense and abs(twice.stages[0] - 2 * once.stages[0]) <= 1


def test_a_rate_of_ones_own() -> None:
    plan = schedule(9_000, 100_000, 384, 3, rate=3e-5)
    assert plan.rate == 3e-5 and plan.end_rate == 3e-6


@given(SENTENCES)
def test_checkpoints_are_neither_rare_nor_endless(n: int) -> None:
    """A kill loses some 500 updates at most; no more than every 100 a checkpoint is written."""
    plan = schedule(n, 20 * n, 384, 3)
    epochs, updates = plan.save
    assert 100 <= (updates or epochs * plan.epoch) <= 500
