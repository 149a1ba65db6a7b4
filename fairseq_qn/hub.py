"""fairseq's hub interfaces from the small file alone: no data directory, no pickle. Importing this teaches `load` to build."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, hub_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.roberta import RobertaHubInterface
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_qn import api
from fairseq_qn.artifact import manifest
from fairseq_qn.artifact.replacing import refuse_same
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.models.checkpoint import load_checkpoint
from fairseq_qn.models.describe import build_model, build_task
from fairseq_qn.models.roberta import QNRobertaModel
from fairseq_qn.models.stock import to_stock
from fairseq_qn.models.transformer import QNTransformerLanguageModel, QNTransformerModel

__all__ = [
    "QNRobertaModel",
    "QNTransformerLanguageModel",
    "QNTransformerModel",
    "export_fairseq",
    "load_any",
    "load_checkpoint",
    "load_interface",
]

SUFFIX = ".qn.safetensors"


class QNRobertaHub(RobertaHubInterface):
    """fairseq's RoBERTa interface (encode, decode, predict, fill_mask, extract_features), with the names of the labels."""

    def encode(self, sentence: str, *addl_sentences: str, no_separator: bool = False) -> Tensor:
        """Token ids [length] of a sentence or of several. Raises UnsupportedError if the file carries no BPE model."""
        self._need_bpe("encode")
        return super().encode(sentence, *addl_sentences, no_separator=no_separator)

    @torch.inference_mode()
    def fill_mask(self, masked_input: str, topk: int = 5) -> list[tuple[str, float, str]]:
        """[(sentence, probability, token)] for the one <mask>, the likeliest first. Raises UnsupportedError."""
        self._need_bpe("fill_mask")
        if masked_input.count("<mask>") != 1:
            found = masked_input.count("<mask>")
            raise UnsupportedError(f"fill_mask: expected one <mask> in the sentence, found {found}")
        if "<mask>" not in self.task.source_dictionary.indices:
            raise UnsupportedError("fill_mask: the model's dictionary has no <mask>; it was not trained to fill one")
        self.task.mask_idx = self.task.source_dictionary.index("<mask>")  # a classifier's task does not keep it
        return super().fill_mask(masked_input, topk)

    def _need_bpe(self, verb: str) -> None:
        if self.bpe is None:
            raise UnsupportedError(
                f"{verb}: the file carries no BPE model; save it with one (compress --bpe NAME --bpe-files FILE)"
            )

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        dictionary = getattr(self.task, "label_dictionary", None)
        return dictionary.symbols[dictionary.nspecial :] if dictionary is not None else []

    @torch.inference_mode()
    def classify(self, *sentences: str, head: str | None = None) -> list[tuple[str, float]]:
        """[(label, probability)] of one sentence, or of a pair, the likeliest first."""
        chances = self._logits(sentences, head).softmax(-1)
        names = self.labels if len(self.labels) >= len(chances) else [str(i) for i in range(len(chances))]
        return sorted(zip(names, chances.tolist(), strict=False), key=lambda item: -item[1])

    @torch.inference_mode()
    def regress(self, *sentences: str, head: str | None = None) -> float:
        """The value of one sentence, or of a pair, from a head of one output. Raises UnsupportedError for another."""
        if not self.is_regression(head):
            raise UnsupportedError(f"regress: expected a head of one output, found {head or 'the first'} with classes")
        return float(self._logits(sentences, head)[0])

    def is_regression(self, head: str | None = None) -> bool:
        """Whether a head has one output, a number, rather than classes."""
        return self.model.classification_heads[self._head(head)].out_proj.out_features == 1

    def _logits(self, sentences: Sequence[str], head: str | None) -> Tensor:
        return self.predict(self._head(head), self.encode(*sentences), return_logits=True).flatten().float()

    def _head(self, head: str | None) -> str:
        heads = list(self.model.classification_heads)
        head = head or (heads[0] if heads else None)
        if head not in heads:
            raise UnsupportedError(f"classify: expected one of the heads {heads}, found {head!r}")
        return head


def load_interface(path: str | Path, mode: str = "dense", dtype: torch.dtype | None = None) -> Any:
    """The interface that fits the file's model, loaded as `load` does: QNRobertaHub, or fairseq's generator interface."""
    file = api.read(find_file(path))
    source = file.plan["source"] or {}
    if source.get("builder") != "fairseq":
        raise UnsupportedError(f"{path}: not a model of fairseq's; load it with fairseq_qn.load(path, model=...)")
    with _described():
        task = build_task(source, file.assets)  # once: a large dictionary takes as long as the whole model
        model = build_model(source, task)
    model = file.load(mode, model, dtype=dtype)
    roberta = isinstance(model, QNRobertaModel)
    with _bpe_config(file, full=not roberta) as config:
        if roberta:
            return QNRobertaHub(config, task, model).eval()
        return hub_utils.GeneratorHubInterface(config, task, [model]).eval()


