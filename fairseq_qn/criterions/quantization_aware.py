"""quantization_aware: any criterion, with further terms in training, and the figures of quantisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fairseq.criterions import (
    CRITERION_DATACLASS_REGISTRY,
    CRITERION_REGISTRY,
    FairseqCriterion,
    register_criterion,
)
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_qn.criterions.distillation import Distillation
from fairseq_qn.criterions.options import options_of, with_wrapped_options
from fairseq_qn.criterions.size import Size
from fairseq_qn.criterions.terms import Term
from fairseq_qn.errors import UnsupportedError

TERMS: list[type[Term]] = [Distillation, Size]  # in the order in which they are added
QuantizationAwareConfig = with_wrapped_options("QuantizationAwareConfig", __name__)


@register_criterion("quantization_aware", dataclass=QuantizationAwareConfig)
class QuantizationAwareCriterion(FairseqCriterion):
    """The wrapped criterion's loss, and in training each of the terms that the options ask for."""

    wrapped_class: type[FairseqCriterion] = FairseqCriterion

    def __init__(self, cfg: Any, task: Any, wrapped: FairseqCriterion) -> None:
        super().__init__(task)
        self.wrapped = wrapped
        self.terms = [term for term in (cls.of(cfg, task) for cls in TERMS) if term is not None]

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> QuantizationAwareCriterion:
        """Build the wrapped criterion, and a subclass that knows it: fairseq reduces metrics by class."""
        name = cfg.wrapped_criterion
        if name not in CRITERION_REGISTRY or name == "quantization_aware":
            known = ", ".join(sorted(CRITERION_REGISTRY))
            raise UnsupportedError(
                f"--wrapped-criterion: expected a registered criterion, found {name!r}; known: {known}"
            )
        wrapped_class, config = CRITERION_REGISTRY[name], cfg
        if name in CRITERION_DATACLASS_REGISTRY:
            config = options_of(CRITERION_DATACLASS_REGISTRY[name], cfg, QuantizationAwareConfig)
        own = type(f"QuantizationAware{wrapped_class.__name__}", (cls,), {"wrapped_class": wrapped_class})
        return own(cfg, task, wrapped_class.build_criterion(config, task))

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """(loss, sample size, logging output), as fairseq asks."""
        terms, seen = self.terms if model.training else [], [model]
        for term in terms:
            seen.append(term.watch(seen[-1]))
        loss, sample_size, logged = self.wrapped(seen[-1], sample, reduce)
        for term, watched in zip(terms, seen[1:]):
            loss, more = term.add(loss, watched, sample, sample_size)
            logged |= more | {"loss": loss.detach()}
        figures = getattr(self.task, "quant_figures", dict)()
        logged |= {f"qn_{name}": value for name, value in figures.items()}
        logged["qn_n"] = 1
        return loss, sample_size, logged

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[dict[str, Any]]) -> None:
        """The wrapped criterion's metrics, then ours: means over the batches, of sums over the samples."""
        cls.wrapped_class.reduce_metrics(logging_outputs)
        n = sum(log.get("qn_n", 0) for log in logging_outputs)
        size = sum(float(log.get("sample_size", 0)) for log in logging_outputs)
        sums = {key for term in TERMS for key in term.sums}
        for key in sorted(
            {key for log in logging_outputs for key in log if key.startswith("qn_")} - {"qn_n"}
        ):
            total = sum(float(log.get(key, 0)) for log in logging_outputs)
            if key not in sums:
                metrics.log_scalar(key, total / n, weight=0, round=4)
            elif size:
                metrics.log_scalar(key, total / size, size, round=4)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        """As the wrapped criterion says."""
        return cls.wrapped_class.logging_outputs_can_be_summed()
