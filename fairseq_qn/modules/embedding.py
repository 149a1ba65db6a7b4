"""Compressed embedding tables: only the rows that are asked for are decoded."""

from __future__ import annotations

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
        rows = F.embedding(self.codes[input].int(), self.codebook).flatten(-2)
        return (
            rows if self.qn_padding_idx is None else rows.masked_fill((input == self.qn_padding_idx).unsqueeze(-1), 0)
        )


class IntEmbedding(Int, nn.Embedding):
    """An Embedding that holds integers."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the de-quantised table: integers of any shape -> [..., embedding_dim]."""
        if self.max_norm is not None:
            return _clipped(self, input)
        rows, columns = self.qn_shape
        ids, ranges = input.flatten(), max(1, len(self.scale) // rows)  # of each row
        scale, zero = (t.view(-1, ranges).expand(rows, -1)[ids].flatten() for t in (self.scale, self.zero))
        levels = self.levels.view(rows, columns)[ids].view(-1, columns // ranges)
        return dequantize(Integers(levels, scale, zero), (*input.shape, columns), self.scale.dtype)


def _clipped(module: PQEmbedding | IntEmbedding, input: Tensor) -> Tensor:
    """Rows of the whole table, which max_norm clips the rows of."""
    table, m = module.decoded(), module
    return F.embedding(input, table, m.padding_idx, m.max_norm, m.norm_type, m.scale_grad_by_freq, m.sparse)
