"""What a training starts from: a Hugging Face folder, a fairseq checkpoint or a small file; in any case a
RoBERTa encoder as a checkpoint that fairseq restores, its dictionary and its BPE.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.encoders import build_bpe
from omegaconf import OmegaConf
from torch import Tensor, nn

from fairseq_qn import api
from fairseq_qn.artifact.replacing import replacing
from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError
from fairseq_qn.interop.hf import checkpoint_of, identity_head, import_hf, options_of
from fairseq_qn.models.bpe import Guarded, checked_text
from fairseq_qn.models.checkpoint import configuration, read_checkpoint
from fairseq_qn.models.describe import build_model, build_task, checked, fairseq_refuses
from fairseq_qn.models.options import BPE_FILES, BPES, take
from fairseq_qn.models.pretrained import find_file, is_small
from fairseq_qn.modules.dropped import Dropped

CHECKPOINT, DICTIONARY = "model.pt", "dict.txt"
EMBEDDING = "encoder.sentence_encoder.embed_tokens.weight"
# what rebuilds the encoder; the order is that of a command line
VALUES = (
    "encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads",
    "activation_fn", "pooler_activation_fn", "max_positions", "layer_norm_eps",
)  # fmt: skip
FLAGS = ("untie_weights_roberta", "encoder_normalize_before", "spectral_norm_classification_head")


@dataclass(frozen=True)
class BPE:
    """A BPE by fairseq's name, its files, and its options that are no files."""

    name: str
    files: tuple[Path, ...]
    options: Mapping[str, Any]

    def build(self) -> Any:
        """What encodes text. Raises FormatError, UnsupportedError for a library that is not installed."""
        paths = {}
        for option, ending in BPE_FILES[self.name].items():
            paths[option] = str(next(file.resolve() for file in self.files if file.name.endswith(ending)))
        with fairseq_refuses(f"bpe {self.name}"):
            made = build_bpe(OmegaConf.create({"_name": self.name, **self.options, **paths}))
        return Guarded(made, self.files[0])


@dataclass(frozen=True)
class Start:
    """A RoBERTa to train. `options`: words of a fairseq-train command that rebuild it; `heads`: outputs of
    each head; `labels`: names of the classes of the head that it was trained with, where they are known.
    """

    checkpoint: Path
    dictionary: Dictionary
    bpe: BPE
    options: tuple[str, ...]
    width: int
    max_positions: int
    heads: Mapping[str, int]
    trained_head: str | None
    regression: bool
    labels: tuple[str, ...]


def start_from(path: str | Path, folder: Path, bpe: BPE | None = None) -> Start:
    """The start that `path` names; what has to be made of it is written to `folder`, the BPE's files in any
    case.

    bpe: instead of the model's own. Raises FormatError, UnsupportedError, MismatchError, OSError.
    """
    path = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if is_small(path):
        bpe = bpe or _unpack(find_file(path), folder)
        path = folder / CHECKPOINT
    elif path.is_dir():
        report = import_hf(path, folder / CHECKPOINT)
        names = {file.name: file for file in report.files}
        if bpe is None and "vocab.txt" in names:
            cased = {"wordpiece_cased": True} if report.lower_case is False else {}
            bpe = BPE("qn_wordpiece", (names["vocab.txt"],), cased)
        path = folder / CHECKPOINT
    return _of_checkpoint(path, folder, bpe)


def _of_checkpoint(path: Path, folder: Path, bpe: BPE | None) -> Start:
    state = read_checkpoint(path)
    config = configuration(state, str(path))
    if not config.model._name.startswith("qn_roberta"):
        raise UnsupportedError(f"{path}: expected a RoBERTa encoder, found {config.model._name}")
    dictionary = _dictionary(path, getattr(config.task, "data", None))
    rows = state["model"][EMBEDDING].shape[0] if EMBEDDING in state["model"] else 0
    if rows != len(dictionary):
        raise MismatchError(
            f"{path}: its embedding has {rows} rows, the dictionary found for it {len(dictionary)} symbols; "
            f"put the model's own {DICTIONARY} beside it"
        )
    model, task = config.model, config.task
    heads = {
        name.split(".")[1]: tensor.shape[0]
        for name, tensor in state["model"].items()
        if name.startswith("classification_heads.") and name.endswith("out_proj.weight")
    }
    return Start(
        checkpoint=path,
        dictionary=dictionary,
        bpe=_kept(bpe or _recorded(state, path, getattr(config.task, "data", None)), folder),
        options=("--arch", model._name, *_words(model)),
        width=model.encoder_embed_dim,
        max_positions=model.max_positions,
        heads=heads,
        trained_head=getattr(task, "classification_head_name", None),
        regression=bool(getattr(task, "regression_target", False)),
        labels=_labels(path, task),
    )


def _words(model: Any) -> list[str]:
    flags = (f"--{name.replace('_', '-')}" for name in FLAGS if getattr(model, name, None))
    return [*options_of(model, VALUES), *flags]


