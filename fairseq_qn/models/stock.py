"""A qn_ checkpoint as a stock one, which fairseq loads without this plugin."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_qn.api import recipe_of
from fairseq_qn.artifact.replacing import refuse_same, replacing
from fairseq_qn.criterions.options import Options, options_of
from fairseq_qn.criterions.quantization_aware import QuantizationAwareConfig
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.models.checkpoint import load_checkpoint, read_checkpoint
from fairseq_qn.modules.activations import placed
from fairseq_qn.modules.decoded import decoded_state_dict
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.tasks.quantised import QuantisedTaskConfig

_OURS = "qn_"
_CRITERION = "quantization_aware"
_OPTIONS = {f.name for own in (QuantisedTaskConfig, Options) for f in fields(own)} - {"_name"}


def export_fairseq(path: str | Path, output: str | Path, data: str | None = None) -> dict[str, Any]:
    """Write a qn_ checkpoint as a stock one: frozen layers by their decoded weights, all else exactly as it
    is stored.

    Returns {"file", "architecture", "frozen_layers", "note"}; the note says what fairseq's own model cannot
    express. Raises as load_checkpoint does, and UnsupportedError for a stock checkpoint or where `output` is
    `path`.
    """
    refuse_same(output, path)
    model, config, _ = load_checkpoint(path, data)
    stock, frozen = to_stock(read_checkpoint(path), model, str(path))
    eps = getattr(config.model, "layer_norm_eps", None)  # an option of qn_roberta alone
    own_eps = eps is not None and float(eps) != 1e-5
    notes = [f"fairseq's roberta has LayerNorm eps 1e-05, this model {float(eps):g}"] if own_eps else []
    if placed(model):
        notes.append("fairseq's model computes with inputs as they are, this one rounds them")
    recipe = recipe_of(model)
    if recipe is not None and recipe.share:
        notes.append("fairseq's model does not share layers; to train it on, add --reset-optimizer")
    with replacing(output) as file:
        torch.save(stock, file)
    made = _get(stock["cfg"]["model"], "arch", _get(stock["cfg"]["model"], "_name", None))
    return {"file": str(output), "architecture": made, "frozen_layers": frozen, "note": "; ".join(notes)}


def to_stock(state: dict[str, Any], model: nn.Module, path: str) -> tuple[dict[str, Any], int]:
    """(stock checkpoint, number of frozen layers whose decoded weights went into it).

    state: a checkpoint as torch.load reads it; model: what it holds, built and loaded. Layers that are not
    frozen keep exactly their stored weights. The optimizer's state and the iterator's stay. Raises
    UnsupportedError for a stock checkpoint.
    """
    config = state.get("cfg")
    if config is None or not _get(config["model"], "_name", _get(config["model"], "arch", "")).startswith(
        _OURS
    ):
        raise UnsupportedError(
            f"{path}: expected a checkpoint of a qn_ model, found a stock one; fairseq loads it as it is"
        )
    frozen = [view for view in views_of(model) if view.phase == FROZEN]
    history = [
        {**entry, "criterion_name": _class_name(entry["criterion_name"])}
        for entry in state["optimizer_history"]
    ]
    own = ("QN",)  # what our tasks keep in a checkpoint is under their class names
    extra = {key: value for key, value in state["extra_state"].items() if not key.startswith(own)}
    stock = {**state, "model": _weights(state["model"], model), "cfg": _config(config)}
    return {**stock, "optimizer_history": history, "extra_state": extra}, len(frozen)


def _weights(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The stored tensors without the views' buffers; under every name of a frozen weight, what is read."""
    own, decoded = model.state_dict(keep_vars=True), decoded_state_dict(model)
    frozen = {id(view.weight) for view in views_of(model) if view.phase == FROZEN}
    return {
        key: decoded[key].to(tensor.dtype) if id(own.get(key)) in frozen else tensor
        for key, tensor in stored.items()
        if key in decoded or key not in own
    }


def _config(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration under fairseq's names, without the plugin's options."""
    criterion = config["criterion"]
    name = (
        _get(criterion, "wrapped_criterion", None) if _get(criterion, "_name", None) == _CRITERION else None
    )
    result = {key: _renamed(value, name) for key, value in config.items()}
    if name is not None:
        result["criterion"] = _wrapped(criterion, name)
    return result


def _renamed(part: Any, criterion: str | None) -> Any:
    """One group of options. fairseq's older models keep the options of all groups in one Namespace."""
    if not isinstance(part, (dict, Namespace)):
        return part
    items = {
        key: value
        for key, value in (part if isinstance(part, dict) else vars(part)).items()
        if key not in _OPTIONS
    }
    for key in ("_name", "arch", "task"):
        if isinstance(items.get(key), str):
            items[key] = items[key].removeprefix(_OURS)
    if items.get("criterion") == _CRITERION:
        items["criterion"] = criterion
    # fairseq would prune what is pruned
    for key in ("user_dir", "encoder_layers_to_keep", "decoder_layers_to_keep"):
        if key in items:
            items[key] = None
    return items if isinstance(part, dict) else Namespace(**items)


def _wrapped(criterion: Any, name: str) -> dict[str, Any]:
    """The options of the criterion inside quantization_aware."""
    dataclass = CRITERION_DATACLASS_REGISTRY.get(name)
    if dataclass is None:
        return {**_renamed(criterion, name), "_name": name}
    options = options_of(dataclass, OmegaConf.create(criterion), QuantizationAwareConfig)
    own = {f.name: getattr(options, f.name) for f in fields(dataclass)}
    return {**OmegaConf.to_container(OmegaConf.create(own), enum_to_str=True), "_name": name}


def _class_name(name: str) -> str:
    """fairseq resumes an optimizer only under the criterion's class name: that of the wrapped one."""
    wrapped = {cls.__name__ for cls in CRITERION_REGISTRY.values()}
    bare = name.removeprefix("QuantizationAware")
    return bare if bare in wrapped else name


def _get(part: Any, key: str, default: Any) -> Any:
    value = part.get(key) if isinstance(part, dict) else getattr(part, key, None)
    return default if value is None else value
