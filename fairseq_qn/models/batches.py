"""Sentences in batches: of like length, padded; too long ones cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

BATCH = 64  # sentences


def token_ids(words: Any, pieces: str) -> Tensor:
    """Ids [length] of pieces, joined by spaces, in fairseq's dictionary: what its `encode_line` gives in
    eight times as long, since it writes into a tensor piece by piece.
    """
    return torch.tensor([words.index(piece) for piece in pieces.split()], dtype=torch.int64)


def batches(tokens: Sequence[Tensor], size: int, pad: int) -> Iterator[tuple[list[int], Tensor]]:
    """Ids [length] of each sentence -> (places in `tokens`, ids [up to size, longest]), the shortest first:
    neighbours in length need little padding.
    """
    order = sorted(range(len(tokens)), key=lambda place: len(tokens[place]))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        rows = [tokens[place] for place in places]
        yield places, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


def shortened(lengths: Sequence[int], room: int) -> list[int]:
    """Lengths that fit into `room` together: the longest gives way first.

    >>> shortened([9, 3], 8), shortened([9, 8], 8), shortened([2, 3], 8)
    ([5, 3], [4, 4], [2, 3])
    """
    share = max(room // len(lengths), room - sum(lengths) + max(lengths))
    return [min(length, share) for length in lengths]
