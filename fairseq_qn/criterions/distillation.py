"""Distillation from a teacher (Hinton et al. 2015), whatever the wrapped criterion asks of its model."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.criterions.options import Options
from fairseq_qn.criterions.terms import Term
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.models.config import config_of
from fairseq_qn.models.pretrained import load_any

logger = logging.getLogger(__name__)


class Distillation(Term):
    """(1 - w) * loss + w * T^2 * KL(teacher_T || student_T), summed as the loss is.

    A head of one output, whose softmax is 1 whatever it says: w * (teacher - student)^2. Where the wrapped
    criterion calls its model several times, the distillation of all calls is summed.
    """

    sums = ("qn_distill_loss",)

    def __init__(self, teacher: nn.Module, weight: float, temperature: float, padding_idx: int) -> None:
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.padding_idx = padding_idx

    @classmethod
    def of(cls, options: Options, task: Any) -> Distillation | None:
        """With a teacher; None without."""
        weight, temperature = float(options.distill_weight), float(options.distill_temperature)
        if not 0 <= weight <= 1 or temperature <= 0:
            raise UnsupportedError(
                "quantization_aware: expected 0 <= distill_weight <= 1 and distill_temperature > 0, "
                f"found {weight} and {temperature}"
            )
        if options.teacher_checkpoint:
            # as fairseq's own criterions find it
            padding_idx = getattr(task, "target_dictionary", None)
            padding_idx = -100 if padding_idx is None else padding_idx.pad()
            return cls(load_teacher(options.teacher_checkpoint, task), weight, temperature, padding_idx)
        default = Options()
        if (weight, temperature) != (default.distill_weight, default.distill_temperature):
            logger.warning("--distill-weight, --distill-temperature: no teacher, so they do nothing; add "
                           "--teacher-checkpoint FILE")  # fmt: skip
        return None

    def watch(self, model: nn.Module) -> Any:
        """Has the teacher asked whatever the model is."""
        return _Recorder(model, self.teacher)

    def add(
        self, loss: Tensor, model: Any, sample: dict[str, Any], sample_size: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises UnsupportedError for a model that was never called, MismatchError for other logits."""
        if not model.answers:
            raise UnsupportedError(
                "quantization_aware: the wrapped criterion never called its model in training, so there is "
                "nothing to distil; drop --teacher-checkpoint"
            )
        total = model.answers[0][0].new_zeros((), dtype=torch.float32)
        for student, target in model.answers:
            if target.shape != student.shape:
                raise MismatchError(
                    f"teacher: logits: expected {list(student.shape)}, found {list(target.shape)}; "
                    "use a teacher of the same dictionary and head"
                )
            total = total + divergence(student, target, self.temperature, self._padding(sample, student))
        return (1 - self.weight) * loss + self.weight * total, {"qn_distill_loss": total.detach()}

    def _padding(self, sample: dict[str, Any], logits: Tensor) -> Tensor | None:
        """Which of [batch, length, classes] logits are padding; None for logits of another kind."""
        target = sample.get("target")
        if not isinstance(target, Tensor) or target.dim() != 2 or logits.dim() != 3 or not target.numel():
            return None
        # R-drop asks for its batch twice, one after the other
        times, rest = divmod(len(logits), len(target))
        if rest or logits.shape[1] != target.shape[1]:
            return None
        return target.eq(self.padding_idx).repeat(times, 1)


class _Recorder:
    """Stands in for the model in the wrapped criterion. At each call that trains, the teacher is asked the
    same at once.

    answers: (student's logits, teacher's logits) of each of these calls.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        self.model, self.teacher = model, teacher
        self.answers: list[tuple[Tensor, Tensor]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if torch.is_grad_enabled():
            student = _logits(output, self.model, kwargs)
            with torch.no_grad():
                answer = self.teacher.to(student.device)(*args, **kwargs)
            self.answers.append((student, _logits(answer, self.teacher, kwargs)))
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


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
