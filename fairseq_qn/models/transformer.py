"""qn_transformer and qn_transformer_lm: fairseq's translation and language models, read through views."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.models import register_model
from fairseq.models.transformer import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig

from fairseq_qn.models.quantised import QuantisedModel, mirror_architectures


class _Hub:
    @classmethod
    def from_pretrained(
        cls, model_name_or_path: Any, checkpoint_file: str = "model.pt", *args: Any, **kwargs: Any
    ) -> Any:
        """A generator interface from a small file, a folder that holds one, or (as fairseq) a folder with a
        checkpoint.
        """
        from fairseq_qn import hub

        return hub.generator_from_pretrained(cls, model_name_or_path, checkpoint_file, *args, **kwargs)


@register_model("qn_transformer")
class QNTransformerModel(_Hub, QuantisedModel, TransformerModel):
    """Encoder-decoder Transformer. Adaptive softmax is refused by the recipe's block sizes, not silently
    left dense.
    """


@dataclass
class QNTransformerLMConfig(TransformerLanguageModelConfig):
    """fairseq's options, and the recipe as text (filled in from the task)."""

    quant_recipe: Optional[str] = field(default=None, metadata={"help": "recipe: a YAML file, or its text"})


@register_model("qn_transformer_lm", dataclass=QNTransformerLMConfig)
class QNTransformerLanguageModel(_Hub, QuantisedModel, TransformerLanguageModel):
    """Decoder-only language model."""


mirror_architectures("qn_transformer", "transformer")
mirror_architectures("qn_transformer_lm", "transformer_lm")
