"""Compressed embedding tables: only the rows that are asked for are decoded."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.modules.packed import PQ, Int
from fairseq_qn.quant.integer import Integers, dequantize


class PQEmbedding(PQ, nn.Embedding):
    """An Embedding that holds codes [num_embeddings, embedding_dim / d] and a codebook [K, d]."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the decoded table: integers of any shape -> [..., embedding_dim]."""
        if self.max_norm is not None:
            return _clipped(self, input)
        rows = F.embedding(F.embedding(input, self.codes).int(), self.codebook).flatten(-2)
        if self.qn_padding_idx is None:
            return rows
        is_pad = (input == self.qn_padding_idx).unsqueeze(-1)
        return (
            rows.masked_fill(is_pad, 0) if self.pad_row is None else torch.where(is_pad, self.pad_row, rows)
        )


class IntEmbedding(Int, nn.Embedding):
    """An Embedding that holds integers."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the de-quantised table: integers of any shape -> [..., embedding_dim]."""
        if self.max_norm is not None:
            return _clipped(self, input)
        rows, columns = self.qn_shape
        ranges = max(1, len(self.scale) // rows)  # of each row
        scale, zero = (
            F.embedding(input, t.view(-1, ranges).expand(rows, -1)).flatten()
            for t in (self.scale, self.zero)
        )
        levels = F.embedding(input, self.levels.view(rows, columns)).view(-1, columns // ranges)
        return dequantize(Integers(levels, scale, zero), (*input.shape, columns), self.scale.dtype)


def _clipped(module: PQEmbedding | IntEmbedding, input: Tensor) -> Tensor:
    """Rows of the whole table, which max_norm clips the rows of."""
    table, m = module.decoded(), module
    return F.embedding(input, table, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
