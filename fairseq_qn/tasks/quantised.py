"""The iterative-quantisation task, as a mixin over any fairseq task: noise, stages, progress, figures to
log.

What is due (modules/stages.py) is frozen at the beginning of the epoch or update. The schedule is not
touched, of the optimizer only Adam's moments of what is frozen: before the next step, and so before any
checkpoint that holds the stage as frozen.
"""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isinf
from pathlib import Path
from typing import Any, Optional

from fairseq import checkpoint_utils
from fairseq.dataclass import FairseqDataclass
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from tqdm import tqdm

from fairseq_qn import api
from fairseq_qn.errors import RecipeError, UnsupportedError
from fairseq_qn.models.bpe import carry_bpe
from fairseq_qn.models.checkpoint import text_of
from fairseq_qn.models.config import config_of, elsewhere, remember
from fairseq_qn.models.options import BPE_FILES
from fairseq_qn.models.quantised import UPSTREAM_NOISE, QuantisedModel
from fairseq_qn.modules.moments import project_moments
from fairseq_qn.modules.stages import Boundaries, due, explain, freeze_due, refresh_epoch
from fairseq_qn.modules.undecayed import spare
from fairseq_qn.modules.view import WeightView
from fairseq_qn.recipe import Recipe
from fairseq_qn.tasks import forgotten, stages
from fairseq_qn.tasks.optimizers import masters_of, torch_optimizers

logger = logging.getLogger(__name__)

UNUSED = (  # options without a recipe
    "quant_p", "quant_bits", "quant_stage_updates", "quant_stage_epochs", "quant_iterations",
)  # fmt: skip


@dataclass
class QuantisedTaskConfig(FairseqDataclass):
    """Options that every qn_ task adds to those of fairseq's own task."""

    quant_recipe: Optional[str] = field(
        default=None,
        metadata={"help": "recipe: which layers, which scheme, how much noise, in which stages (YAML file)"},
    )
    quant_p: Optional[float] = field(
        default=None, metadata={"help": "noise probability in place of the recipe's; 0: none, 1: QAT"}
    )
    quant_bits: Optional[int] = field(
        default=None, metadata={"help": "bits in place of the recipe's, where a scheme has bits"}
    )
    quant_stage_updates: Optional[str] = field(
        default=None,
        metadata={
            "help": "updates after which each stage of the recipe is frozen, in order: 2000,4000,5000"
        },
    )
    quant_stage_epochs: Optional[str] = field(
        default=None,
        metadata={"help": "epochs at whose beginning each stage of the recipe is frozen, in order: 4,6,8"},
    )
    quant_iterations: int = field(
        default=20, metadata={"help": "iterations of k-means when a stage is frozen"}
    )
    quant_logits_lr: Optional[float] = field(
        default=None,
        metadata={"help": "learning rate of the logits of learned bits; by default that of the weights"},
    )
    quant_keep_moments: bool = field(
        default=False,
        metadata={"help": "leave Adam's moments as they are when a stage is frozen: codewords move less"},
    )


