"""qn_image_classification: images into classes, which fairseq has no task for."""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from fairseq.data import Dictionary
from fairseq.dataclass import FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from omegaconf import MISSING

from fairseq_qn.models.config import seed_of
from fairseq_qn.tasks.image_data import ImageDataset, read_images, read_names
from fairseq_qn.tasks.quantised import QuantisedTask, QuantisedTaskConfig


@dataclass
class ImageClassificationConfig(FairseqDataclass):
    """Where images lie, and what they are."""

    data: str = field(default=MISSING, metadata={"help": "folder with train.npz, valid.npz, labels.txt"})
    num_classes: int = field(default=MISSING, metadata={"help": "number of classes"})
    image_size: int = field(
        default=224, metadata={"help": "pixels of a side, to which images are brought (B3: 300)"}
    )
    image_channels: int = field(default=3, metadata={"help": "channels of an image: 1 or 3"})


class ImageClassificationTask(FairseqTask):
    """Sets of labelled images (tasks/image_data.py) for any criterion that reads logits and targets."""

    def __init__(self, cfg: Any, label_dictionary: Optional[Dictionary] = None) -> None:
        super().__init__(cfg)
        self.label_dictionary = label_dictionary

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Any:
        """With the names of the classes, if there are any."""
        return cls(cfg, read_names(Path(cfg.data)))

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """One set. Raises DataError."""
        path = Path(self.cfg.data) / f"{split}.npz"
        images, labels = read_images(path, self.cfg.image_channels, self.cfg.num_classes)
        seed = seed_of(self.cfg) if split == "train" else None
        self.datasets[split] = ImageDataset(images, labels, self.cfg.image_size, seed)

    @property
    def source_dictionary(self) -> None:
        """Images have none."""
        return None

    @property
    def target_dictionary(self) -> None:
        """Nor has a class a padding symbol."""
        return None

    def max_positions(self) -> None:
        """None: an image is never too long."""
        return None


@dataclass
class QNImageClassificationConfig(QuantisedTaskConfig, ImageClassificationConfig):
    """Options of image classification and of the iterative quantisation."""


@register_task("qn_image_classification", dataclass=QNImageClassificationConfig)
class QNImageClassificationTask(QuantisedTask, ImageClassificationTask):
    """Image classification with quantisation noise and stages."""
