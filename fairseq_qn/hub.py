"""fairseq's hub interfaces from the small file alone: no data directory, no pickle. Importing this teaches
`load` to build.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, hub_utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.roberta import RobertaHubInterface
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_qn import api
from fairseq_qn.artifact.replacing import refuse_same
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.models.checkpoint import load_checkpoint, read_checkpoint
from fairseq_qn.models.describe import build_model, build_task, checked, fairseq_refuses
from fairseq_qn.models.options import BPE_FILES
from fairseq_qn.models.roberta import QNRobertaModel
from fairseq_qn.models.stock import to_stock
from fairseq_qn.models.transformer import QNTransformerLanguageModel, QNTransformerModel
from fairseq_qn.modules.fill import Dropped
from fairseq_qn.tasks.bpe import Guarded, carry_bpe, checked_text, unpacked

__all__ = [
    "BPE_FILES",
    "QNRobertaModel",
    "QNTransformerLanguageModel",
    "QNTransformerModel",
    "carry_bpe",
    "export_fairseq",
    "load_any",
    "load_checkpoint",
    "load_interface",
]

SUFFIX = ".qn.safetensors"
_FILLER = re.compile(r"madeupword\d{4,}")


class QNRobertaHub(RobertaHubInterface):
    """fairseq's RoBERTa interface (encode, decode, predict, fill_mask, extract_features), with the names of
    the labels.
    """

    def encode(self, sentence: str, *addl_sentences: str, no_separator: bool = False) -> Tensor:
        """Token ids [length] of a sentence or of several. Raises UnsupportedError if the file carries no BPE
        model.
        """
        self._need_bpe("encode")
        return super().encode(sentence, *addl_sentences, no_separator=no_separator)

    @torch.inference_mode()
    def fill_mask(self, masked_input: str, topk: int = 5) -> list[tuple[str, float, str]]:
        """[(sentence, probability, token)] for the one <mask>, the likeliest first. Raises
        UnsupportedError.
        """
        self._need_bpe("fill_mask")
        if masked_input.count("<mask>") != 1:
            found = masked_input.count("<mask>")
            raise UnsupportedError(f"fill_mask: expected one <mask> in the sentence, found {found}")
        if "<mask>" not in self.task.source_dictionary.indices:
            raise UnsupportedError(
                "fill_mask: the model's dictionary has no <mask>; it was not trained to fill one"
            )
        # a classifier's task does not keep it
        self.task.mask_idx = self.task.source_dictionary.index("<mask>")
        try:
            return super().fill_mask(masked_input, min(topk, len(self.task.source_dictionary)))
        except IndexError as error:  # of the table of positions
            longest = self.model.max_positions()
            raise UnsupportedError(
                f"fill_mask: expected up to {longest} tokens, found more; shorten the sentence"
            ) from error

    def _need_bpe(self, verb: str) -> None:
        if self.bpe is None:
            raise UnsupportedError(
                f"{verb}: the file carries no BPE model; save it with one (compress --bpe NAME --bpe-files "
                "FILE)"
            )

    @property
    def labels(self) -> list[str]:
        """Names of the classes of the first head, in the order of its logits; numbers where the file has no
        names for them.
        """
        heads = [
            module for module in self.model.classification_heads.values() if not isinstance(module, Dropped)
        ]
        return self.labels_of(None) if heads else []

    def labels_of(self, head: str | None) -> list[str]:
        """Names of a head's classes, likewise. The label dictionary is of the head that the task trained,
        and of no other.
        """
        head = self._head(head)
        count = self.model.classification_heads[head].out_proj.out_features
        dictionary = getattr(self.task, "label_dictionary", None)
        trained = getattr(self.task.cfg, "classification_head_name", None)
        if (
            dictionary is None
            or dictionary is self.task.source_dictionary
            or (head != trained and len(self.model.classification_heads) > 1)
        ):
            names = []
        else:  # fairseq pads a dictionary to a multiple of 8, and its task adds <mask>
            names = [
                s
                for s in dictionary.symbols[dictionary.nspecial :]
                if s != "<mask>" and not _FILLER.fullmatch(s)
            ]
        return names if len(names) == count else [str(i) for i in range(count)]

    @torch.inference_mode()
    def classify(self, *sentences: str, head: str | None = None) -> list[tuple[str, float]]:
        """[(label, probability)] of one sentence, or of a pair, the likeliest first."""
        chances = self._logits(sentences, head).softmax(-1)
        return sorted(zip(self.labels_of(head), chances.tolist(), strict=True), key=lambda item: -item[1])

    def extract_features(self, tokens: Tensor, return_all_hiddens: bool = False) -> Any:
        """Features [batch, length, size], or those of each layer. Raises UnsupportedError for more tokens
        than positions.
        """
        longest = self.model.max_positions()
        if tokens.size(-1) > longest:
            raise UnsupportedError(
                f"expected up to {longest} tokens, found {tokens.size(-1)}; shorten the sentence"
            )
        return super().extract_features(tokens, return_all_hiddens)

    @torch.inference_mode()
    def regress(self, *sentences: str, head: str | None = None) -> float:
        """The value of one sentence, or of a pair, from a head of one output. Raises UnsupportedError for
        another.
        """
        if not self.is_regression(head):
            raise UnsupportedError(
                f"regress: expected a head of one output, found {head or 'the first'} with classes"
            )
        return float(self._logits(sentences, head)[0])

    def is_regression(self, head: str | None = None) -> bool:
        """Whether a head has one output, a number, rather than classes."""
        return self.model.classification_heads[self._head(head)].out_proj.out_features == 1

    def _logits(self, sentences: Sequence[str], head: str | None) -> Tensor:
        return self.predict(self._head(head), self.encode(*sentences), return_logits=True).flatten().float()

    def _head(self, head: str | None) -> str:
        heads = [
            name
            for name, module in self.model.classification_heads.items()
            if not isinstance(module, Dropped)
        ]
        head = head or (heads[0] if heads else None)
        if head not in heads:
            raise UnsupportedError(f"classify: expected one of the heads {heads}, found {head!r}")
        return head


class QNGeneratorHub(hub_utils.GeneratorHubInterface):
    """fairseq's interface of language and translation models."""

    def _build_batches(self, tokens: Sequence[Tensor], skip_invalid_size_inputs: bool) -> Any:
        longest = (
            self.max_positions[0] if isinstance(self.max_positions, (tuple, list)) else self.max_positions
        )
        found = max(map(len, tokens), default=0)
        if found > longest and not skip_invalid_size_inputs:
            raise UnsupportedError(f"expected up to {longest} tokens, found {found}; shorten the sentence")
        return super()._build_batches(tokens, skip_invalid_size_inputs)


