"""Compressed 2-d convolutions."""

from torch import nn

from fairseq_qn.modules.packed import PQ, Int


class PQConv2d(PQ, nn.Conv2d):
    """A Conv2d that holds codes and a codebook."""


class IntConv2d(Int, nn.Conv2d):
    """A Conv2d that holds integers."""
