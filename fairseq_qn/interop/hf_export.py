"""A fairseq `roberta` -> a Hugging Face folder: hf.py the other way round, by the same map of names.

What the folder answers is what the model here answers; token types, which fairseq's RoBERTa has folded into
its positions, are zeros.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fairseq_qn.artifact.replacing import replacing
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.interop import hf_keys as keys
from fairseq_qn.interop.hf import ACTIVATIONS
from fairseq_qn.interop.hf_vocab import (
    FIRST,
    MASK,
    PADDING_IDX,
    Vocabulary,
    gpt2_vocabulary,
    read_json,
    read_vocabulary,
    wordpiece_vocabulary,
)

# of all that fairseq's roberta can be, what transformers' BERT and RoBERTa can
_ONLY = {
    "encoder_normalize_before": False, "layernorm_embedding": True, "encoder_learned_pos": True,
    "no_token_positional_embeddings": False, "spectral_norm_classification_head": False,
    "pooler_activation_fn": "tanh",
}  # fmt: skip
_TOKENIZER_FILES = (
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_TASKS = {"": "Model", "lm": "ForMaskedLM", "head": "ForSequenceClassification"}
_CLASS = {"bert": "Bert", "roberta": "Roberta"}
_HEADS = {
    "roberta": keys.CLASSIFIER,
    "bert": [  # its pooler and classifier are fairseq's head
        ("pooler.dense", keys.HEAD + "dense", "dd", "d"),
        ("classifier", keys.HEAD + "out_proj", "cd", "c"),
    ],
}


@dataclass(frozen=True)
class ExportReport:
    """What `export_hf` wrote. architecture: the class of transformers that reads all of it; left_out: what
    that class has no place for.
    """

    folder: Path
    architecture: str
    files: tuple[str, ...]
    n_parameters: int
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        left = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return (
            f"{self.folder}: {self.architecture}, {self.n_parameters:,} parameters in fp32{left}\n"
            f"files: {', '.join(self.files)}"
        )


def export_hf(
    state: Mapping[str, Tensor],
    source: Mapping[str, Any],
    assets: Mapping[str, bytes],
    output: str | Path,
    config: str | Path | None = None,
) -> ExportReport:
    """Write a fairseq `roberta` as the Hugging Face folder `output`.

    state: its decoded weights. source, assets: as its small file has them: options, dictionary, and the BPE
    unless `config` is given, a Hugging Face folder (the one that was imported) whose tokeniser files and
    other lines of config.json are taken over.
    Raises UnsupportedError (no BERT or RoBERTa, no vocabulary), MismatchError (the folder is of another).
    """
    output, options = Path(output), source["model"]
    _check_options(options)
    base, vocabulary, texts = _from_folder(Path(config)) if config else _from_assets(source, assets)
    if config and Path(config).resolve() == output.resolve():
        raise UnsupportedError(f"{output}: is the folder of --config; choose another output")
    kind = base["model_type"]
    tensors, architecture, left_out = _tensors(dict(state), _symbols(source, assets), vocabulary, base)
    lines = _config_lines(options, tensors, vocabulary, kind)
    lines |= {"architectures": [architecture], **_labels(source, assets, tensors)}
    texts["config.json"] = json.dumps({**base, **lines}, indent=2, sort_keys=True).encode()
    texts["model.safetensors"] = save(tensors, {"format": "pt"})
    output.mkdir(parents=True, exist_ok=True)
    for name, data in texts.items():
        with replacing(output / name) as file:
            file.write(data)
    count = sum(t.numel() for t in tensors.values())
    return ExportReport(output, architecture, tuple(sorted(texts)), count, tuple(left_out))


def _check_options(options: Mapping[str, Any]) -> None:
    if "roberta" not in str(options["_name"]):
        raise UnsupportedError(f"export-hf: expected a qn_roberta, found {options['_name']}")
    for name, value in _ONLY.items():
        if options.get(name, value) != value:
            raise UnsupportedError(
                f"export-hf: expected {name} {value}, which BERT and RoBERTa have, found {options[name]}"
            )


def _from_folder(folder: Path) -> tuple[dict, Vocabulary, dict[str, bytes]]:
    base = read_json(folder / "config.json")
    if base.get("model_type") not in _CLASS:
        raise UnsupportedError(
            f"{folder}: expected model_type bert or roberta, found {base.get('model_type')}"
        )
    files = {name: (folder / name).read_bytes() for name in _TOKENIZER_FILES if (folder / name).is_file()}
    return base, read_vocabulary(folder, base["model_type"]), files


def _from_assets(source: Mapping[str, Any], assets: Mapping[str, bytes]) -> tuple[dict, Vocabulary, dict]:
    bpe = source.get("bpe") or {}
    if bpe.get("_name") not in ("qn_wordpiece", "gpt2"):
        raise UnsupportedError(
            "export-hf: expected the BPE qn_wordpiece or gpt2 inside, found "
            f"{bpe.get('_name') or 'none'}; give the imported folder with --config"
        )

    def text(option: str) -> str:
        return assets[bpe[option].removeprefix("asset:")].decode()

    if bpe["_name"] == "gpt2":
        vocab, merges = text("gpt2_encoder_json"), text("gpt2_vocab_bpe")
        files = {"vocab.json": vocab.encode(), "merges.txt": merges.encode()}
        vocabulary, kind, tokenizer = gpt2_vocabulary(vocab, merges, Path("encoder.json")), "roberta", {}
    else:
        files = {"vocab.txt": text("wordpiece_vocab").encode()}
        vocabulary, kind = wordpiece_vocabulary(text("wordpiece_vocab"), Path("vocab.txt")), "bert"
        tokenizer = {"do_lower_case": not bpe.get("wordpiece_cased", False)}
    tokenizer["tokenizer_class"] = f"{_CLASS[kind]}Tokenizer"
    return (
        {"model_type": kind},
        vocabulary,
        {**files, "tokenizer_config.json": json.dumps(tokenizer).encode()},
    )


def _symbols(source: Mapping[str, Any], assets: Mapping[str, bytes]) -> dict[str, int]:
    """symbol -> row of fairseq's table."""
    name = source["dictionaries"]["source_dictionary"]
    return {symbol: i for i, symbol in enumerate(json.loads(assets[f"{name}.json"])["symbols"])}


