"""Criterions registered with fairseq."""

from fairseq_qn.criterions import quantization_aware  # noqa: F401
