"""quantization_aware: any criterion, with distillation from a teacher and the figures of quantisation."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from fairseq.criterions import (
    CRITERION_DATACLASS_REGISTRY,
    CRITERION_REGISTRY,
    FairseqCriterion,
    register_criterion,
)
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.criterions.options import options_of, with_wrapped_options
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.models.config import config_of
from fairseq_qn.models.pretrained import load_any

logger = logging.getLogger(__name__)


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
    distill_weight: float = field(
        default=0.5, metadata={"help": "loss = (1 - weight) * task + weight * distillation"}
    )
    distill_temperature: float = field(
        default=1.0,
        metadata={"help": "softmax temperature of the distillation; a head of one output has none"},
    )


QuantizationAwareConfig = with_wrapped_options(QuantizationAwareConfig)


class _Recorder:
    """Stands in for the model in the wrapped criterion. At each call that trains, the teacher is asked the
    same at once.

    answers: (student's logits, teacher's logits) of each of these calls.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None) -> None:
        self.model, self.teacher, self.answers = model, teacher, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if self.teacher is not None and torch.is_grad_enabled():
            student = _logits(output, self.model, kwargs)
            with torch.no_grad():
                answer = self.teacher.to(student.device)(*args, **kwargs)
            self.answers.append((student, _logits(answer, self.teacher, kwargs)))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@register_criterion("quantization_aware", dataclass=QuantizationAwareConfig)
class QuantizationAwareCriterion(FairseqCriterion):
    """loss = (1 - w) * wrapped + w * T^2 * KL(teacher_T || student_T), summed as `wrapped` sums (Hinton et
    al. 2015).

    A head of one output, whose softmax is 1 whatever it says: w * (teacher - student)^2. Where `wrapped`
    calls its model several times, the distillation of all calls is summed.
    """

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
        default = QuantizationAwareConfig()
        own = (cfg.distill_weight, cfg.distill_temperature)
        if not cfg.teacher_checkpoint and own != (default.distill_weight, default.distill_temperature):
            logger.warning("--distill-weight, --distill-temperature: no teacher, so they do nothing; add "
                           "--teacher-checkpoint FILE")  # fmt: skip
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
        teacher = self._teacher[0] if self._teacher and model.training else None
        recorder = _Recorder(model, teacher)
        loss, sample_size, logged = self.wrapped(recorder, sample, reduce)
        if teacher is not None:
            distilled = self._distil(recorder.answers, sample)
            logged["qn_distill_loss"] = distilled.detach()
            loss = (1 - self.weight) * loss + self.weight * distilled
            logged["loss"] = loss.detach()
        figures = getattr(self.task, "quant_figures", dict)()
        logged |= {f"qn_{name}": value for name, value in figures.items()}
        logged["qn_n"] = 1
        return loss, sample_size, logged

    def _distil(self, answers: Sequence[tuple[Tensor, Tensor]], sample: dict[str, Any]) -> Tensor:
        if not answers:
            raise UnsupportedError(
                f"quantization_aware: {self.wrapped_class.__name__} never called its model in training, so "
                "there is nothing to distil; drop --teacher-checkpoint"
            )
        total = answers[0][0].new_zeros((), dtype=torch.float32)
        for student, target in answers:
            if target.shape != student.shape:
                raise MismatchError(
                    f"teacher: logits: expected {list(student.shape)}, found {list(target.shape)}; "
                    "use a teacher of the same dictionary and head"
                )
            total = total + divergence(student, target, self.temperature, self._padding(sample, student))
        return total

    def _padding(self, sample: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Which positions of [batch, length, classes] logits are padding; None where the logits are of
        another kind.
        """
        target = sample.get("target")
        if not isinstance(target, Tensor) or target.dim() != 2 or logits.dim() != 3 or not target.numel():
            return None
        # R-drop asks for its batch twice, one after the other
        times, rest = divmod(len(logits), len(target))
        return (
            None
            if rest or logits.shape[1] != target.shape[1]
            else target.eq(self.padding_idx).repeat(times, 1)
        )

    @classmethod
    def reduce_metrics(cls, logging_outputs: Sequence[dict[str, Any]]) -> None:
        """The wrapped criterion's metrics, then ours: means over the batches."""
        cls.wrapped_class.reduce_metrics(logging_outputs)
        n = sum(log.get("qn_n", 0) for log in logging_outputs)
        for key in sorted(
            {key for log in logging_outputs for key in log if key.startswith("qn_")}
            - {"qn_n", "qn_distill_loss"}
        ):
            metrics.log_scalar(
                key, sum(float(log.get(key, 0)) for log in logging_outputs) / n, weight=0, round=4
            )
        size = sum(float(log.get("sample_size", 0)) for log in logging_outputs)
        if size and any("qn_distill_loss" in log for log in logging_outputs):
            total = sum(float(log.get("qn_distill_loss", 0)) for log in logging_outputs)
            metrics.log_scalar("qn_distill_loss", total / size, size, round=4)

    @classmethod
    def logging_outputs_can_be_summed(cls) -> bool:
        """As the wrapped criterion says."""
        return cls.wrapped_class.logging_outputs_can_be_summed()


def divergence(
    student: Tensor, teacher: Tensor, temperature: float, padding: Tensor | None = None
) -> Tensor:
    """T^2 * sum over rows, padding aside, of KL(softmax(teacher / T) || softmax(student / T)); logits [...,
    classes], nats.

    One class is a value, and so is each entry of logits [rows]: the sum of squared errors, at whatever
    temperature.
    """
    student, teacher = student.float(), teacher.float()
    if student.dim() < 2 or student.shape[-1] == 1:
        rows = (student - teacher).square()
        rows = rows.squeeze(-1) if rows.dim() > 1 else rows
    else:
        log_p = F.log_softmax(student / temperature, dim=-1)
        log_q = F.log_softmax(teacher / temperature, dim=-1)
        rows = (log_q.exp() * (log_q - log_p)).sum(-1) * temperature**2
    return rows.sum() if padding is None else rows.masked_fill(padding, 0).sum()


def _logits(output: Any, model: nn.Module, asked: dict[str, Any]) -> Tensor:
    """The logits in what a call of a model gave. Raises UnsupportedError where it gave anything else."""
    found = output[0] if isinstance(output, (tuple, list)) and output else output
    features = asked.get("features_only") and asked.get("classification_head_name") is None
    features = features or getattr(getattr(model, "decoder", None), "adaptive_softmax", None) is not None
    if features or not isinstance(found, Tensor) or not found.is_floating_point():
        kind = "features" if features else type(found).__name__
        raise UnsupportedError(
            f"quantization_aware: distillation needs logits from each call of {type(model).__name__}, found "
            f"{kind}; drop --teacher-checkpoint, or wrap a criterion that asks for logits alone"
        )
    return found


def load_teacher(path: str, task: Any) -> nn.Module:
    """A teacher in eval mode, without gradients, from a fairseq checkpoint or a small file."""
    teacher = load_any(path, data=getattr(config_of(task), "data", None))
    return teacher.eval().requires_grad_(False)
