"""quantization_aware: any registered criterion, with distillation from a teacher and the figures of quantisation logged."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY, FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.criterions.options import options_of, with_wrapped_options
from fairseq_qn.errors import MismatchError, UnsupportedError


@dataclass
class QuantizationAwareConfig(FairseqDataclass):
    """Options of the wrapper; those of the wrapped criterion are given under their own names."""

    wrapped_criterion: str = field(
        default="cross_entropy", metadata={"help": "the criterion that gives the task's loss"}
    )
    teacher_checkpoint: Optional[str] = field(
        default=None,
        metadata={"help": "checkpoint or small file of a teacher to distil from; neither trained nor saved"},
    )
    distill_weight: float = field(default=0.5, metadata={"help": "loss = (1 - weight) * task + weight * distillation"})
    distill_temperature: float = field(default=1.0, metadata={"help": "softmax temperature of the distillation"})


QuantizationAwareConfig = with_wrapped_options(QuantizationAwareConfig)


class _Recorder:
    """Stands in for the model in the wrapped criterion, and keeps what was asked and answered."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        self.calls.append((args, kwargs, output))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@register_criterion("quantization_aware", dataclass=QuantizationAwareConfig)
class QuantizationAwareCriterion(FairseqCriterion):
    """loss = (1 - w) * wrapped + w * T^2 * KL(teacher_T || student_T), summed as `wrapped` sums (Hinton et al. 2015)."""

    wrapped_class: type[FairseqCriterion] = FairseqCriterion

    def __init__(self, cfg: Any, task: Any, wrapped: FairseqCriterion) -> None:
        super().__init__(task)
        self.wrapped = wrapped
        self.weight, self.temperature = float(cfg.distill_weight), float(cfg.distill_temperature)
        if not 0 <= self.weight <= 1 or self.temperature <= 0:
            raise UnsupportedError(
                "quantization_aware: expected 0 <= distill_weight <= 1 and distill_temperature > 0, "
                f"found {self.weight} and {self.temperature}"
            )
        # In a list: a registered module would be saved with the criterion and handed to the optimizer.
        self._teacher = [load_teacher(cfg.teacher_checkpoint, task)] if cfg.teacher_checkpoint else []

    @classmethod
    def build_criterion(cls, cfg: Any, task: Any) -> "QuantizationAwareCriterion":
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
        recorder = _Recorder(model)
        loss, sample_size, logging = self.wrapped(recorder, sample, reduce)
        if self._teacher and model.training:
            distilled = self._distil(recorder, sample)
            logging["qn_distill_loss"] = distilled.detach()
            loss = (1 - self.weight) * loss + self.weight * distilled
            logging["loss"] = loss.detach()
        figures = getattr(self.task, "quant_figures", dict)()
        logging |= {f"qn_{name}": value for name, value in figures.items()}
        logging["qn_n"] = 1
        return loss, sample_size, logging

    def _distil(self, recorder: _Recorder, sample: dict[str, Any]) -> Tensor:
        args, kwargs, output = recorder.calls[0]
        student = output[0]
        teacher = self._teacher[0].to(student.device)
        with torch.no_grad():
            target = teacher(*args, **kwargs)[0]
        if not isinstance(student, Tensor) or target.shape != student.shape:
            found = list(target.shape)
            raise MismatchError(
                f"teacher: logits: expected {list(student.shape)}, found {found}; use a teacher of the same dictionary and head"
            )
        return divergence(student, target, self.temperature, self._padding(sample, student))

    def _padding(self, sample: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Which positions of [batch, length, classes] logits are padding; None where the logits are of another kind."""
        target = sample.get("target")
        aligned = isinstance(target, Tensor) and target.dim() == 2 and logits.shape[:2] == target.shape
        return target.eq(self.padding_idx) if aligned else None

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[dict[str, Any]]) -> None:
        """The wrapped criterion's metrics, then ours: means over the batches."""
        cls.wrapped_class.reduce_metrics(logging_outputs)
        n = sum(log.get("qn_n", 0) for log in logging_outputs)
        for key in sorted(
            {key for log in logging_outputs for key in log if key.startswith("qn_")} - {"qn_n", "qn_distill_loss"}
        ):
            metrics.log_scalar(key, sum(float(log.get(key, 0)) for log in logging_outputs) / n, weight=0, round=4)
        size = sum(float(log.get("sample_size", 0)) for log in logging_outputs)
        if size and any("qn_distill_loss" in log for log in logging_outputs):
            total = sum(float(log.get("qn_distill_loss", 0)) for log in logging_outputs)
            metrics.log_scalar("qn_distill_loss", total / size, size, round=4)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        """As the wrapped criterion says."""
        return cls.wrapped_class.logging_outputs_can_be_summed()


def divergence(student: Tensor, teacher: Tensor, temperature: float, padding: Tensor | None = None) -> Tensor:
    """T^2 * sum over rows, padding aside, of KL(softmax(teacher / T) || softmax(student / T)); logits [..., classes], nats."""
    log_p = F.log_softmax(student.float() / temperature, dim=-1)
    log_q = F.log_softmax(teacher.float() / temperature, dim=-1)
    rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    if padding is not None:
        rows = rows.masked_fill(padding, 0)
    return rows.sum() * temperature**2


def load_teacher(path: str, task: Any) -> nn.Module:
    """A teacher in eval mode, without gradients, from a fairseq checkpoint or a small file."""
    from fairseq_qn import hub

    teacher = hub.load_any(path, data=getattr(getattr(task, "cfg", None) or task.args, "data", None))
    return teacher.eval().requires_grad_(False)
