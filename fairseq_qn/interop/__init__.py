"""Other ecosystems' files. Nothing here imports fairseq."""

from __future__ import annotations

from fairseq_qn.interop.hf import ImportReport, import_hf

__all__ = ["ImportReport", "import_hf"]
