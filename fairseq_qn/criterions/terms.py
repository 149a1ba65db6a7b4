"""What training's loss holds beside that of the wrapped criterion: a list of terms, one class each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn

from fairseq_qn.criterions.options import Options


class Term(ABC):
    """One term. It is no module: what it holds is neither trained nor saved."""

    # of what it logs, the sums over samples; the rest are figures of a batch
    sums: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def of(cls, options: Options, task: Any) -> Term | None:
        """The term that these options ask for, or None. Raises UnsupportedError for a value out of range."""

    def watch(self, model: nn.Module) -> Any:
        """What the wrapped criterion is to call in the place of a model that trains."""
        return model

    @abstractmethod
    def add(
        self, loss: Tensor, model: Any, sample: dict[str, Any], sample_size: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(the loss with this term, what is logged), both summed over the samples as `loss` is.

        model: what `watch` gave, once the wrapped criterion is done with it.
        """
