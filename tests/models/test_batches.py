"""Sentences in batches, and what is too long."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.models.batches import batches, shortened


@given(lengths=st.lists(st.integers(1, 9), max_size=20), size=st.integers(1, 7))
def test_every_sentence_stands_in_one_batch(lengths: list[int], size: int) -> None:
    tokens = [torch.arange(2, 2 + length) for length in lengths]
    seen = []
    for places, ids in batches(tokens, size, pad=1):
        assert len(places) <= size and ids.shape == (len(places), max(lengths[p] for p in places))
        for place, row in zip(places, ids, strict=True):
            assert row[: lengths[place]].equal(tokens[place]) and (row[lengths[place] :] == 1).all()
        seen += places
    assert sorted(seen) == list(range(len(tokens))) and [lengths[p] for p in seen] == sorted(lengths)


@given(lengths=st.lists(st.integers(0, 99), min_size=1, max_size=4), room=st.integers(4, 99))
def test_the_longest_gives_way(lengths: list[int], room: int) -> None:
    cut = shortened(lengths, room)
    assert sum(cut) <= max(room, 0) and all(0 <= new <= old for new, old in zip(cut, lengths, strict=True))
    if sum(lengths) <= room:
        assert cut == lengths
    if len(lengths) < 3:
        assert sum(cut) > min(room, sum(lengths)) - 2  # at most one place is left empty
