"""Compressed embedding tables: only the rows that are asked for are decoded."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.modules.packed import PQ, Int


class PQEmbedding(PQ, nn.Embedding):
    """An Embedding that holds codes [num_embeddings, embedding_dim / d] and a codebook [K, d]."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of the decoded table: integers of any shape -> [..., embedding_dim]."""
        if self.max_norm is not None:
            table = self.decoded()  # which the norm is clipped in
            return F.embedding(
                input, table, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
            )
        rows = F.embedding(self.codes[input].int(), self.codebook).flatten(-2)
        return (
            rows if self.qn_padding_idx is None else rows.masked_fill((input == self.qn_padding_idx).unsqueeze(-1), 0)
        )


class IntEmbedding(Int, nn.Embedding):
    """An Embedding that holds integers."""
