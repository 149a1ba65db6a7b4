"""fairseq's hub interfaces over a model from the small file: what answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from fairseq import hub_utils, utils
from fairseq.dataclass.configs import FairseqConfig
from fairseq.models.roberta import RobertaHubInterface
from omegaconf import OmegaConf, open_dict
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.models.batches import BATCH, batches, shortened, token_ids
from fairseq_qn.models.describe import FILLER, label_names
from fairseq_qn.models.first_token import first_token
from fairseq_qn.modules.dropped import Dropped

Example = str | tuple[str, ...]  # a sentence, or a pair
Ranked = list[tuple[str, float]]  # [(label, probability)], the likeliest first
Filled = list[tuple[str, float, str]]  # [(sentence, probability, token)], likewise


class QNRobertaHub(RobertaHubInterface):
    """fairseq's RoBERTa interface (encode, predict, fill_mask, ...), with the names of the labels."""

    @classmethod
    def of(cls, model: nn.Module, task: Any, text: Mapping[str, Any]) -> QNRobertaHub:
        """The interface of a model; text: options of its BPE and tokenizer."""
        return cls(_config(text, OmegaConf.create()), task, model)

    def encode(self, sentence: str, *addl_sentences: str, no_separator: bool = False) -> Tensor:
        """Token ids [length] of a sentence or of several. Raises UnsupportedError without a BPE."""
        self._need_bpe("encode")
        between = " </s> " if no_separator else " </s> </s> "
        pieces = between.join(map(self.bpe.encode, (sentence, *addl_sentences)))
        return token_ids(self.task.source_dictionary, f"<s> {pieces} </s>")

    def encode_cut(self, *sentences: str) -> tuple[Tensor, bool]:
        """(token ids, whether they were cut to the model's positions): the longest of several sentences
        gives way first, and each keeps its end symbol.
        """
        tokens = self.encode(*sentences)
        excess = len(tokens) - self.model.max_positions()
        if excess <= 0:
            return tokens, False
        inner = [self.encode(sentence)[1:-1] for sentence in sentences]
        lengths = [len(part) for part in inner]
        cut = [part[:n] for part, n in zip(inner, shortened(lengths, sum(lengths) - excess), strict=True)]
        words = self.task.source_dictionary
        end = torch.tensor([words.eos()])
        pieces = [torch.tensor([words.bos()]), cut[0], end]
        for part in cut[1:]:
            pieces += [end, part, end]
        return torch.cat(pieces), True

    def fill_mask(self, masked_input: str | list[str], topk: int = 5, batch: int = BATCH) -> Any:
        """[(sentence, probability, token)] for the one <mask>, the likeliest first; of a list, a list of
        these. Raises UnsupportedError.

        As fairseq's, but that what stands for no text is never an answer: the dictionary's fillers, which no
        BPE knows, and its special symbols.
        """
        if isinstance(masked_input, str):
            return self.fill_mask([masked_input], topk)[0]
        tokens = [self.encode_masked(sentence) for sentence in masked_input]
        return self.fill_tokens(masked_input, tokens, topk, batch)

    def encode_masked(self, sentence: str) -> Tensor:
        """Token ids [length] of a sentence with one <mask>. Raises UnsupportedError."""
        self._need_bpe("fill_mask")
        words, parts = self.task.source_dictionary, sentence.split("<mask>")
        if len(parts) != 2:
            raise UnsupportedError(f"fill_mask: expected one <mask> in the sentence, found {len(parts) - 1}")
        if "<mask>" not in words.indices:
            raise UnsupportedError(
                "fill_mask: the model's dictionary has no <mask>; it was not trained to fill one"
            )
        pieces = " <mask> ".join(self.bpe.encode(part.rstrip()) for part in parts)
        tokens = token_ids(words, f"<s> {pieces} </s>")
        self.need_room(tokens)
        return tokens

    @torch.inference_mode()
    def fill_tokens(
        self, sentences: Sequence[str], tokens: Sequence[Tensor], topk: int, batch: int = BATCH
    ) -> list[Filled]:
        """What fill_mask answers to sentences whose ids are known (encode_masked)."""
        words, answers = self.task.source_dictionary, [[] for _ in sentences]
        count = min(topk, len(words) - len(self._never))
        for places, ids in batches(tokens, batch, words.pad()):
            masked = (ids == words.index("<mask>")).to(self.device)
            with utils.model_eval(self.model):
                logits = self.model(ids.to(self.device), masked_tokens=masked)[0].cpu()
            chances = logits.float().softmax(-1)
            chances[:, self._never] = -1
            values, indices = chances.topk(count)
            for place, *found in zip(places, values.tolist(), indices.tolist(), strict=True):
                answers[place] = self._filled(sentences[place], *found)
        return answers

    def _filled(self, sentence: str, chances: list[float], indices: list[int]) -> Filled:
        words, answers = self.task.source_dictionary, []
        gap = " <mask>" if " <mask>" in sentence else "<mask>"
        for chance, index in zip(chances, indices, strict=True):
            token = self.bpe.decode(words[index])
            if words[index].startswith("\u2581"):  # a sentencepiece that begins a word
                token = f" {token}"
            answers.append((sentence.replace(gap, token), chance, token))
        return answers

    @cached_property
    def _never(self) -> list[int]:
        """Ids that stand for no text."""
        words = self.task.source_dictionary
        return [
            index
            for index, symbol in enumerate(words.symbols)
            if index < words.nspecial or symbol == "<mask>" or FILLER.fullmatch(symbol)
        ]

    def _need_bpe(self, verb: str) -> None:
        if self.bpe is None:
            raise UnsupportedError(
                f"{verb}: the file carries no BPE model; give one with --bpe NAME --bpe-files FILE: to "
                "`compress`, or here for a checkpoint"
            )

    def need_room(self, tokens: Tensor) -> None:
        """Raise UnsupportedError for more tokens than positions."""
        longest = self.model.max_positions()
        if tokens.size(-1) > longest:
            raise UnsupportedError(
                f"expected up to {longest} tokens, found {tokens.size(-1)}; shorten the sentence"
            )

    @property
    def labels(self) -> list[str]:
        """Names of the classes of the first head, in the order of its logits; numbers without names."""
        return self.labels_of(None) if self._heads() else []

    def labels_of(self, head: str | None) -> list[str]:
        """Names of a head's classes, likewise. The label dictionary is of the head that the task trained."""
        head = self.head_of(head)
        count = self.model.classification_heads[head].out_proj.out_features
        dictionary = getattr(self.task, "label_dictionary", None)
        trained = getattr(self.task.cfg, "classification_head_name", None)
        if (
            dictionary is None
            or dictionary is self.task.source_dictionary
            or (head != trained and len(self.model.classification_heads) > 1)
        ):
            names = []
        else:
            names = label_names(dictionary)
        return names if len(names) == count else [str(i) for i in range(count)]

    def classify(
        self, *sentences: str | list[Example], head: str | None = None, batch: int = BATCH
    ) -> Ranked | list[Ranked]:
        """[(label, probability)] of one sentence, or of a pair, the likeliest first.

        Of a list of sentences and pairs (tuples), a list of these, in its order: `classify(["a", "b"])`.
        They go through the model `batch` at a time.
        """
        examples, many = _examples(sentences)
        chances = self.logits(self._encoded(examples), head, batch).softmax(-1)
        answers = ranked(chances, self.labels_of(head))
        return answers if many else answers[0]

    def extract_features(self, tokens: Tensor, return_all_hiddens: bool = False) -> Any:
        """Features [batch, length, size], or of each layer. Raises UnsupportedError for too many tokens."""
        self.need_room(tokens)
        return super().extract_features(tokens, return_all_hiddens)

    def predict(self, head: str, tokens: Tensor, return_logits: bool = False) -> Tensor:
        """What a head gives [batch, outputs] for ids [batch, length] or [length], as fairseq's, but that the
        last layer computes for `<s>` alone, which heads read. Raises UnsupportedError for too many tokens.
        """
        if self.model.training:
            return super().predict(head, tokens, return_logits)
        self.need_room(tokens)
        tokens = tokens.unsqueeze(0) if tokens.dim() == 1 else tokens
        features = first_token(self.model.encoder.sentence_encoder, tokens.to(self.device))
        logits = self.model.classification_heads[head](features)
        return logits if return_logits else logits.log_softmax(-1)

    def regress(
        self, *sentences: str | list[Example], head: str | None = None, batch: int = BATCH
    ) -> float | list[float]:
        """The value of one sentence, or of a pair, from a head of one output; of a list of these, a list.
        Raises UnsupportedError for another head.
        """
        if not self.is_regression(head):
            raise UnsupportedError(
                f"regress: expected a head of one output, found {head or 'the first'} with classes"
            )
        examples, many = _examples(sentences)
        found = self.logits(self._encoded(examples), head, batch)[:, 0].tolist()
        return found if many else found[0]

    def is_regression(self, head: str | None = None) -> bool:
        """Whether a head has one output, a number, rather than classes."""
        return self.model.classification_heads[self.head_of(head)].out_proj.out_features == 1

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[Tensor],
        head: str | None = None,
        batch: int = BATCH,
        done: Callable[[int], Any] = lambda count: None,
    ) -> Tensor:
        """What a head gives, fp32 [sentences, outputs], for the ids of each sentence, in their order.

        done: called after each batch with the number of its sentences.
        """
        head = self.head_of(head)
        outputs = self.model.classification_heads[head].out_proj.out_features
        result = torch.empty(len(tokens), outputs)
        for places, ids in batches(tokens, batch, self.task.source_dictionary.pad()):
            result[places] = self.predict(head, ids, return_logits=True).float().cpu()
            done(len(places))
        return result

    def _encoded(self, examples: Sequence[Example]) -> list[Tensor]:
        return [self.encode(*_sentences(example)) for example in examples]

    def _heads(self) -> list[str]:
        """Those that the file holds."""
        heads = self.model.classification_heads.items()
        return [name for name, module in heads if not isinstance(module, Dropped)]

    def head_of(self, head: str | None) -> str:
        """A head by name, or the first. Raises UnsupportedError for one that is not there."""
        heads = self._heads()
        head = head or (heads[0] if heads else None)
        if head not in heads:
            raise UnsupportedError(f"classify: expected one of the heads {heads}, found {head!r}")
        return head


