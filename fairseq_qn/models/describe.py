"""A fairseq model as plain data, and back: what the small file needs in order to be loaded anywhere."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from enum import Enum
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.dictionary import TruncatedDictionary
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY, MODEL_REGISTRY
from fairseq.modules import SinusoidalPositionalEmbedding
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from omegaconf import OmegaConf
from torch import nn

from fairseq_qn.errors import FormatError, QNError, UnsupportedError, short
from fairseq_qn.models import options
from fairseq_qn.models.config import config_of
from fairseq_qn.models.option_types import NAME
from fairseq_qn.models.options import DICTIONARIES, MODELS, TASKS, Refusal
from fairseq_qn.models.undrawn import Undrawn

FILLER = re.compile(r"madeupword\d{4,}")  # fairseq pads a dictionary to a multiple of 8
_INDICES = ("bos_index", "pad_index", "eos_index", "unk_index")
# numbers of a table of sinusoidal positions; fairseq computes more when a sentence needs them
_MAX_COMPUTED = 1 << 22


def describe(cls: type, args: Any, task: Any) -> tuple[dict[str, Any], dict[str, Dictionary]]:
    """(source, dictionaries by name) of a model that is being built; equal dictionaries are kept once.

    Nothing is refused here, for a model may train that no small file can describe: `checked` does that when
    it is saved.
    """
    found: dict[str, Dictionary] = {}
    names = {}
    for key in DICTIONARIES:
        dictionary = getattr(task, key, None)
        dictionary = getattr(dictionary, "wrapped_dict", dictionary)
        if dictionary is not None:
            names[key] = next((name for name, other in found.items() if other is dictionary), key)
            found[names[key]] = dictionary
    name = next((name for name, own in ours().items() if own is cls), cls.__name__)
    configs = {"model": {"_name": name, **_values(args, MODELS.get(name, ()))}}
    name = next((name for name in TASKS if type(task) in _tasks(name)), type(task).__name__)
    configs["task"] = {"_name": name, **_values(config_of(task), TASKS.get(name, ()))}
    return {"builder": "fairseq", **configs, "dictionaries": names}, found


def checked(source: Mapping[str, Any], error: Refusal = FormatError) -> dict[str, Any]:
    """What the table of options lets through of a source: all that fairseq ever gets. Raises `error`."""
    result: dict[str, Any] = {"builder": "fairseq"}
    for part, tables in (("model", MODELS), ("task", TASKS)):
        given = source.get(part)
        if not isinstance(given, Mapping):
            raise error(f"source.{part}: expected options by name, found {short(given)}")
        name = given.get("_name") or given.get("arch" if part == "model" else "task")
        name = options.one_of(
            tables,
            model_of(name, ours()) or name if part == "model" else name,
            f"source.{part}._name",
            error,
        )
        result[part] = {"_name": name, **options.take(tables[name], given, f"source.{part}", error)}
    names = source.get("dictionaries")
    if not isinstance(names, Mapping) or not all(
        type(n) is str and n in DICTIONARIES for n in (*names, *names.values())
    ):
        raise error(f"source.dictionaries: expected some of {', '.join(DICTIONARIES)}, found {short(names)}")
    for key in options.NEEDED[result["task"]["_name"]]:
        if key not in names:
            raise error(f"source.dictionaries: expected a {key}, found {short(names)}")
    heads = _heads(source.get("heads", {}), result["model"]["_name"], error)
    return {**result, "dictionaries": dict(names), "heads": heads}


def _heads(heads: Any, model: str, error: Refusal) -> dict[str, list[int]]:
    """name -> [classes, inner size] of each classification head."""
    if not isinstance(heads, Mapping) or len(heads) > options.MAX_HEADS:
        raise error(f"source.heads: expected up to {options.MAX_HEADS} heads by name, found {short(heads)}")
    if heads and model != "qn_roberta":
        raise error(f"source.heads: expected none of a {model}, found {short(heads)}")
    for head, sizes in heads.items():
        whole = (
            type(sizes) is list
            and len(sizes) == 2
            and all(type(n) is int and 0 < n <= 1 << 20 for n in sizes)
        )
        if not whole or not NAME.fullmatch(head):
            raise error(
                "source.heads: expected a name of letters, digits, _ and - with its two sizes, found "
                f"{short({head: sizes})}"
            )
    return dict(heads)


def dictionary_bytes(dictionary: Dictionary) -> bytes:
    """A dictionary's symbols in order, as JSON; the counts are not needed to answer."""
    indices = {name: getattr(dictionary, name) for name in _INDICES}
    data = {"symbols": dictionary.symbols, "nspecial": dictionary.nspecial, **indices}
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()


def read_dictionary(data: bytes) -> Dictionary:
    """The dictionary of dictionary_bytes. Raises FormatError."""
    try:
        found = json.loads(data)
        symbols, numbers = found["symbols"], {name: found[name] for name in (*_INDICES, "nspecial")}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(
            f"dictionary: cannot be read: {short(error)}; the file is damaged, fetch it again"
        ) from None
    whole = type(symbols) is list and all(type(symbol) is str for symbol in symbols)
    if not whole or not all(
        type(n) is int and 0 <= n < len(symbols) + (name == "nspecial") for name, n in numbers.items()
    ):
        raise FormatError(
            f"dictionary: expected a list of symbols and numbers of some, found {short(numbers)}"
        )
    dictionary = Dictionary()
    dictionary.symbols = symbols
    dictionary.indices = dict(zip(symbols, range(len(symbols))))
    dictionary.count = [1] * len(symbols)
    for name, number in numbers.items():
        setattr(dictionary, name, number)
    return dictionary


