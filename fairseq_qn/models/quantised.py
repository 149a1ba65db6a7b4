"""What every qn_ model adds to fairseq's own: a recipe, views, and what rebuilds it."""

from __future__ import annotations

import logging
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_INV_REGISTRY,
    ARCH_MODEL_REGISTRY,
    register_model_architecture,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from fairseq_qn import api
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.models.config import config_of, remember, seed_of
from fairseq_qn.models.describe import checked, describe, dictionary_bytes
from fairseq_qn.models.pretrained import is_small, load_interface
from fairseq_qn.modules.activations import adopt_ranges
from fairseq_qn.modules.adopt import adopt
from fairseq_qn.modules.pruning import pruned_state
from fairseq_qn.modules.sharing import Places, place
from fairseq_qn.modules.view import views_of
from fairseq_qn.recipe import Recipe, short_recipe

logger = logging.getLogger(__name__)

UPSTREAM_NOISE = ("quant_noise_pq", "quant_noise_scalar")
SIDES = ("encoder", "decoder")


class QuantisedModel:
    """Mixin for a fairseq model class, before it in the bases.

    The recipe comes from the task (--quant-recipe), else from the model's own configuration (a checkpoint),
    else from fairseq's --quant-noise-pq or --quant-noise-scalar. It is kept in the configuration as text, so
    that a checkpoint needs no recipe file.
    """

    qn_interface: type  # what answers for such a model from a small file: see models/interfaces.py

    @classmethod
    def build_model(cls, args: Namespace | DictConfig, task: Any) -> Any:
        """Build fairseq's model without fairseq's noise, then install the views of its layers so far."""
        with open_dict(args) if OmegaConf.is_config(args) else nullcontext():
            recipe = _recipe_for(args, task)
            # its hooks overwrite weights; the recipe stands for them from here on
            for name in UPSTREAM_NOISE:
                remember(args, "model", name, 0)
            if recipe is not None:
                remember(args, "model", "quant_recipe", recipe.to_json())
            for side in SIDES:  # of transformers fairseq's parser makes a list, and its model splits text
                kept = getattr(args, f"{side}_layers_to_keep", None)
                if kept and not isinstance(kept, str):
                    remember(args, "model", f"{side}_layers_to_keep", ",".join(map(str, kept)))
            model = super().build_model(args, task)
            _number_layers(model, args)
            model.__dict__["_qn_source"] = describe(cls, args, task)
            if recipe is not None and not hasattr(task, "boundaries"):
                model.__dict__["_qn_stock_task"] = getattr(config_of(task), "_name", type(task).__name__)
        if recipe is not None:
            api.apply(model, recipe, seed=seed_of(config_of(task)), strict=False)
        return model

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        checkpoint_file: str = "model.pt",
        *args: Any,
        mode: str = "dense",
        dtype: torch.dtype | None = None,
        large: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The interface of a small file, of a folder with one, or (as fairseq) with a checkpoint."""
        if is_small(model_name_or_path):
            return load_interface(model_name_or_path, mode, dtype, large)
        return super().from_pretrained(str(model_name_or_path), checkpoint_file, *args, **kwargs)

    def qn_describe(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(source, files) from which `fairseq_qn.load` rebuilds this model: configurations, heads,
        dictionaries.

        Raises UnsupportedError for a model, a task or an option that the small file cannot describe.
        """
        source, dictionaries = self.__dict__["_qn_source"]
        heads = getattr(self, "classification_heads", {})
        sizes = {name: [head.out_proj.out_features, head.dense.out_features] for name, head in heads.items()}
        depths = {f"{side}_layers": len(stack) for side, _, stack in _stacks(self)}  # `prune` may have been
        source = {**source, "model": {**source["model"], **depths}, "heads": sizes}
        source = checked(source, _unsaved)
        return source, {f"{name}.json": dictionary_bytes(d) for name, d in dictionaries.items()}

    def train(self, mode: bool = True) -> Any:
        """As torch's; one line when a training begins whose task is fairseq's own."""
        task = self.__dict__.pop("_qn_stock_task", None) if mode else None
        if task is not None:
            logger.warning(
                "--task %s freezes no stage, and noise begins anew on resume; train with --task qn_%s",
                task,
                task,
            )
        return super().train(mode)

    def load_state_dict(
        self, state_dict: dict[str, Any], strict: bool = True, model_cfg: Any = None, args: Any = None
    ) -> Any:
        """As fairseq's; layers that are not kept go before the rest is fitted to the views."""
        return super().load_state_dict(self.qn_kept(state_dict), strict)

    def qn_kept(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state dict without the layers that --encoder-layers-to-keep, --decoder-layers-to-keep leave out.

        fairseq prunes again what is pruned already, so that a run cannot be resumed by its own command, and
        all of the other stack.
        """
        for name in self.__dict__.get("_qn_kept", ()):
            state_dict = pruned_state(state_dict, f"{name}.", self.get_submodule(name))
        return state_dict

    def upgrade_state_dict_named(self, state_dict: dict[str, Any], name: str) -> None:
        """Let checkpoints without views, or of another recipe, in as far as no frozen layer is lost."""
        super().upgrade_state_dict_named(state_dict, name)
        adopt(state_dict, views_of(self))
        adopt_ranges(state_dict, self)


def mirror_architectures(ours: str, theirs: str) -> None:
    """Register every architecture of fairseq's model for ours, under its name with qn_ before it."""
    for name in ARCH_MODEL_INV_REGISTRY[theirs]:
        if f"qn_{name}" not in ARCH_MODEL_REGISTRY:
            register_model_architecture(ours, f"qn_{name}")(ARCH_CONFIG_REGISTRY[name])


def _stacks(model: nn.Module) -> Iterator[tuple[str, str, nn.ModuleList]]:
    """(encoder or decoder, name, layers) of fairseq's stacks of layers."""
    for side in SIDES:
        for name in (f"{side}.layers", f"{side}.sentence_encoder.layers"):
            with suppress(AttributeError):
                stack = model.get_submodule(name)
                if isinstance(stack, nn.ModuleList):
                    yield side, name, stack


def _number_layers(model: nn.Module, args: Namespace | DictConfig) -> None:
    """Of a model that fairseq built for some layers of a whole one: which. The options keep them, so that
    chunks that share are those of the whole when it is built again.
    """
    model.__dict__["_qn_kept"] = kept = []
    for side, name, stack in _stacks(model):
        text = getattr(args, f"{side}_layers_to_keep", None)
        if text:
            numbers = sorted({int(number) for number in re.findall(r"\d+", str(text))})
            if len(numbers) != len(stack):
                option = f"--{side}-layers-to-keep"
                raise UnsupportedError(f"{option}: expected numbers of layers, each once, found {text}")
            place(stack, Places(tuple(numbers)))
            remember(args, "model", f"{side}_layers", len(numbers))
            kept.append(name)


def _recipe_for(args: Namespace | DictConfig, task: Any) -> Recipe | None:
    text = getattr(config_of(task), "quant_recipe", None) or getattr(args, "quant_recipe", None)
    if text:
        return Recipe.load(text)
    p = float(getattr(args, "quant_noise_pq", 0) or 0)
    if p > 0:
        return short_recipe(p, int(getattr(args, "quant_noise_pq_block_size", 8)))
    p = float(getattr(args, "quant_noise_scalar", 0) or 0)
    return short_recipe(p, 1, bits=8) if p > 0 else None


def _unsaved(why: str) -> UnsupportedError:
    todo = "to load it into a model of your own, save it with source={'builder': None}"
    return UnsupportedError(f"save: the small file cannot describe {why}; {todo}")
