"""A fairseq checkpoint -> its model, as its qn_ kind. Nothing is drawn or read that is not needed."""

from __future__ import annotations

import copy
import inspect
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks
from fairseq.models import MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from fairseq_qn import api
from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError, short
from fairseq_qn.models import options
from fairseq_qn.models.bpe import carried_text
from fairseq_qn.models.describe import fairseq_refuses, model_of, ours
from fairseq_qn.models.options import CHECKPOINT_MODEL, CHECKPOINT_TASK, FALLBACKS, MODELS, TASKS
from fairseq_qn.models.undrawn import Undrawn, place
from fairseq_qn.modules.match import owners_of
from fairseq_qn.recipe import Recipe


def load_checkpoint(
    path: str | Path, data: str | None = None, recipe: str | None = None, heads: bool = True
) -> tuple[nn.Module, Any, Any]:
    """(model, configuration, task) of a fairseq checkpoint, a stock one as its qn_ kind, so that a recipe
    applies.

    recipe: instead of the checkpoint's own. heads: take classification heads along that the task does not
    name.
    Of the checkpoint's options fairseq gets those of models/options.py, checked; so the configuration has
    `model`, `task`, and of `common` the seed.
    The file stays mapped: weights are read when they are used, the optimiser's state never. Replace it by
    renaming, as fairseq does, not by writing into it, while the model lives.
    Raises FormatError, UnsupportedError for an architecture or a task that has no qn_ kind, MismatchError.
    """
    state = read_checkpoint(path)
    config = configuration(state, str(path))
    own = getattr(config.task, "quant_recipe", None) or getattr(config.model, "quant_recipe", None)
    given = None if recipe is None else Recipe.load(recipe)
    strange = given is not None and (not own or given != Recipe.load(own))  # the training did not know it
    if data is not None:
        config.task.data = str(data)
    elif _has_none(config.task.data) and not _has_none(Path(path).parent):  # import-hf puts it there
        config.task.data = str(Path(path).parent)
    if heads:
        config.model.load_checkpoint_heads = True
    if given is not None:
        config.task.quant_recipe = config.model.quant_recipe = given.to_json()
    if strange:  # nor did it say when to freeze these stages
        config.task.quant_stage_updates = config.task.quant_stage_epochs = None
    with fairseq_refuses(str(path), OSError):
        task = tasks.setup_task(config.task, from_checkpoint=True)
        model = _build(state, config.model, task, draw=False) or _build(state, config.model, task, draw=True)
    if strange:
        task.boundaries = {}
    if given is not None:  # now that its heads are there: each line has to match
        api.apply(model, given)
    return model.eval(), config, task


