"""fairseq's hub interfaces over a model from the small file: what answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from fairseq import hub_utils, utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.roberta import RobertaHubInterface
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.dropped import Dropped

_FILLER = re.compile(r"madeupword\d{4,}")  # fairseq pads a dictionary to a multiple of 8


class QNRobertaHub(RobertaHubInterface):
    """fairseq's RoBERTa interface (encode, decode, predict, fill_mask, extract_features), with the names of
    the labels.
    """

    @classmethod
    def of(cls, model: nn.Module, task: Any, text: Mapping[str, Any]) -> QNRobertaHub:
        """The interface of a model; text: options of its BPE and tokenizer."""
        return cls(_config(text, OmegaConf.create()), task, model)

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

        As fairseq's, but that what stands for no text is never an answer: the dictionary's fillers, which no
        BPE knows, and its special symbols.
        """
        self._need_bpe("fill_mask")
        words, parts = self.task.source_dictionary, masked_input.split("<mask>")
        if len(parts) != 2:
            raise UnsupportedError(f"fill_mask: expected one <mask> in the sentence, found {len(parts) - 1}")
        if "<mask>" not in words.indices:
            raise UnsupportedError(
                "fill_mask: the model's dictionary has no <mask>; it was not trained to fill one"
            )
        pieces = " <mask> ".join(self.bpe.encode(part.rstrip()) for part in parts)
        tokens = words.encode_line(f"<s> {pieces} </s>", append_eos=False, add_if_not_exist=False).long()
        self._need_room(tokens)
        with utils.model_eval(self.model):
            logits = self.model(tokens[None].to(self.device))[0][0].cpu()
        chances = logits[tokens == words.index("<mask>")][0].float().softmax(0)
        chances[self._never] = -1
        found = chances.topk(min(topk, len(words) - len(self._never)))
        gap = " <mask>" if " <mask>" in masked_input else "<mask>"
        answers = []
        for chance, index in zip(*(t.tolist() for t in found), strict=True):
            token = self.bpe.decode(words[index])
            if words[index].startswith("\u2581"):  # a sentencepiece that begins a word
                token = f" {token}"
            answers.append((masked_input.replace(gap, token), chance, token))
        return answers

    @cached_property
    def _never(self) -> list[int]:
        """Ids that stand for no text."""
        words = self.task.source_dictionary
        return [
            index
            for index, symbol in enumerate(words.symbols)
            if index < words.nspecial or symbol == "<mask>" or _FILLER.fullmatch(symbol)
        ]

    def _need_bpe(self, verb: str) -> None:
        if self.bpe is None:
            raise UnsupportedError(
                f"{verb}: the file carries no BPE model; save it with one (compress --bpe NAME --bpe-files "
                "FILE)"
            )

    def _need_room(self, tokens: Tensor) -> None:
        longest = self.model.max_positions()
        if tokens.size(-1) > longest:
            raise UnsupportedError(
                f"expected up to {longest} tokens, found {tokens.size(-1)}; shorten the sentence"
            )

    @property
    def labels(self) -> list[str]:
        """Names of the classes of the first head, in the order of its logits; numbers where the file has no
        names for them.
        """
        return self.labels_of(None) if self._heads() else []

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
        else:  # fairseq's task adds <mask>
            symbols = dictionary.symbols[dictionary.nspecial :]
            names = [s for s in symbols if s != "<mask>" and not _FILLER.fullmatch(s)]
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
        self._need_room(tokens)
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

    def _heads(self) -> list[str]:
        """Those that the file holds."""
        heads = self.model.classification_heads.items()
        return [name for name, module in heads if not isinstance(module, Dropped)]

    def _head(self, head: str | None) -> str:
        heads = self._heads()
        head = head or (heads[0] if heads else None)
        if head not in heads:
            raise UnsupportedError(f"classify: expected one of the heads {heads}, found {head!r}")
        return head


class QNGeneratorHub(hub_utils.GeneratorHubInterface):
    """fairseq's interface of language and translation models."""

    @classmethod
    def of(cls, model: nn.Module, task: Any, text: Mapping[str, Any]) -> QNGeneratorHub:
        """The interface of a model; text: options of its BPE and tokenizer."""
        # with everything else that fairseq configures, which takes 40 ms
        return cls(_config(text, OmegaConf.structured(FairseqConfig)), task, [model])

    def _build_batches(self, tokens: Sequence[Tensor], skip_invalid_size_inputs: bool) -> Any:
        longest = (
            self.max_positions[0] if isinstance(self.max_positions, (tuple, list)) else self.max_positions
        )
        found = max(map(len, tokens), default=0)
        if found > longest and not skip_invalid_size_inputs:
            raise UnsupportedError(f"expected up to {longest} tokens, found {found}; shorten the sentence")
        return super()._build_batches(tokens, skip_invalid_size_inputs)


def _config(parts: Mapping[str, Any], config: Any) -> Any:
    with open_dict(config):
        config.update(parts)
    return config
