"""qn_roberta: fairseq's RoBERTa whose weights can be read through views."""

from __future__ import annotations

from typing import Any

from fairseq.models import register_model
from fairseq.models.roberta import model as roberta
from torch import nn

from fairseq_qn import api
from fairseq_qn.models.interfaces import QNRobertaHub
from fairseq_qn.models.quantised import QuantisedModel, mirror_architectures


@register_model("qn_roberta")
class QNRobertaModel(QuantisedModel, roberta.RobertaModel):
    """RoBERTa with the LM head tied through the view, and classification heads that a recipe may name.

    `args.layer_norm_eps`, which an imported checkpoint may carry, sets the eps of every LayerNorm (fairseq:
    1e-5).
    """

    qn_interface = QNRobertaHub

    @staticmethod
    def add_args(parser: Any) -> None:
        """fairseq's options, and the LayerNorm eps."""
        roberta.RobertaModel.add_args(parser)
        parser.add_argument(
            "--layer-norm-eps", type=float, metavar="E", help="of every LayerNorm (fairseq 1e-5, BERT 1e-12)"
        )

    @classmethod
    def build_model(cls, args: Any, task: Any) -> QNRobertaModel:
        """Build the model; args as fairseq's `roberta`, and optionally quant_recipe, layer_norm_eps."""
        model = super().build_model(args, task)
        model.set_layer_norm_eps()
        return model

    def set_layer_norm_eps(self) -> None:
        """Give every LayerNorm the eps of the configuration, if it names one."""
        eps = getattr(self.args, "layer_norm_eps", None)
        for module in self.modules() if eps is not None else ():
            if isinstance(module, nn.LayerNorm):
                module.eps = float(eps)

    def qn_unused(self) -> list[str]:
        """The LM head, where a head was trained to classify: nothing asks it any more."""
        task = self.__dict__["_qn_source"][0]["task"]["_name"]
        return ["encoder.lm_head"] if task == "qn_sentence_prediction" else []

    def register_classification_head(
        self, name: str, num_classes: int | None = None, inner_dim: int | None = None, **kwargs: Any
    ) -> None:
        """Register a head, and the views of those of its layers that the recipe names."""
        super().register_classification_head(name, num_classes, inner_dim, **kwargs)
        recipe = api.recipe_of(self)
        if recipe is not None:
            api.apply(self, recipe, strict=False)


mirror_architectures("qn_roberta", "roberta")
