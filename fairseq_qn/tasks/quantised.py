"""The iterative-quantisation task, as a mixin over any fairseq task: noise, stages, progress, figures to log.

The stage is read from the model's own buffers, so no counter can skip or repeat one: whatever is due and not frozen yet
is frozen at the beginning of the epoch or update, by the same rule on resume. Optimizer and schedule are not touched.
"""

# No `annotations` future here: fairseq and omegaconf read the types of the dataclass fields.
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from omegaconf import OmegaConf
from tqdm import tqdm

from fairseq_qn import api
from fairseq_qn.errors import RecipeError, UnsupportedError
from fairseq_qn.models.quantised import remember
from fairseq_qn.modules.freeze import refresh_views
from fairseq_qn.modules.view import FROZEN, WeightView, views_of
from fairseq_qn.recipe import Recipe

logger = logging.getLogger(__name__)


@dataclass
class QuantisedTaskConfig(FairseqDataclass):
    """Options that every qn_ task adds to those of fairseq's own task."""

    quant_recipe: Optional[str] = field(
        default=None,
        metadata={"help": "recipe: which layers, which scheme, how much noise, in which stages (YAML file)"},
    )
    quant_stage_updates: Optional[str] = field(
        default=None,
        metadata={"help": "updates after which each stage of the recipe is frozen, in order: 2000,4000,5000"},
    )
    quant_stage_epochs: Optional[str] = field(
        default=None, metadata={"help": "epochs at whose beginning each stage of the recipe is frozen, in order: 4,6,8"}
    )
    quant_iterations: int = field(default=20, metadata={"help": "iterations of k-means when a stage is frozen"})


class QuantisedTask:
    """Mixin for a fairseq task class, before it in the bases."""

    _refreshed: int = 0  # the last epoch at whose beginning the codes of exact noise were learned
    _micro: tuple[int, int] = (-1, 0)  # the last (update, micro-batch); an update that overflows in fp16 is tried again

    @classmethod
    def setup_task(cls, cfg: Any, **kwargs: Any) -> Any:
        """Set up fairseq's task. The recipe file is read here, once, and its text kept in the configuration."""
        if not kwargs.get("from_checkpoint"):
            _refuse_unsupported(cfg)
            _warn_of_sending(cfg)
        text = getattr(cfg, "quant_recipe", None)
        if text:
            remember(cfg, "task", "quant_recipe", Recipe.load(text).to_json())
        return super().setup_task(cfg, **kwargs)

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """Build the model with its heads, then check that every line of the recipe took a layer."""
        model = super().build_model(cfg, from_checkpoint)
        recipe = api.recipe_of(model)
        if recipe is None:
            if getattr(self._config, "quant_recipe", None):
                raise UnsupportedError(
                    f"--quant-recipe: {type(model).__name__} takes no recipe; use a qn_ architecture"
                )
            return model
        strict = not from_checkpoint  # a checkpoint's model may be built here for another use, with other heads
        logger.info("recipe: %s", api.apply(model, recipe, strict=strict))
        self._boundaries = _boundaries(recipe, self._config)
        _warn_of_late(self._boundaries, self._config)
        return model

    def begin_epoch(self, epoch: int, model: Any) -> None:
        """Freeze what is due by now, refresh what exact noise draws on."""
        super().begin_epoch(epoch, model)
        self._quant_model = model
        if api.recipe_of(model) is None:
            return
        due = [name for name, (unit, at) in self._boundaries.items() if unit == "epoch" and epoch >= at]
        self._freeze_due(due, f"epoch {epoch}")
        if self._refreshed != epoch:  # on resume within an epoch the codes are those of its beginning
            views = [view for view in views_of(model) if view.noise.refresh == "epoch"]
            refresh_views(views, progress=_bar("codebooks of exact noise"))
            self._refreshed = epoch
        self._measure()

    def get_checkpoint_dict(self) -> dict[str, Any]:
        """What fairseq adds to a checkpoint, and hands back before the epoch in which training resumes."""
        return {type(self).__name__: {"refreshed": self._refreshed, "micro": list(self._micro)}}

    def set_checkpoint_dict(self, state: dict[str, Any]) -> None:
        """The epoch at whose beginning the codes in the checkpoint were learned, and the last micro-batch."""
        self._refreshed, self._micro = state["refreshed"], tuple(state.get("micro", self._micro))

    def train_step(self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int,
                   ignore_grad: bool = False) -> Any:  # fmt: skip
        """fairseq's step, at the noise of this update and micro-batch; stages that are due are frozen first."""
        inner = getattr(self, "_quant_model", None)
        if inner is not None and api.recipe_of(inner) is not None:
            due = [name for name, (unit, at) in self._boundaries.items() if unit == "update" and update_num >= at]
            if self._freeze_due(due, f"update {update_num}"):
                self._measure()
            last, micro = self._micro
            self._micro = (update_num, micro + 1 if last == update_num else 0)
            api.set_update(inner, update_num, self._micro[1])
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def quant_figures(self) -> dict[str, float]:
        """What the criterion logs: frozen share, predicted MB, distortion of each frozen stage."""
        return getattr(self, "_figures", {})

    @property
    def _config(self) -> Any:
        return getattr(self, "cfg", None) or getattr(self, "args", None)

    def _freeze_due(self, stages: Sequence[str], when: str) -> bool:
        """Freeze those of the stages that are not frozen yet; whether there were any."""
        frozen = False
        for stage in stages:
            views = [view for view in views_of(self._quant_model) if view.rule.stage == stage and view.phase != FROZEN]
            if views:
                bar = _bar(f"{when}: freezing stage {stage}")
                reports = api.freeze(self._quant_model, stage, iterations=self._config.quant_iterations, progress=bar)
                worst = max(reports, key=lambda report: report.error)
                logger.info(
                    "%s: stage %s frozen: %d layers in %.1f s, largest relative error %.4f (%s)",
                    when, stage, len(reports), sum(r.seconds for r in reports), worst.error, worst.name,
                )  # fmt: skip
                frozen = True
        return frozen

    def _measure(self) -> None:
        self._figures = api.figures(self._quant_model)