def _dictionary(path: Path, data: str | None) -> Dictionary:
    """The dictionary of a checkpoint: beside it, or in the folder that it was trained on."""
    folders = [path.parent, *([Path(data), Path(data) / "input0"] if data else [])]
    for folder in folders:
        if (folder / DICTIONARY).is_file():
            with fairseq_refuses(str(folder / DICTIONARY)):
                dictionary = Dictionary.load(str(folder / DICTIONARY))
            dictionary.add_symbol("<mask>")  # as fairseq's masked LM and sentence prediction do
            return dictionary
    raise FormatError(f"{path}: no {DICTIONARY} beside it; put the dictionary of its training there")


def _labels(path: Path, task: Any) -> tuple[str, ...]:
    """Names of the classes that a checkpoint was trained for, from the folder of its data."""
    for folder in (path.parent, Path(getattr(task, "data", None) or path.parent)):
        file = folder / "label" / DICTIONARY
        if file.is_file():
            with fairseq_refuses(str(file)):
                dictionary = Dictionary.load(str(file))
            return tuple(dictionary.symbols[dictionary.nspecial :])
    return ()


def _recorded(state: Mapping[str, Any], path: Path, data: str | None) -> BPE:
    """The BPE that a checkpoint names. Its files lie beside the checkpoint, or in model/ of its data; the
    paths that it names are not followed. Raises UnsupportedError for none.
    """
    args = state.get("args")
    given = vars(args) if args is not None else (state.get("cfg") or {}).get("bpe") or {}
    given = vars(given) if isinstance(given, Namespace) else given
    name = given.get("bpe", given.get("_name"))
    for folder in [path.parent, *([Path(data) / "model"] if data else [])] if name in BPE_FILES else ():
        files = tuple(folder / Path(str(given.get(option))).name for option in BPE_FILES[name])
        if all(file.is_file() for file in files):
            return BPE(name, files, take(BPES[name], given, f"{path}: bpe", UnsupportedError))
    raise UnsupportedError(
        f"{path}: does not say which BPE it was trained with, or its files do not lie beside it; give "
        "--bpe NAME --bpe-files FILE"
    )


def _kept(bpe: BPE, folder: Path) -> BPE:
    """The BPE with its files in `folder`."""
    for file in bpe.files:
        if file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    return BPE(bpe.name, tuple(folder / file.name for file in bpe.files), bpe.options)


def _unpack(path: Path, folder: Path) -> BPE:
    """A small file as a dense checkpoint, a dictionary and the files of its BPE."""
    file = api.read(path)
    source = file.manifest["source"] or {}
    if source.get("builder") != "fairseq" or source.get("model", {}).get("_name") != "qn_roberta":
        raise UnsupportedError(f"{path}: expected a small file of a RoBERTa encoder")
    with file.named():
        text, source = checked_text(source, file.assets), checked(source)
        task = build_task(source, file.assets)
        model = file.load("dense", build_model(source, task, file.names))
    if text["bpe"] is None:
        raise UnsupportedError(f"{path}: carries no BPE; give --bpe NAME --bpe-files FILE")
    name = text["bpe"]["_name"]
    files = {option: folder / text["bpe"][option] for option in BPE_FILES[name]}
    for option, target in files.items():
        target.write_bytes(file.assets[text["bpe"][option]])
    write_dictionary(folder / DICTIONARY, task.source_dictionary)
    labels = getattr(task, "label_dictionary", None)
    if labels is not None and labels is not task.source_dictionary:  # of numbers it is
        write_dictionary(folder / "label" / DICTIONARY, labels)
    given = {**source["model"], **source["task"], "arch": "qn_roberta", "task": source["task"]["_name"]}
    del given["_name"]
    args = Namespace(**given, data=".", criterion="sentence_prediction")
    with replacing(folder / CHECKPOINT) as out:
        torch.save(checkpoint_of(args, _whole(model)), out)
    return BPE(name, tuple(files.values()), {k: v for k, v in text["bpe"].items() if k in BPES[name]})


def _whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a loaded model, with a masked-LM head that changes nothing where the file left it out:
    fairseq restores no checkpoint without one.
    """
    weights = dict(model.state_dict())
    if isinstance(getattr(model.encoder, "lm_head", None), Dropped):
        weights |= identity_head(weights[EMBEDDING])
    return weights


def write_dictionary(path: Path, dictionary: Dictionary) -> None:
    """As fairseq reads it: less the specials, and <mask>, which its tasks add."""
    path.parent.mkdir(parents=True, exist_ok=True)
    symbols = [symbol for symbol in dictionary.symbols[dictionary.nspecial :] if symbol != "<mask>"]
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols), encoding="utf-8")


def bpe_of(name: str, files: Sequence[Path], options: Mapping[str, Any]) -> BPE:
    """The BPE of --bpe, --bpe-files and --bpe-option, checked as `carry_bpe` checks it."""
    return BPE(name, tuple(files), take(BPES[name], options, "--bpe-option", UnsupportedError))