def _table(
    symbols: Mapping[str, int], vocabulary: Vocabulary, vocab_size: int
) -> Callable[[Tensor, float], Tensor]:
    """Rows in fairseq's order, and what a row without a counterpart holds -> rows in Hugging Face's."""
    names = (*FIRST, *vocabulary.symbols, MASK)
    if missing := [symbol for symbol in names if symbol not in symbols]:
        raise MismatchError(
            f"export-hf: expected the model's vocabulary, found {missing[0]!r} in it, which the model's "
            "dictionary has not; give the folder that was imported"
        )
    order, rows = torch.tensor([symbols[symbol] for symbol in names]), torch.tensor(vocabulary.rows)
    count = max(vocab_size, int(rows.max()) + 1)

    def turned(table: Tensor, fill: float) -> Tensor:
        result = torch.full((count, *table.shape[1:]), fill)
        result[rows] = table[order].float()
        return result

    return turned


def _tensors(
    left: dict[str, Tensor], symbols: Mapping[str, int], vocabulary: Vocabulary, base: Mapping[str, Any]
) -> tuple[dict[str, Tensor], str, list[str]]:
    """(tensors by Hugging Face's names, class, what it has no place for)."""
    kind = base["model_type"]
    turned = _table(symbols, vocabulary, base.get("vocab_size", 0))
    heads = list(dict.fromkeys(key.split(".")[1] for key in left if key.startswith("classification_heads.")))
    words = left[keys.ENC + "embed_tokens.weight"]
    body = _body(left, turned, vocabulary, base)
    lm = {key: left.pop(key) for key in [*left] if key.startswith(keys.LM)}
    outer: dict[str, Tensor] = {}
    task, left_out = "", []
    if heads:
        task, prefix = "head", f"classification_heads.{heads[0]}."
        head = {key.replace(prefix, keys.HEAD): left.pop(key) for key in [*left] if key.startswith(prefix)}
        outer = {e.source: head[e.target] for e in keys.entries(_HEADS[kind])}
        left_out = [*(["encoder.lm_head"] if lm else []), *(f"classification_heads.{h}" for h in heads[1:])]
        left = {key: t for key, t in left.items() if not key.startswith("classification_heads.")}
    elif lm and not torch.equal(lm[keys.LM + "dense.weight"], torch.eye(words.shape[1])):
        task, outer = "lm", _lm_head(lm, words, turned, kind)
    if left:
        raise UnsupportedError(f"export-hf: {min(left)}: no place for it in a {_CLASS[kind]}Model")
    stem = f"{kind}." if task else ""
    tensors = {stem + name: tensor for name, tensor in body.items()}
    tensors |= {stem + name if name.startswith("pooler") else name: t for name, t in outer.items()}
    tensors = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    return tensors, _CLASS[kind] + _TASKS[task], left_out