def label_names(dictionary: Dictionary) -> list[str]:
    """The labels of a label dictionary, to which fairseq adds <mask>, and fillers up to a multiple of 8."""
    symbols = dictionary.symbols[dictionary.nspecial :]
    return [s for s in symbols if s != "<mask>" and not FILLER.fullmatch(s)]


def build_task(source: Mapping[str, Any], assets: Mapping[str, bytes]) -> Any:
    """The task of a source that `checked` has passed, without its data directory."""
    name, names = source["task"]["_name"], source["dictionaries"]
    for key in dict.fromkeys(names.values()):
        if f"{key}.json" not in assets:
            raise FormatError(
                f"source.dictionaries: the file carries no {key}.json; it is damaged, fetch it again"
            )
    made = {key: read_dictionary(assets[f"{key}.json"]) for key in dict.fromkeys(names.values())}
    found = {key: made[name] for key, name in names.items()}
    given = {**_defaults(TASK_DATACLASS_REGISTRY[name]), **source["task"], "data": ""}
    with fairseq_refuses("source.task"):
        cls, config, first = TASK_REGISTRY[name], OmegaConf.create(given), found.get("source_dictionary")
        if name == "qn_image_classification":
            return cls(config, found.get("label_dictionary"))
        if name == "qn_masked_lm":
            return cls(config, first)
        if name == "qn_language_modeling":
            size, model = given["output_dictionary_size"], source["model"]
            tied = model.get("share_decoder_input_output_embed") and "adaptive_softmax_cutoff" not in model
            return cls(config, first, TruncatedDictionary(first, size) if size >= 0 and not tied else first)
        return cls(config, first, found[options.NEEDED[name][1]])


def build_model(source: Mapping[str, Any], task: Any, stored: Iterable[str]) -> nn.Module:
    """The dense model of a source that `checked` has passed, on the meta device: tensors take no memory
    until they are filled.

    stored: names of the file's tensors, and of modules that were left out of it.
    """
    given = options.check_layers(source["model"], stored, "source.model")
    name = given["_name"]
    args = Namespace(**{**_defaults(MODEL_DATACLASS_REGISTRY.get(name)), **given})
    with fairseq_refuses("source.model"), torch.device("meta"), Undrawn():
        model = MODEL_REGISTRY[name].build_model(args, task)
        for head, (classes, inner) in source["heads"].items():
            model.register_classification_head(head, classes, inner)
    for module in model.modules():
        if isinstance(module, SinusoidalPositionalEmbedding):  # computed, not stored
            rows = min(module.weights.shape[0], max(8, _MAX_COMPUTED // module.embedding_dim))
            module.weights = module.get_embedding(rows, module.embedding_dim, module.padding_idx)
    return model


@contextmanager
def fairseq_refuses(where: str, *passed: type[BaseException]) -> Iterator[None]:
    """Whatever fairseq raises for options that are legal each, but not together, as a FormatError."""
    try:
        yield
    except (QNError, *passed):
        raise
    except ImportError as error:  # a tokeniser's library
        raise UnsupportedError(f"{where}: {_line(error)}") from error
    except (Exception, SystemExit) as error:  # asserts, missing keys, division by zero, ...
        raise FormatError(
            f"{where}: does not describe a model: {type(error).__name__}: {_line(error)}"
        ) from error


def _line(error: BaseException) -> str:
    return short(" ".join(str(error).split())).strip("'\"")


def model_of(architecture: Any, models: Mapping[str, type | None]) -> str | None:
    """Which of these models an architecture's name stands for, if any."""
    cls = ARCH_MODEL_REGISTRY.get(architecture) if type(architecture) is str else None
    return next((name for name, own in models.items() if own is not None and own is cls), None)


def ours() -> dict[str, type | None]:
    """The class of each model of the table."""
    return {name: MODEL_REGISTRY.get(name) for name in MODELS}


def _tasks(name: str) -> tuple[type | None, type | None]:
    return TASK_REGISTRY.get(name), TASK_REGISTRY.get(name.removeprefix("qn_"))


def _defaults(dataclass: type | None) -> dict[str, Any]:
    """fairseq's own defaults of a model or task, as far as they stand by themselves."""
    found = {}
    for field in fields(dataclass) if dataclass else ():
        if isinstance(field.default, str) and ("${" in field.default or field.default == "???"):
            if field.name in options.FALLBACKS:
                found[field.name] = options.FALLBACKS[field.name]
        elif field.default is None or type(field.default) in (bool, int, float, str):
            found[field.name] = field.default
    return found


def _values(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Those of a configuration's options, as plain data, that are set."""
    return {name: value for name in names if (value := _plain(getattr(config, name, None))) is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if OmegaConf.is_list(value) or isinstance(value, tuple) else value
