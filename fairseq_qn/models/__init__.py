"""fairseq's models whose weights are views."""

import fairseq  # noqa: F401  (before any of ours: it makes plugin.py import them all)

from fairseq_qn.models import efficientnet, roberta, transformer  # noqa: F401
