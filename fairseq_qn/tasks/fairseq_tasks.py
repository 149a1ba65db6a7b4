"""The qn_ tasks: the iterative-quantisation mixin over each of fairseq's own. Nothing is copied."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.masked_lm import MaskedLMConfig, MaskedLMTask
from fairseq.tasks.sentence_prediction import SentencePredictionConfig, SentencePredictionTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fairseq_qn.tasks.quantised import QuantisedTask, QuantisedTaskConfig


@dataclass
class QNMaskedLMConfig(QuantisedTaskConfig, MaskedLMConfig):
    """Options of masked_lm and of the iterative quantisation."""


@register_task("qn_masked_lm", dataclass=QNMaskedLMConfig)
class QNMaskedLMTask(QuantisedTask, MaskedLMTask):
    """Masked language modelling with quantisation noise and stages."""


@dataclass
class QNSentencePredictionConfig(QuantisedTaskConfig, SentencePredictionConfig):
    """Options of sentence_prediction and of the iterative quantisation."""

    # the criterion's, as fairseq has it, but fairseq-validate takes the criterion from the checkpoint
    regression_target: bool = "${oc.select:criterion.regression_target,false}"
    classification_head_name: str = (
        "${oc.select:criterion.classification_head_name,sentence_classification_head}"
    )


@register_task("qn_sentence_prediction", dataclass=QNSentencePredictionConfig)
class QNSentencePredictionTask(QuantisedTask, SentencePredictionTask):
    """Classification or regression of sentences with quantisation noise and stages."""


@dataclass
class QNLanguageModelingConfig(QuantisedTaskConfig, LanguageModelingConfig):
    """Options of language_modeling and of the iterative quantisation."""


@register_task("qn_language_modeling", dataclass=QNLanguageModelingConfig)
class QNLanguageModelingTask(QuantisedTask, LanguageModelingTask):
    """Language modelling with quantisation noise and stages."""


@dataclass
class QNTranslationConfig(QuantisedTaskConfig, TranslationConfig):
    """Options of translation and of the iterative quantisation."""


@register_task("qn_translation", dataclass=QNTranslationConfig)
class QNTranslationTask(QuantisedTask, TranslationTask):
    """Translation with quantisation noise and stages."""