def text_of(path: str | Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(source, assets) for `save` of the BPE that a checkpoint of `import-hf` carries, or the one that this
    was fine-tuned from, if that is still where it was; ({}, {}) where there is none. Raises FormatError.
    """
    state = read_checkpoint(path)
    config = state.get("cfg")
    training = _mapping(config.get("checkpoint")) if isinstance(config, Mapping) else None
    first = (training or {}).get("finetune_from_model")
    if "qn_text" not in state and type(first) is str and Path(first).is_file():
        path, state = first, read_checkpoint(first)
    return carried_text(state, str(path))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote, mapped: plain data and tensors alone. Raises FormatError."""
    if Path(path).is_dir():
        todo = "name its .pt file" + (
            " or fairseq-qn import-hf it" if (Path(path) / "config.json").is_file() else ""
        )
        raise FormatError(f"{path}: expected a checkpoint, found a folder; {todo}")
    if not Path(path).is_file():
        raise FormatError(f"{path}: no such checkpoint")
    if str(path).endswith(".safetensors"):
        todo = "a small file is compressed already; a Hugging Face folder goes through fairseq-qn import-hf"
        raise FormatError(f"{path}: expected a fairseq checkpoint (.pt), found safetensors; {todo}")
    if not hasattr(torch.serialization, "add_safe_globals"):
        raise UnsupportedError(
            f"{path}: expected torch 2.4 or later, which reads it safely, found {torch.__version__}"
        )
    try:  # no file of before torch 1.6 can be mapped
        state = torch.load(str(path), map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise FormatError(
            f"{path}: cannot be read as a fairseq checkpoint: {' '.join(str(error).split())[:200]}"
        ) from error
    weights = state.get("model") if isinstance(state, Mapping) else None
    if not isinstance(weights, Mapping) or not all(
        isinstance(t, Tensor) and type(n) is str for n, t in weights.items()
    ):
        raise FormatError(
            f"{path}: expected a fairseq checkpoint, with its tensors by name as `model`, found none"
        )
    return state


def configuration(state: Mapping[str, Any], path: str) -> DictConfig:
    """The `model` and `task` of a checkpoint under our names: only what the tables let through."""
    args, config = state.get("args"), state.get("cfg")
    whole = isinstance(config, Mapping)
    given = {
        part: _mapping(args if args is not None else config.get(part) if whole else None)
        for part in ("model", "task")
    }
    for part, values in given.items():
        if values is None:
            raise FormatError(
                f"{path}: expected the options of its {part}, found none; is it a fairseq checkpoint?"
            )
    arch, kind = _ours(given["model"], path)
    # the first checkpoints were all of that
    name = given["task"].get("_name") or given["task"].get("task") or "translation"
    task_kind = name if type(name) is not str or name.startswith("qn_") else f"qn_{name}"
    task_kind = options.one_of(TASKS, task_kind, f"{path}: task", UnsupportedError)
    if "max_positions" in given["model"] and kind == "qn_transformer":  # before they were two options
        both = dict.fromkeys(
            ("max_source_positions", "max_target_positions"), given["model"]["max_positions"]
        )
        given["model"] = {**both, **given["model"]}
    model = options.take({**MODELS[kind], **CHECKPOINT_MODEL}, given["model"], f"{path}: model")
    common = _mapping(config.get("common")) if whole else None  # the seed of a task that has no such option
    given["task"] = {"seed": (common or {}).get("seed", FALLBACKS["seed"]), **given["task"]}
    task = options.take({**TASKS[task_kind], **CHECKPOINT_TASK}, given["task"], f"{path}: task")
    options.check_layers({**model, **_kept(model)}, state["model"], f"{path}: model")
    used = {key: FALLBACKS[key] for key in FALLBACKS.keys() & TASKS[task_kind].keys() | {"seed"}}
    task = {**used, **task, "_name": task_kind}
    if MODEL_DATACLASS_REGISTRY.get(kind) is None:
        made: Any = Namespace(**model, _name=arch, arch=arch)
    else:
        own = {field.name for field in fields(MODEL_DATACLASS_REGISTRY[kind])}
        known = {
            key: FALLBACKS[key]
            for key in ("add_bos_token", "tokens_per_sample", "max_target_positions", "tpu")
            if key in own
        }
        made = {**known, **model, "_name": arch}
        for key in {"adaptive_input_cutoff", "adaptive_softmax_cutoff"} & made.keys():
            made[key] = ",".join(map(str, made[key]))  # text to its dataclass
    configs = {"model": made, "task": task, "common": {"seed": task["seed"]}}
    return OmegaConf.create(configs, flags={"allow_objects": True})


def _has_none(folder: str | Path) -> bool:
    """Whether there is no dictionary in a folder."""
    return not (Path(folder) / "dict.txt").is_file()


def _ours(values: Mapping[str, Any], path: str) -> tuple[str, str]:
    """(architecture, model) under our names. Raises UnsupportedError for one that has no qn_ kind."""
    arch = values.get("_name") or values.get("arch")
    stock = {name: MODEL_REGISTRY.get(name.removeprefix("qn_")) for name in MODELS}
    if model_of(arch, stock):
        arch = f"qn_{arch}"
    kind = model_of(arch, ours())
    if kind is None:
        raise UnsupportedError(
            f"{path}: architecture {short(arch)} has no qn_ kind; expected RoBERTa, transformer or "
            "transformer_lm"
        )
    return arch, kind


def _kept(model: Mapping[str, Any]) -> dict[str, int]:
    """How many layers a pruned model has."""
    sides = {f"{side}_layers": model.get(f"{side}_layers_to_keep") for side in ("encoder", "decoder")}
    return {option: text.count(",") + 1 for option, text in sides.items() if text}


def _mapping(options: Any) -> Mapping[str, Any] | None:
    options = vars(options) if isinstance(options, Namespace) else options
    return options if isinstance(options, Mapping) else None


def _build(state: dict[str, Any], config: Any, task: Any, draw: bool) -> nn.Module | None:
    """The model with the checkpoint's weights; None if something that it lacks was left undrawn."""
    undrawn = Undrawn()
    with nullcontext() if draw else undrawn:
        known = "from_checkpoint" in inspect.signature(task.build_model).parameters
        model = task.build_model(config, from_checkpoint=True) if known else task.build_model(config)
    history = state.get("optimizer_history") or [{}]  # the first checkpoints had none
    model.set_num_updates(int(history[-1].get("num_updates", 0)))
    weights = model.qn_kept(copy.copy(state["model"]))
    model.upgrade_state_dict(weights)
    own = model.state_dict()
    for name in own.keys() & weights.keys():  # a checkpoint of fp16 training holds fp16
        weights[name] = weights[name].to(own[name].dtype)
    groups = owners_of(model)
    try:
        nn.Module.load_state_dict(model, weights, assign=True)
    except RuntimeError as error:  # a line for each tensor
        raise MismatchError(
            f"checkpoint: its tensors do not fit its options: {short(' '.join(str(error).split()))}"
        ) from error
    for *others, last in groups:  # assigned one by one: tie them again
        for owner in others:
            owner.module._parameters[owner.attribute] = last.module._parameters[last.attribute]
    return None if any(place(p) in undrawn.places for p in model.parameters()) else model
