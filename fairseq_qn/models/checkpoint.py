"""A fairseq checkpoint -> its model, as its qn_ kind. Nothing is drawn or read that is not needed."""

from __future__ import annotations

import copy
import inspect
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf
from torch import nn
from torch.overrides import TorchFunctionMode

from fairseq_qn import api
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.recipe import Recipe

_DRAWS = {"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_"}


def load_checkpoint(
    path: str | Path, data: str | None = None, recipe: str | None = None, heads: bool = True
) -> tuple[nn.Module, Any, Any]:
    """(model, configuration, task) of a fairseq checkpoint, a stock one as its qn_ kind, so that a recipe applies.

    recipe: instead of the checkpoint's own. heads: take classification heads along that the task does not name.
    The file stays mapped: weights are read when they are used, the optimiser's state never. Replace it by renaming, as
    fairseq does, not by writing into it, while the model lives.
    Raises FormatError, UnsupportedError for an architecture that has no qn_ kind, MismatchError.
    """
    state = _read(path, {"data": data} if data else {})
    if state.get("cfg") is None and state.get("args") is not None:
        state["cfg"] = convert_namespace_to_omegaconf(state["args"])
    config = state["cfg"]
    _as_quantised(config, recipe, heads, path)
    task = tasks.setup_task(config.task, from_checkpoint=True)
    if "task_state" in state:
        task.load_state_dict(state["task_state"])
    model = _build(state, config.model, task, draw=False) or _build(state, config.model, task, draw=True)
    if recipe is not None:  # now that its heads are there: each line has to match
        api.apply(model, Recipe.load(recipe))
    return model.eval(), config, task


def _read(path: str | Path, overrides: dict[str, Any]) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such checkpoint")
    try:
        with _mapped(path):
            return checkpoint_utils.load_checkpoint_to_cpu(str(path), overrides)
    except Exception as error:  # torch.load raises many kinds
        raise FormatError(
            f"{path}: cannot be read as a fairseq checkpoint: {' '.join(str(error).split())[:200]}"
        ) from error


@contextmanager
def _mapped(path: str | Path) -> Iterator[None]:
    """Let fairseq's torch.load map the file, where that is possible: not for those of before torch 1.6."""
    load = torch.load
    if zipfile.is_zipfile(path):
        torch.load = lambda _, **options: load(str(path), mmap=True, **options)
    try:
        yield
    finally:
        torch.load = load


def _build(state: dict[str, Any], config: Any, task: Any, draw: bool) -> nn.Module | None:
    """The model with the checkpoint's weights; None if something that it does not hold was to be drawn, and was not."""
    with _Undrawn() as undrawn:
        undrawn.active = not draw
        known = "from_checkpoint" in inspect.signature(task.build_model).parameters
        model = task.build_model(config, from_checkpoint=True) if known else task.build_model(config)
    model.set_num_updates(state["optimizer_history"][-1].get("num_updates", 0))
    weights = checkpoint_utils.prune_state_dict(copy.copy(state["model"]), config)
    model.upgrade_state_dict(weights)
    own = model.state_dict()
    for name in own.keys() & weights.keys():  # a checkpoint of fp16 training holds fp16
        weights[name] = weights[name].to(own[name].dtype)
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, name))
    nn.Module.load_state_dict(model, weights, assign=True)
    for *others, (last, attribute) in owners.values():  # assigned one by one: tie them again
        for module, name in others:
            module._parameters[name] = last._parameters[attribute]
    return None if any(_place(p) in undrawn.places for p in model.parameters()) else model


class _Undrawn(TorchFunctionMode):
    """While active, initial weights are not drawn; their places in memory are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.active, self.places = True, set()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.active and getattr(func, "__name__", "") in _DRAWS:
            target = args[0] if args else kwargs["tensor"]  # torch.nn.init names its argument
            self.places.add(_place(target))
            return target
        return func(*args, **kwargs)


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _as_quantised(config: Any, recipe: str | None, heads: bool, path: str | Path) -> None:
    OmegaConf.set_struct(config, False)
    model, task = config.model, config.task
    arch = getattr(model, "_name", None) or getattr(model, "arch", None)
    if not arch.startswith("qn_"):
        if f"qn_{arch}" not in ARCH_MODEL_REGISTRY:
            raise UnsupportedError(
                f"{path}: architecture {arch!r} has no qn_ kind; expected RoBERTa, transformer or transformer_lm"
            )
        for key in ("_name", "arch"):
            if getattr(model, key, None):
                setattr(model, key, f"qn_{getattr(model, key)}")
    if f"qn_{task._name}" in TASK_REGISTRY:
        task._name = f"qn_{task._name}"
    if heads:
        model.load_checkpoint_heads = True
    if recipe is not None:
        text = Recipe.load(recipe).to_json()
        task.quant_recipe = model.quant_recipe = text