def ranked(chances: Tensor, labels: Sequence[str], top: int | None = None) -> list[Ranked]:
    """Probabilities [sentences, classes] -> the `top` likeliest labels of each, all by default."""
    values, indices = chances.sort(dim=-1, descending=True, stable=True)
    rows = zip(values[:, :top].tolist(), indices[:, :top].tolist(), strict=True)
    return [[(labels[i], value) for i, value in zip(where, row, strict=True)] for row, where in rows]


def _sentences(example: Example) -> tuple[str, ...]:
    return (example,) if isinstance(example, str) else tuple(example)


def _examples(given: Sequence[str | list[Example]]) -> tuple[Sequence[Example], bool]:
    """(examples, whether they came as one list). Raises UnsupportedError for a list beside a sentence."""
    if len(given) == 1 and isinstance(given[0], list):
        return given[0], True
    if not all(isinstance(sentence, str) for sentence in given):
        raise UnsupportedError(
            "expected a sentence, the two of a pair, or one list of sentences and pairs (tuples)"
        )
    return [tuple(given)], False


class QNGeneratorHub(hub_utils.GeneratorHubInterface):
    """fairseq's interface of language and translation models."""

    @classmethod
    def of(cls, model: nn.Module, task: Any, text: Mapping[str, Any]) -> QNGeneratorHub:
        """The interface of a model; text: options of its BPE and tokenizer."""
        # with everything else that fairseq configures, which takes 40 ms
        return cls(_config(text, OmegaConf.structured(FairseqConfig)), task, [model])

    def checked(self, sentence: str) -> Tensor:
        """Token ids [length] of a sentence. Raises UnsupportedError for more tokens than positions."""
        tokens = self.encode(sentence)
        longest = self._longest()
        if len(tokens) > longest:
            raise UnsupportedError(
                f"expected up to {longest} tokens, found {len(tokens)}; shorten the sentence"
            )
        return tokens

    def _longest(self) -> int:
        longest = self.max_positions
        return longest[0] if isinstance(longest, (tuple, list)) else longest

    def _build_batches(self, tokens: Sequence[Tensor], skip_invalid_size_inputs: bool) -> Any:
        longest = self._longest()
        found = max(map(len, tokens), default=0)
        if found > longest and not skip_invalid_size_inputs:
            raise UnsupportedError(f"expected up to {longest} tokens, found {found}; shorten the sentence")
        return super()._build_batches(tokens, skip_invalid_size_inputs)


def _config(parts: Mapping[str, Any], config: Any) -> Any:
    with open_dict(config):
        config.update(parts)
    return config