def _boundaries(recipe: Recipe, config: Any) -> dict[str, tuple[str, int]]:
    """stage -> (unit, number) at which it is frozen: from the options, else from the recipe; {} freezes nothing."""
    names = [stage.name for stage in recipe.stages]
    given = {unit: getattr(config, f"quant_stage_{unit}s", None) for unit in ("update", "epoch")}
    if given["update"] and given["epoch"]:
        raise RecipeError("--quant-stage-updates and --quant-stage-epochs: give one of the two")
    for unit, text in given.items():
        if text:
            option = f"--quant-stage-{unit}s"
            try:
                numbers = [int(part) for part in str(text).strip("[]").split(",")]
            except ValueError:
                raise RecipeError(f"{option}: expected numbers separated by commas, found {text!r}") from None
            if len(numbers) != len(names) or numbers != sorted(numbers):
                raise RecipeError(
                    f"{option}: expected {len(names)} rising numbers, for stages {names}, found {numbers}"
                )
            return {name: (unit, number) for name, number in zip(names, numbers, strict=True)}
    own = {s.name: ("update", s.update) if s.update is not None else ("epoch", s.epoch) for s in recipe.stages}
    return {name: at for name, at in own.items() if at[1] is not None}


def _elsewhere(cfg: Any, option: str) -> Any:
    """An option of another group, from the whole configuration; None where the task's own stands alone.

    Not interpolated into the task's own: fairseq-generate's parser takes the text of an interpolation for True.
    """
    parent = cfg._get_parent() if OmegaConf.is_config(cfg) else None
    return None if parent is None else OmegaConf.select(parent, option)


def _refuse_unsupported(cfg: Any) -> None:
    """What the views cannot live with."""
    if _elsewhere(cfg, "ema.store_ema"):
        raise UnsupportedError(
            "--store-ema: fairseq averages every tensor of the state dict, codes included; averaging codes means nothing. "
            "Train without --store-ema"
        )
    if _elsewhere(cfg, "distributed_training.ddp_backend") == "fully_sharded":
        raise UnsupportedError(
            "--ddp-backend fully_sharded: sharding replaces the Parameters that views read; use legacy_ddp or c10d"
        )
    if _elsewhere(cfg, "common.quantization_config_path"):
        raise UnsupportedError(
            "--quantization-config-path: fairseq's quantiser replaces the layers that views read; "
            "give that file as --quant-recipe"
        )


def _warn_of_sending(cfg: Any) -> None:
    """With several ranks fairseq has the first send the checkpoint to the others, with objects that safe loading refuses."""
    alone = (_elsewhere(cfg, "distributed_training.distributed_world_size") or 1) == 1
    if not alone and not _elsewhere(cfg, "checkpoint.load_checkpoint_on_all_dp_ranks"):
        logger.warning("add --load-checkpoint-on-all-dp-ranks: without it torch >= 2.6 cannot resume on several ranks")


def _warn_of_late(boundaries: dict[str, tuple[str, int]], cfg: Any) -> None:
    """A stage is frozen at the beginning of the update or epoch that follows its number, if there is one."""
    last = {"update": _elsewhere(cfg, "optimization.max_update") or 0, "epoch": _elsewhere(cfg, "optimization.max_epoch") or 0}
    for stage, (unit, at) in boundaries.items():
        if 0 < last[unit] < at + (unit == "update"):
            logger.warning(
                "stage %s: %s %d is not before the end of training (--max-%s %d), which leaves it unfrozen; "
                "`fairseq-qn compress` will freeze it without any training after", stage, unit, at, unit, last[unit]
            )  # fmt: skip


def _bar(title: str) -> Any:
    def progress(views: Sequence[WeightView]) -> Iterable[WeightView]:
        off = not views or not logger.isEnabledFor(logging.INFO)
        return tqdm(views, desc=title, unit="layer", leave=False, disable=off)

    return progress