class QuantisedTask:
    """Mixin for a fairseq task class, before it in the bases."""

    boundaries: Boundaries = {}  # when training freezes each stage
    _fresh: tuple[WeightView, ...] = ()  # frozen since the last step
    _refreshed: int = 0  # the last epoch at whose beginning the codes of exact noise were learned
    # the last (update, micro-batch); an update that overflows in fp16 is tried again
    _micro: tuple[int, int] = (-1, 0)
    _text: tuple[dict[str, Any], dict[str, bytes]] | None = None  # the BPE that `compress` will carry along
    _trained_by: Any = None  # the optimizer, once what is learned beside weights is spared its weight decay
    _said: bool = False  # that the optimizer keeps no moments of Adam

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Any:
        """Set up fairseq's task. The recipe file is read here, once, and kept as text."""
        if not kwargs.get("from_checkpoint"):
            _refuse_unsupported(cfg)
            _warn_of_sending(cfg)
        text = getattr(cfg, "quant_recipe", None)
        if text:
            recipe = Recipe.load(text).with_(getattr(cfg, "quant_p", None), getattr(cfg, "quant_bits", None))
            remember(cfg, "task", "quant_recipe", recipe.to_json())
        return super().setup_task(cfg, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model with its heads, then check that every line of the recipe took a layer."""
        if not from_checkpoint:
            _refuse_undone(cfg, self._config)
            forgotten.check_labels(self, self._config)
            forgotten.say_tokens(self._config)
        model = super().build_model(cfg, from_checkpoint)
        recipe = api.recipe_of(model)
        if recipe is None:
            return model
        # a checkpoint's model may be built here for another use, with other heads
        strict = not from_checkpoint
        logger.info("recipe: %s", api.apply(model, recipe, strict=strict))
        self.boundaries = stages.boundaries(recipe, self._config)
        if strict:
            forgotten.say_stages(self.boundaries, [stage.name for stage in recipe.stages])
            stages.check_ends(self.boundaries, self._config)
        return model

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Freeze what is due by now, refresh what exact noise draws on."""
        super().begin_epoch(epoch, model)
        self._quant_model = model
        if api.recipe_of(model) is None:
            return
        self._freeze(due(self.boundaries, epoch=epoch), f"epoch {epoch}")
        if self._refreshed != epoch:  # on resume within an epoch the codes are those of its beginning
            refresh_epoch(model, _bar("codebooks of exact noise"))
            self._refreshed = epoch
        self._measure()

    def post_validate(self, model: Any, stats: dict[str, Any], agg: Any) -> None:
        """Before the last stage no score counts: the best model would be a dense one."""
        if any(stage in self.boundaries for stage in api.unfrozen(model)):
            stages.count_no_score(stats, self._config)

    def post_save(self, path: str, num_updates: int) -> None:
        """One line with each checkpoint: what it does not hold frozen, and why."""
        left = api.unfrozen(self._quant_model)
        if left:
            why = explain(left, self.boundaries)
            logger.info("%s: not frozen at update %d: %s", Path(path).name, num_updates, why)

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What fairseq adds to a checkpoint, and hands back before the epoch in which training resumes."""
        if isinf(getattr(checkpoint_utils.save_checkpoint, "best", 0)):
            stages.forget_best()  # a stand-in of count_no_score's, which is not to be kept
        return {type(self).__name__: {"refreshed": self._refreshed, "micro": list(self._micro)}}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """The epoch for which the checkpoint's codes were learned, and the last micro-batch."""
        self._refreshed, self._micro = state["refreshed"], tuple(state.get("micro", self._micro))

    def train_step(self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int,
                   ignore_grad: bool = False) -> Any:  # fmt: skip
        """fairseq's step, at the noise of this update and micro-batch; what is due is frozen first."""
        inner = getattr(self, "_quant_model", None)
        if inner is not None and api.recipe_of(inner) is not None:
            if self._freeze(due(self.boundaries, update=update_num), f"update {update_num}"):
                self._measure()
            if self._fresh and update_num and not optimizer.get_lr():  # update 0 may be a warm-up's
                logger.warning(
                    "update %d: frozen at a learning rate of 0, so nothing is trained after: stages %s",
                    update_num, ", ".join(dict.fromkeys(view.rule.stage for view in self._fresh)),
                )  # fmt: skip
            self._project_moments(optimizer)
            self._fresh = ()
            if self._trained_by is not optimizer:
                rate = getattr(self._config, "quant_logits_lr", None)
                spare(inner, torch_optimizers(optimizer), masters_of(optimizer), rate)
                self._trained_by = optimizer
            last, micro = self._micro
            self._micro = (update_num, micro + 1 if last == update_num else 0)
            api.set_update(inner, update_num, self._micro[1])
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def quant_figures(self) -> dict[str, float]:
        """What the criterion logs: frozen share, predicted MB, distortion of each frozen stage."""
        return getattr(self, "_figures", {})

    @property
    def _config(self) -> Any:
        return config_of(self)

    def _freeze(self, names: Sequence[str], when: str) -> bool:
        """Freeze those of the stages that are not frozen yet; whether there were any."""
        before, iterations = self._fresh, self._config.quant_iterations
        bar = lambda stage: _bar(f"{when}: freezing stage {stage}")  # noqa: E731
        for frozen in freeze_due(self._quant_model, names, iterations, bar):
            logger.info("%s: %s", when, frozen)
            self._fresh += (*frozen.views,)
            # scores of before do not compare, nor does one that a checkpoint brought along
            stages.forget_best()
        return self._fresh != before

    def _project_moments(self, optimizer: Any) -> None:
        """Adam's moments of what was frozen since the last step become those of the codewords."""
        if self._fresh and not self._config.quant_keep_moments:
            done, left = project_moments(torch_optimizers(optimizer), self._fresh, masters_of(optimizer))
            if done:
                logger.info("moments of Adam projected onto the clusters of %d layers", len(done))
            if left and not self._said:
                logger.warning("%s", left)
                self._said = True

    def _measure(self) -> None:
        model, first = self._quant_model, elsewhere(self._config, "checkpoint.finetune_from_model")
        if self._text is None:
            carried = text_of(first) if first and Path(first).is_file() else ({}, {})
            self._text = _bpe_of(self._config) or carried
        source, assets = self._text
        unused = getattr(model, "qn_unused", list)()
        self._figures = api.figures(model, drop=unused, assets=assets, source=source)


def _bpe_of(config: Any) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """What --bpe and its files add to a small file; None without."""
    bpe = elsewhere(config, "bpe")
    options = BPE_FILES.get(getattr(bpe, "_name", None), ())
    files = [Path(str(getattr(bpe, option, None))) for option in options]
    return carry_bpe(bpe._name, files) if files and all(file.is_file() for file in files) else None


def _refuse_unsupported(cfg: Any) -> None:
    """What the views cannot live with."""
    if elsewhere(cfg, "ema.store_ema"):
        raise UnsupportedError(
            "--store-ema: fairseq averages every tensor of the state dict, codes included; averaging codes "
            "means nothing. Train without --store-ema"
        )
    if elsewhere(cfg, "distributed_training.ddp_backend") == "fully_sharded":
        raise UnsupportedError(
            "--ddp-backend fully_sharded: sharding replaces the Parameters that views read; use legacy_ddp "
            "or c10d"
        )
    if elsewhere(cfg, "common.quantization_config_path"):
        raise UnsupportedError(
            "--quantization-config-path: fairseq's quantiser replaces the layers that views read; "
            "give that file as --quant-recipe"
        )


def _refuse_undone(cfg: Any, config: Any) -> None:
    """What is asked for and would not be done: fairseq's own models take no recipe."""
    name = getattr(cfg, "_name", None) or getattr(cfg, "arch", None)
    cls = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    asked = [
        key
        for key in ("quant_recipe", *UPSTREAM_NOISE)
        if getattr(cfg, key, None) or getattr(config, key, None)
    ]
    if asked and cls is not None and not issubclass(cls, QuantisedModel):
        raise UnsupportedError(
            f"--{asked[0].replace('_', '-')}: {cls.__name__} is fairseq's own, which takes no recipe, "
            "freezes no stage, and "
            f"whose noise leaves zeros in the weights; use the qn_ architecture: --arch qn_{name}"
        )
    default = QuantisedTaskConfig()
    for key in UNUSED if not asked else ():
        if getattr(config, key, None) not in (None, "", getattr(default, key)):
            raise RecipeError(
                f"--{key.replace('_', '-')}: there is no recipe, so nothing would be frozen; add "
                "--quant-recipe FILE"
            )


def _warn_of_sending(cfg: Any) -> None:
    """With several ranks the first sends the checkpoint, with objects that safe loading refuses."""
    alone = (elsewhere(cfg, "distributed_training.distributed_world_size") or 1) == 1
    if not alone and not elsewhere(cfg, "checkpoint.load_checkpoint_on_all_dp_ranks"):
        logger.warning(
            "add --load-checkpoint-on-all-dp-ranks: without it torch >= 2.6 cannot resume on several ranks"
        )


def _bar(title: str) -> Any:
    def progress(views: Sequence[WeightView]) -> Iterable[WeightView]:
        off = not views or not logger.isEnabledFor(logging.INFO)
        return tqdm(views, desc=title, unit="layer", leave=False, disable=off)

    return progress