def roberta_from_pretrained(
    cls: type[nn.Module],
    path: str | Path,
    checkpoint_file: str,
    *args: Any,
    mode: str = "dense",
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """from_pretrained of qn_roberta: a small file, a folder that holds one, or what fairseq takes."""
    if is_small(path):
        return load_interface(path, mode, dtype)
    return super(QNRobertaModel, cls).from_pretrained(str(path), checkpoint_file, *args, **kwargs)


def generator_from_pretrained(
    cls: type[nn.Module],
    path: str | Path,
    checkpoint_file: str,
    *args: Any,
    mode: str = "dense",
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """from_pretrained of qn_transformer and qn_transformer_lm, likewise."""
    if is_small(path):
        return load_interface(path, mode, dtype)
    from fairseq.models.transformer import TransformerModel

    return TransformerModel.from_pretrained.__func__(cls, str(path), checkpoint_file, *args, **kwargs)


def is_small(path: str | Path) -> bool:
    """Whether a path names a small file, or a folder with one in it."""
    path = Path(path)
    return path.name.endswith(SUFFIX) or (path.is_dir() and any(path.glob(f"*{SUFFIX}")))


def find_file(path: str | Path) -> Path:
    """The small file that a path names: itself, or the only one in a folder. Raises FormatError."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) != 1:
        raise FormatError(f"{path}: expected one *{SUFFIX} file in the folder, found {len(found)}; name the file")
    return found[0]


def load_any(path: str | Path, data: str | None = None) -> nn.Module:
    """A model from a small file or from a fairseq checkpoint; `data`: where the checkpoint's dictionaries are now."""
    return api.load(find_file(path)) if is_small(path) else load_checkpoint(path, data)[0]


def export_fairseq(path: str | Path, output: str | Path, data: str | None = None) -> dict[str, Any]:
    """Write a qn_ checkpoint as a stock one: frozen layers by their decoded weights, all else exactly as it is stored.

    Returns {"file", "architecture", "frozen_layers", "note"}; the note says what fairseq's own model cannot express. Raises as
    load_checkpoint does, and UnsupportedError for a stock checkpoint or where `output` is `path`.
    """
    refuse_same(output, path)
    model, config, _ = load_checkpoint(path, data)
    stock, frozen = to_stock(torch.load(path, map_location="cpu", weights_only=True), model, str(path))
    eps = getattr(config.model, "layer_norm_eps", None)
    own_eps = isinstance(model, QNRobertaModel) and eps is not None and float(eps) != 1e-5
    note = f"fairseq's roberta has LayerNorm eps 1e-05, this model {float(eps):g}" if own_eps else ""
    checkpoint_utils.torch_persistent_save(stock, str(output))
    made = getattr(stock["cfg"]["model"], "arch", None) or stock["cfg"]["model"]["_name"]
    return {"file": str(output), "architecture": made, "frozen_layers": frozen, "note": note}


def _build(source: dict[str, Any], assets: dict[str, bytes]) -> nn.Module:
    with _described():
        return build_model(source, build_task(source, assets))


@contextmanager
def _described() -> Iterator[None]:
    """Whatever a source that describes no model makes fairseq raise, as a FormatError."""
    try:
        yield
    except (KeyError, AttributeError, TypeError, AssertionError) as error:
        raise FormatError(f"source: does not describe a model: {type(error).__name__}: {error}") from error


api.register_builder("fairseq", _build)


@contextmanager
def _bpe_config(file: api.File, full: bool) -> Iterator[Any]:
    """fairseq's configuration with the BPE and tokenizer of the file, whose model files lie in a folder for the moment.

    full: with everything else that fairseq configures, which takes 40 ms and which RoBERTa's interface does not read.
    """
    source = file.plan["source"]
    with tempfile.TemporaryDirectory() as folder:
        for name, data in file.assets.items():
            target = Path(folder) / name
            if not target.resolve().is_relative_to(Path(folder).resolve()):
                raise FormatError(f"{file.path}: asset {name!r}: leads out of the file's folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        config = OmegaConf.structured(FairseqConfig) if full else OmegaConf.create()
        with open_dict(config):
            for key in ("bpe", "tokenizer"):
                options = source.get(key)
                config[key] = {k: _located(v, folder) for k, v in options.items()} if options else None
        yield config


def _located(value: Any, folder: str) -> Any:
    is_asset = isinstance(value, str) and value.startswith(manifest.ASSET)
    return str(Path(folder) / value[len(manifest.ASSET) :]) if is_asset else value


# option of each of fairseq's BPEs -> the ending of its file
BPE_FILES = {
    "sentencepiece": {"sentencepiece_model": ".model"},
    "gpt2": {"gpt2_encoder_json": ".json", "gpt2_vocab_bpe": (".bpe", ".txt")},
    "qn_wordpiece": {"wordpiece_vocab": ".txt"},
    "fastbpe": {"bpe_codes": ""},
    "subword_nmt": {"bpe_codes": ""},
}


def carry_bpe(
    name: str, files: Sequence[str | Path], options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(source, assets) for `save`, so that a BPE and its model files travel inside the file.

    files are told apart by their endings. Raises UnsupportedError for a BPE that is not known here or a file too few or many.
    """
    if name not in BPE_FILES:
        raise UnsupportedError(f"--bpe: expected one of {sorted(BPE_FILES)}, found {name!r}")
    config: dict[str, Any] = {"_name": name, **(options or {})}
    assets, left = {}, [Path(file) for file in files]
    for option, ending in BPE_FILES[name].items():
        found = [file for file in left if file.name.endswith(ending)]
        if len(found) != 1:
            raise UnsupportedError(
                f"--bpe {name}: expected one file for {option} (*{ending}), found {[str(f) for f in found]}"
            )
        left.remove(found[0])
        assets[found[0].name] = found[0].read_bytes()
        config[option] = manifest.ASSET + found[0].name
    if left:
        raise UnsupportedError(f"--bpe {name}: takes no file {str(left[0])!r}")
    return {"bpe": config}, assets