def _body(
    left: dict[str, Tensor],
    turned: Callable[[Tensor, float], Tensor],
    vocabulary: Vocabulary,
    base: Mapping[str, Any],
) -> dict[str, Tensor]:
    """All that stands below the heads, taken out of `left`."""
    is_bert = base["model_type"] == "bert"
    n_layers = 1 + max(int(key.split(".")[3]) for key in left if key.startswith(keys.ENC + "layers."))
    rows = keys.entries(keys.EMBEDDINGS) + keys.entries(keys.LAYER, n_layers)
    found = {entry.source: left.pop(entry.target) for entry in rows}
    found[keys.WORDS] = turned(left.pop(keys.ENC + "embed_tokens.weight"), 0.0)
    positions = left.pop(keys.ENC + "embed_positions.weight")[PADDING_IDX + 1 :]
    d = positions.shape[1]
    # see hf.py: RoBERTa's positions begin behind that of its padding
    unused = positions.new_zeros(0 if is_bert else vocabulary.pad + 1, d)
    found[keys.POSITIONS] = torch.cat([unused, positions])
    found[keys.TYPES] = positions.new_zeros(base.get("type_vocab_size", 2 if is_bert else 1), d)
    left.pop(keys.ENC + "version", None)
    return found


def _lm_head(
    lm: Mapping[str, Tensor], words: Tensor, turned: Callable[[Tensor, float], Tensor], kind: str
) -> dict[str, Tensor]:
    """The masked-LM head. Tokens that the model never knew are as unlikely as its bias makes any."""
    found = {e.source: lm[e.target] for e in keys.entries(keys.LM_HEAD[kind])}
    bias = lm[keys.LM + "bias"]
    found[keys.LM_BIAS[kind]] = found[keys.LM_DECODER_BIAS[kind]] = turned(bias, float(bias.min()))
    if not torch.equal(lm[keys.LM + "weight"], words):
        found[keys.LM_WEIGHT[kind]] = turned(lm[keys.LM + "weight"], 0.0)
    return found


def _config_lines(
    options: Mapping[str, Any], tensors: Mapping[str, Tensor], vocabulary: Vocabulary, kind: str
) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        return next(tuple(t.shape) for key, t in tensors.items() if key.endswith(name))

    activation = options.get("activation_fn", "gelu")
    names = {own: hf for hf, own in ACTIVATIONS.items() if hf != "gelu_pytorch_tanh"}
    if activation not in (names if kind == "bert" else ("gelu",)):
        raise UnsupportedError(f"export-hf: activation_fn {activation}: transformers' {kind} has no such")
    n_layers = sum(key.endswith("intermediate.dense.weight") for key in tensors)
    intermediate = shape("intermediate.dense.weight")
    specials = {}
    if kind == "roberta":
        specials = {"bos_token_id": vocabulary.rows[0], "eos_token_id": vocabulary.rows[2]}
    return {
        "hidden_size": intermediate[1], "intermediate_size": intermediate[0], "num_hidden_layers": n_layers,
        "num_attention_heads": options["encoder_attention_heads"], "hidden_act": names[activation],
        "vocab_size": shape(keys.WORDS)[0], "max_position_embeddings": shape(keys.POSITIONS)[0],
        "type_vocab_size": shape(keys.TYPES)[0], "layer_norm_eps": options.get("layer_norm_eps") or 1e-5,
        "hidden_dropout_prob": options.get("dropout", 0.1), "pad_token_id": vocabulary.pad,
        "attention_probs_dropout_prob": options.get("attention_dropout", 0.1), **specials,
        "tie_word_embeddings": keys.LM_WEIGHT[kind] not in tensors, "dtype": "float32",
    }  # fmt: skip


def _labels(
    source: Mapping[str, Any], assets: Mapping[str, bytes], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """id2label and label2id of the head, by name where the dictionary has them."""
    ends = ("classifier.weight", "classifier.out_proj.weight")
    last = next((t for key, t in tensors.items() if key in ends), None)
    if last is None:
        return {}
    name, names = source["dictionaries"].get("label_dictionary"), []
    if name:
        data = json.loads(assets[f"{name}.json"])
        names = [
            s
            for s in data["symbols"][data["nspecial"] :]
            if s != MASK and not re.fullmatch(r"madeupword\d{4,}", s)
        ]
    if len(names) != len(last):
        names = [f"LABEL_{i}" for i in range(len(last))]
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
