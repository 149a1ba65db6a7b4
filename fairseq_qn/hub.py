"""What fairseq users import by name: the models, loading by name, what commands do with checkpoints."""

from __future__ import annotations

from fairseq_qn.models.bpe import carry_bpe
from fairseq_qn.models.checkpoint import load_checkpoint, text_of
from fairseq_qn.models.efficientnet import QNEfficientNetModel
from fairseq_qn.models.images import QNImageHub, prepared
from fairseq_qn.models.interfaces import QNGeneratorHub, QNRobertaHub, ranked
from fairseq_qn.models.options import BPE_FILES
from fairseq_qn.models.pretrained import (
    SUFFIX,
    checkpoint_interface,
    find_file,
    is_small,
    load_any,
    load_interface,
)
from fairseq_qn.models.roberta import QNRobertaModel
from fairseq_qn.models.stock import export_fairseq
from fairseq_qn.models.transformer import QNTransformerLanguageModel, QNTransformerModel

__all__ = [
    "BPE_FILES", "SUFFIX", "QNEfficientNetModel", "QNGeneratorHub", "QNImageHub", "QNRobertaHub",
    "QNRobertaModel", "QNTransformerLanguageModel", "QNTransformerModel", "carry_bpe",
    "checkpoint_interface", "export_fairseq", "find_file", "is_small", "load_any", "load_checkpoint",
    "load_interface", "prepared", "ranked",
    "text_of",
]  # fmt: skip
