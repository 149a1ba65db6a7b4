"""qn_efficientnet: EfficientNet B0 to B3 as a fairseq model, its weights read through views."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture

from fairseq_qn.models.images import QNImageHub
from fairseq_qn.models.mbconv import EfficientNet
from fairseq_qn.models.quantised import QuantisedModel


@dataclass
class EfficientNetConfig(FairseqDataclass):
    """Options of the network; the number of classes and the size of images are the task's."""

    width: float = field(default=1.0, metadata={"help": "factor of the channels of B0"})
    depth: float = field(default=1.0, metadata={"help": "factor of the blocks of B0"})
    dropout: float = field(default=0.2, metadata={"help": "dropout before the classifier"})
    stochastic_depth: float = field(
        default=0.2, metadata={"help": "probability of leaving out the last block in training"}
    )
    norm_momentum: float = field(
        default=0.01,
        metadata={"help": "weight of a batch in batch norms' statistics; more in a run of few updates"},
    )
    quant_recipe: Optional[str] = field(default=None, metadata={"help": "recipe: a YAML file, or its text"})


class EfficientNetModel(EfficientNet, BaseFairseqModel):
    """The network as fairseq builds it."""

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> Any:
        """From the options of model and task."""
        channels, classes = task.cfg.image_channels, task.cfg.num_classes
        rest = cfg.dropout, cfg.stochastic_depth, cfg.norm_momentum
        return cls(classes, channels, cfg.width, cfg.depth, *rest)


@register_model("qn_efficientnet", dataclass=EfficientNetConfig)
class QNEfficientNetModel(QuantisedModel, EfficientNetModel):
    """EfficientNet with a recipe."""

    qn_interface = QNImageHub


# width, depth and dropout as published; images of 224, 240, 260 and 300 pixels (--image-size)
_PUBLISHED = {"b0": (1.0, 1.0, 0.2), "b1": (1.0, 1.1, 0.2), "b2": (1.1, 1.2, 0.3), "b3": (1.2, 1.4, 0.3)}


def _architecture(width: float, depth: float, dropout: float) -> Any:
    def set_defaults(cfg: Any) -> None:
        cfg.width, cfg.depth = getattr(cfg, "width", width), getattr(cfg, "depth", depth)
        cfg.dropout = getattr(cfg, "dropout", dropout)

    return set_defaults


for _name, _values in _PUBLISHED.items():
    register_model_architecture("qn_efficientnet", f"qn_efficientnet_{_name}")(_architecture(*_values))
