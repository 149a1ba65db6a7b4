"""Criterions registered with fairseq."""

import fairseq  # noqa: F401  (before any of ours: it makes plugin.py import them all)

from fairseq_qn.criterions import quantization_aware  # noqa: F401
