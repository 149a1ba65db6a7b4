"""qn_transformer and qn_transformer_lm: fairseq's translation and language models, read through views."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import dataclass, field
from typing import Optional

from fairseq.models import register_model
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_qn.models.interfaces import QNGeneratorHub
from fairseq_qn.models.quantised import QuantisedModel, mirror_architectures


@register_model("qn_transformer")
class QNTransformerModel(QuantisedModel, TransformerModel):
    """Encoder-decoder Transformer. The recipe's block sizes refuse an adaptive softmax."""

    qn_interface = QNGeneratorHub


@dataclass
class QNTransformerLMConfig(TransformerLanguageModelConfig):
    """fairseq's options, and the recipe as text (filled in from the task)."""

    quant_recipe: Optional[str] = field(default=None, metadata={"help": "recipe: a YAML file, or its text"})


@register_model("qn_transformer_lm", dataclass=QNTransformerLMConfig)
class QNTransformerLanguageModel(QuantisedModel, TransformerLanguageModel):
    """Decoder-only language model."""

    qn_interface = QNGeneratorHub


mirror_architectures("qn_transformer", "transformer")
mirror_architectures("qn_transformer_lm", "transformer_lm")
