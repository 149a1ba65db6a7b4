"""fairseq's models whose weights are views."""

from fairseq_qn.models import roberta, transformer  # noqa: F401
