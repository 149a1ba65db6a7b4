"""A fairseq model as plain data, and back: what the small file needs in order to be loaded anywhere."""

from __future__ import annotations

import json
from argparse import SUPPRESS, ArgumentParser, Namespace
from math import isfinite
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.dictionary import TruncatedDictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import OmegaConf
from torch import nn
from torch.overrides import TorchFunctionMode

from fairseq_qn.errors import FormatError

DICTIONARIES = ("source_dictionary", "target_dictionary", "label_dictionary")
_ALWAYS = {
    "_name",
    "arch",
    "max_positions",
    "max_source_positions",
    "max_target_positions",
    "tokens_per_sample",
    "layer_norm_eps",
}
_DRAWS = {"cpu", "normal_", "uniform_", "trunc_normal_", "fill_", "zero_", "copy_"}
_INDICES = ("bos_index", "pad_index", "eos_index", "unk_index")


def describe(args: Any, task: Any) -> tuple[dict[str, Any], dict[str, Dictionary]]:
    """(source, dictionaries by name) of a model that is being built; equal dictionaries are kept once."""
    config = getattr(task, "cfg", None) or getattr(task, "args", None)
    found: dict[str, Dictionary] = {}
    names = {}
    for key in DICTIONARIES:
        dictionary = getattr(task, key, None)
        dictionary = getattr(dictionary, "wrapped_dict", dictionary)
        if dictionary is not None:
            names[key] = next((name for name, other in found.items() if other is dictionary), key)
            found[names[key]] = dictionary
    model = _model_options(plain(args)) | {"quant_recipe": None}
    task_config = plain(config) | {"quant_recipe": None, "data": ""}
    return {"builder": "fairseq", "model": model, "task": task_config, "dictionaries": names}, found


def _model_options(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the model itself, out of the flat namespace of all options that fairseq hands to older models."""
    name = options.get("_name") or options.get("arch")
    if name not in ARCH_CONFIG_REGISTRY or name in MODEL_DATACLASS_REGISTRY:
        return options
    parser, filled = ArgumentParser(argument_default=SUPPRESS), Namespace()
    ARCH_MODEL_REGISTRY[name].add_args(parser)
    ARCH_CONFIG_REGISTRY[name](filled)
    known = {action.dest for action in parser._actions} | set(vars(filled)) | _ALWAYS
    return {key: value for key, value in options.items() if key in known}


def dictionary_bytes(dictionary: Dictionary) -> bytes:
    """A dictionary's symbols in order, as JSON; the counts are not needed to answer."""
    indices = {name: getattr(dictionary, name) for name in _INDICES}
    data = {"symbols": dictionary.symbols, "nspecial": dictionary.nspecial, **indices}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def read_dictionary(data: bytes) -> Dictionary:
    """The dictionary of dictionary_bytes. Raises FormatError."""
    try:
        fields = json.loads(data)
        dictionary = Dictionary()
        dictionary.symbols = list(map(str, fields["symbols"]))
        dictionary.indices = dict(zip(dictionary.symbols, range(len(dictionary.symbols))))
        dictionary.count = [1] * len(dictionary.symbols)
        for name in (*_INDICES, "nspecial"):
            setattr(dictionary, name, int(fields[name]))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"dictionary: cannot be read: {error}; the file is damaged, fetch it again") from None
    return dictionary


def build_task(source: dict[str, Any], assets: dict[str, bytes]) -> Any:
    """The task of a file, without its data directory."""
    name = source["task"].get("_name") or source["task"].get("task")
    if name not in TASK_REGISTRY:
        raise FormatError(f"source.task: no task {name!r} is registered; import the plugin that it comes from")
    cls = TASK_REGISTRY[name]
    config = _config(source["task"], TASK_DATACLASS_REGISTRY.get(name))
    made = {key: read_dictionary(assets[f"{key}.json"]) for key in dict.fromkeys(source["dictionaries"].values())}
    found = {key: made[name] for key, name in source["dictionaries"].items()}
    first = found["source_dictionary"]
    if issubclass(cls, LanguageModelingTask):
        size = source["task"].get("output_dictionary_size", -1)
        return cls(config, first, TruncatedDictionary(first, size) if size >= 0 else first)
    if "label_dictionary" in found:
        return cls(config, first, found["label_dictionary"])
    both = found.get("target_dictionary", first)
    return cls(config, first) if both is first and name.endswith("masked_lm") else cls(config, first, both)


def build_model(source: dict[str, Any], task: Any) -> nn.Module:
    """The dense model of a file, its tensors on the meta device: they take no memory until they are filled in."""
    name = source["model"].get("_name") or source["model"].get("arch")
    cls = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if cls is None:
        raise FormatError(f"source.model: no architecture {name!r} is registered; import the plugin that it comes from")
    dataclass = MODEL_DATACLASS_REGISTRY.get(name) or getattr(cls, "__dataclass", None)
    args = _config(source["model"], dataclass)
    with torch.device("meta"), NoData():
        model = cls.build_model(args, task)
        for head, (classes, inner) in source.get("heads", {}).items():
            model.register_classification_head(head, classes, inner)
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):  # computed, not stored
            rows = module.weights.shape[0]
            module.weights = module.get_embedding(rows, module.embedding_dim, module.padding_idx)
    return model


def plain(config: Any) -> dict[str, Any]:
    """The options of a configuration that are plain data: numbers, text, lists of them."""
    if OmegaConf.is_config(config):
        items = OmegaConf.to_container(config, resolve=True, enum_to_str=True)
    elif isinstance(config, Namespace):
        items = vars(config)
    else:
        items = {key: getattr(config, key) for key in config.__dataclass_fields__}
    return json.loads(json.dumps({key: value for key, value in items.items() if _is_plain(value)}))  # lists for tuples


def _config(data: dict[str, Any], dataclass: type | None) -> Any:
    """As fairseq hands it out: a DictConfig where there is a dataclass, a Namespace otherwise."""
    if dataclass is None:
        return Namespace(**data)
    return OmegaConf.create(data)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, str) or (isinstance(value, (int, float)) and isfinite(value))


class NoData(TorchFunctionMode):
    """Let tensors on the meta device be as they are: there is nothing to draw, and the CPU, where fairseq draws, has no room.

    torch's own normal_ of a meta tensor would do, but imports its compiler: 0.9 s and 100 MB.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            target = args[0] if args else kwargs["tensor"]  # torch.nn.init names its argument
            if target.is_meta:
                return target
        return func(*args, **kwargs)
