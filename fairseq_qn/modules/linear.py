"""Compressed Linear layers."""

from torch import nn

from fairseq_qn.modules.packed import PQ, Int


class PQLinear(PQ, nn.Linear):
    """A Linear that holds codes and a codebook."""


class IntLinear(Int, nn.Linear):
    """A Linear that holds integers."""