def load_interface(path: str | Path, mode: str = "dense", dtype: torch.dtype | None = None) -> Any:
    """The interface that fits the file's model, loaded as `load` does: QNRobertaHub, or fairseq's generator
    interface.
    """
    file = api.read(find_file(path))
    source = file.plan["source"] or {}
    if source.get("builder") != "fairseq":
        raise UnsupportedError(
            f"{path}: not a model of fairseq's; load it with fairseq_qn.load(path, model=...)"
        )
    with file.named():
        parts, source = checked_text(source, file.assets), checked(source)
        task = build_task(source, file.assets)  # once: a large dictionary takes as long as the whole model
        model = build_model(source, task, file.names)
    model = file.load(mode, model, dtype=dtype)
    with file.named(), unpacked(parts, file.assets) as parts, fairseq_refuses("source.bpe"):
        if isinstance(model, QNRobertaModel):
            interface: Any = QNRobertaHub(_config(parts, OmegaConf.create()), task, model).eval()
        else:  # with everything else that fairseq configures, which takes 40 ms
            config = _config(parts, OmegaConf.structured(FairseqConfig))
            interface = QNGeneratorHub(config, task, [model]).eval()
    if interface.bpe is not None:
        interface.bpe = Guarded(interface.bpe, file.path)
    return interface


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
        raise FormatError(
            f"{path}: expected one *{SUFFIX} file in the folder, found {len(found)}; name the file"
        )
    return found[0]


def load_any(path: str | Path, data: str | None = None) -> nn.Module:
    """A model from a small file or from a fairseq checkpoint; `data`: where the checkpoint's dictionaries
    are now.
    """
    return api.load(find_file(path)) if is_small(path) else load_checkpoint(path, data)[0]


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
    eps = getattr(config.model, "layer_norm_eps", None)
    own_eps = isinstance(model, QNRobertaModel) and eps is not None and float(eps) != 1e-5
    note = f"fairseq's roberta has LayerNorm eps 1e-05, this model {float(eps):g}" if own_eps else ""
    checkpoint_utils.torch_persistent_save(stock, str(output))
    made = getattr(stock["cfg"]["model"], "arch", None) or stock["cfg"]["model"]["_name"]
    return {"file": str(output), "architecture": made, "frozen_layers": frozen, "note": note}


def _build(source: dict[str, Any], assets: Mapping[str, bytes], names: Sequence[str]) -> nn.Module:
    checked_text(source, assets)
    source = checked(source)
    return build_model(source, build_task(source, assets), names)


api.register_builder("fairseq", _build)


def _config(parts: Mapping[str, Any], config: Any) -> Any:
    with open_dict(config):
        config.update(parts)
    return config
