"""A Hugging Face BERT or RoBERTa folder -> a fairseq `roberta` checkpoint, its dictionary and its vocabulary
files.

fairseq is not imported: its checkpoint is a dictionary of plain containers, one argparse.Namespace, and
tensors.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fairseq_qn.artifact.replacing import refuse_same, replacing
from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError
from fairseq_qn.interop import hf_keys as keys
from fairseq_qn.interop.hf_vocab import PADDING_IDX, Vocabulary, check_rows, read_json, read_vocabulary

Tensors = dict[str, torch.Tensor]
Take = Callable[[str, str], torch.Tensor]  # (Hugging Face name, letters of its shape) -> the tensor, checked

# Hugging Face's names of the activations that fairseq computes in the same way
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "relu": "relu",
}


@dataclass(frozen=True)
class ImportReport:
    """What `import_hf` wrote. `train_options` are the fairseq-train options that rebuild this architecture.

    lm_head: "mapped", or "identity" where the folder has none; unused: tensors without a place in fairseq's
    RoBERTa; dropped: vocabulary entries that no tokeniser can emit; lower_case: as tokenizer_config.json
    says, or None.
    """

    model_type: str
    checkpoint: Path
    files: tuple[Path, ...]
    n_parameters: int
    n_symbols: int
    layer_norm_eps: float
    lm_head: str
    unused: tuple[str, ...]
    dropped: tuple[str, ...]
    lower_case: bool | None
    train_options: tuple[str, ...]

    def __str__(self) -> str:
        absent = "absent from the folder; written as identity, to be trained"
        head = "mapped" if self.lm_head == "mapped" else absent
        lines = [
            f"{self.model_type} -> {self.checkpoint}: {self.n_parameters:,} parameters, {self.n_symbols:,} "
            "symbols",
            f"beside it: {', '.join(f.name for f in self.files)}",
            f"LayerNorm eps {self.layer_norm_eps:g} (qn_roberta keeps it or takes --layer-norm-eps; stock "
            "roberta has 1e-05)",
            f"masked-LM head: {head}",
            f"tensors without a place: {', '.join(self.unused) or 'none'}",
            f"vocabulary entries dropped: {len(self.dropped)}",
            f"fairseq-train options: {' '.join(self.train_options)}",
            "to fine-tune it on DATA of N classes; fairseq-qn compress then finds the BPE by itself:",
            f"  {self.command}",
        ]
        return "\n".join(lines)

    @property
    def command(self) -> str:
        """A fairseq-train command that fine-tunes it to classify; DATA and N are the user's."""
        width = int(self.train_options[self.train_options.index("--encoder-embed-dim") + 1])
        # of BERT's paper (Devlin et al. 2019); narrow models bear more
        lr = "2e-5" if width >= 768 else "5e-5"
        words = (
            'DATA --user-dir "$(fairseq-qn user-dir)" --task qn_sentence_prediction --arch qn_roberta',
            *self.train_options,
            f"--layer-norm-eps {self.layer_norm_eps:g}",
            f"--finetune-from-model {shlex.quote(str(self.checkpoint))}",
            "--num-classes N --init-token 0 --separator-token 2",
            "--criterion quantization_aware --wrapped-criterion sentence_prediction --batch-size 32",
            f"--optimizer adam --lr {lr} --lr-scheduler polynomial_decay --total-num-update 10000",
            "--warmup-updates 600 --max-update 10000 --max-epoch 5",
            "--best-checkpoint-metric accuracy --maximize-best-checkpoint-metric",
        )
        return f"fairseq-train {' '.join(words)}"


def import_hf(folder: str | Path, output: str | Path) -> ImportReport:
    """Turn the Hugging Face `folder` into the fairseq checkpoint `output`; dict.txt and vocabulary files go
    beside it.

    Post-norm BERT is fairseq's RoBERTa with token type 0 folded into the positions. Embedding rows are
    permuted to fairseq's dictionary. The padding row stays where a tied masked-LM head reads it;
    else no output depends on it, and it becomes zero as fairseq has it.

    Raises: FormatError (a file is missing or damaged), UnsupportedError (another kind of model, or `output`
        is one of the folder's files), MismatchError (a tensor is missing, unknown, or of another shape than
        config.json says).
    """
    folder, output = Path(folder), Path(output)
    refuse_same(output, *folder.glob("*.json"), *folder.glob("*.txt"), *folder.glob("*.safetensors"))
    config = read_json(folder / "config.json")
    _check_config(config, folder / "config.json")
    vocabulary = read_vocabulary(folder, config["model_type"])
    tensors = _read_tensors(folder)
    check_rows(vocabulary, config, folder)
    state, args, lm_head, unused = _convert(tensors, config, vocabulary, folder)
    tokenizer = folder / "tokenizer_config.json"
    lower_case = read_json(tokenizer).get("do_lower_case") if tokenizer.is_file() else None
    files = _write(output, state, args, vocabulary, cased=lower_case is False)
    return ImportReport(
        model_type=config["model_type"],
        checkpoint=output,
        files=files,
        n_parameters=sum(
            {t.data_ptr(): t.numel() for k, t in state.items() if not k.endswith("version")}.values()
        ),
        n_symbols=len(vocabulary.rows),
        layer_norm_eps=args.layer_norm_eps,
        lm_head=lm_head,
        unused=tuple(unused),
        dropped=tuple(vocabulary.dropped),
        lower_case=lower_case,
        train_options=_train_options(args),
    )


def _check_config(config: dict, where: Path) -> None:
    expected = {
        "model_type": ("bert", "roberta"),
        "hidden_act": tuple(ACTIVATIONS) if config.get("model_type") == "bert" else ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    # older and newer folders leave these three out
    absent = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
    config.update({**absent, **config})
    for name, allowed in expected.items():
        if config.get(name) not in allowed:
            raise UnsupportedError(
                f"{where}: expected {name} to be {' or '.join(map(str, allowed))}, found "
                f"{config.get(name)}; only encoders that fairseq's roberta can express are imported"
            )
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "max_position_embeddings", "type_vocab_size")  # fmt: skip
    for name in sizes:
        if type(config.get(name)) is not int or config[name] < 1:
            raise FormatError(f"{where}: expected a positive integer {name}, found {config.get(name)}")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise FormatError(
            f"{where}: expected hidden_size {config['hidden_size']} to be a multiple of "
            f"num_attention_heads, found {config['num_attention_heads']}"
        )


def _read_tensors(folder: Path) -> Tensors:
    path = folder / "model.safetensors"
    if not path.is_file():
        if (folder / "pytorch_model.bin").is_file():
            raise UnsupportedError(
                f"{folder}: expected model.safetensors, found pytorch_model.bin, a pickle, which can run "
                "code; convert it where you trust it: transformers' save_pretrained writes safetensors"
            )
        raise FormatError(
            f"{path}: expected one file of weights, found none (sharded folders: save them as one file)"
        )
    try:
        with safe_open(path, framework="pt") as f:
            tensors = {_plain_name(name): f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as e:
        raise FormatError(f"{path}: expected a safetensors file, found a damaged one ({e})") from e
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _plain_name(name: str) -> str:
    name = name.removeprefix("bert.").removeprefix("roberta.")
    # folders converted from TensorFlow, bert-base-uncased among them, keep its names for LayerNorm
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _convert(
    tensors: Tensors, config: dict, vocabulary: Vocabulary, folder: Path
) -> tuple[Tensors, Namespace, str, list[str]]:
    left = dict(tensors)
    sizes = {
        "d": config["hidden_size"],
        "f": config["intermediate_size"],
        "v": config["vocab_size"],
        "p": config["max_position_embeddings"],
        "t": config["type_vocab_size"],
    }

    def take(name: str, shape: str) -> torch.Tensor:
        if name not in left:
            raise MismatchError(
                f"{folder}: expected the tensor {name}, found none; config.json is of another model"
            )
        found = list(left[name].shape)
        # `c` is in no config: the first seen
        expected = [sizes.setdefault(c, found[0] if found else 0) for c in shape]
        if found != expected:
            raise MismatchError(
                f"{folder}: expected {name} to be of shape {expected} by config.json, found {found}"
            )
        return left.pop(name)

    body = keys.entries(keys.EMBEDDINGS) + keys.entries(keys.LAYER, config["num_hidden_layers"])
    state = {entry.target: take(entry.source, entry.shape) for entry in body}
    state[keys.ENC + "version"] = torch.tensor([3.0])
    state[keys.ENC + "embed_tokens.weight"] = words = _permute(take(keys.WORDS, "vd"), vocabulary)
    # a padding position of RoBERTa shifts real ones to pad + 1; BERT counts from 0. fairseq: from
    # padding_idx + 1
    first = vocabulary.pad + 1 if config["model_type"] == "roberta" else 0
    positions = (take(keys.POSITIONS, "pd") + take(keys.TYPES, "td")[0])[first:]
    unused_rows = positions.new_zeros(PADDING_IDX + 1, sizes["d"])
    state[keys.ENC + "embed_positions.weight"] = torch.cat([unused_rows, positions])
    lm_head, untied = _lm_head(state, take, left, config, vocabulary, words)
    if config["model_type"] == "roberta" and "classifier.out_proj.weight" in left:
        state.update({e.target: take(e.source, e.shape) for e in keys.entries(keys.CLASSIFIER)})
    unknown = [name for name in left if name.startswith(keys.BODY) and name not in keys.IGNORED]
    if unknown:
        found = ", ".join(unknown[:4])
        raise MismatchError(f"{folder}: expected no tensor beyond config.json's architecture, found {found}")
    args = _namespace(config, len(positions), untied)
    return state, args, lm_head, sorted(name for name in left if name not in keys.IGNORED)


def _permute(table: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    return table[torch.tensor(vocabulary.rows)]  # [v, ...] -> [len(dictionary), ...]


def _lm_head(
    state: Tensors, take: Take, left: Tensors, config: dict, vocabulary: Vocabulary, words: torch.Tensor
) -> tuple[str, bool]:
    """Fill the masked-LM head of `state`; returns how, and whether its projection is untied."""
    kind = config["model_type"]
    state[keys.LM + "weight"] = words  # the same tensor: torch.save stores it once
    if keys.LM_BIAS[kind] not in left:
        words[PADDING_IDX] = 0
        state.update(identity_head(words))
        return "identity", False
    state.update({e.target: take(e.source, e.shape) for e in keys.entries(keys.LM_HEAD[kind])})
    bias = take(keys.LM_BIAS[kind], "v")
    if keys.LM_DECODER_BIAS[kind] in left:  # the one that is read; the same where the head is tied
        bias = take(keys.LM_DECODER_BIAS[kind], "v")
    state[keys.LM + "bias"] = _permute(bias, vocabulary)
    if keys.LM_WEIGHT[kind] not in left:
        return "mapped", False
    projection = _permute(take(keys.LM_WEIGHT[kind], "vd"), vocabulary)
    if torch.equal(projection, words):
        return "mapped", False
    words[PADDING_IDX] = 0
    state[keys.LM + "weight"] = projection
    return "mapped", True


def identity_head(words: torch.Tensor) -> Tensors:
    """A masked-LM head over words [v, d] that changes nothing: fairseq restores no checkpoint without."""
    rows, d = words.shape
    parts = {
        "weight": words, "bias": torch.zeros(rows), "dense.weight": torch.eye(d),
        "dense.bias": torch.zeros(d), "layer_norm.weight": torch.ones(d), "layer_norm.bias": torch.zeros(d),
    }  # fmt: skip
    return {keys.LM + name: tensor for name, tensor in parts.items()}


def checkpoint_of(args: Namespace, weights: Tensors) -> dict[str, Any]:
    """What fairseq restores: a checkpoint before the first update."""
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    extra = {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}}
    return {"args": args, "model": weights, "optimizer_history": [history], "extra_state": extra}


def options_of(args: Any, names: Iterable[str]) -> list[str]:
    """Options that are set as the words of a command line."""
    given = ((name, getattr(args, name, None)) for name in names)
    return [
        word
        for name, value in given
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def _namespace(config: dict, max_positions: int, untied: bool) -> Namespace:
    """The training arguments that fairseq rebuilds the model from."""
    return Namespace(
        arch="roberta",
        task="masked_lm",
        criterion="masked_lm",
        data=".",
        encoder_layers=config["num_hidden_layers"],
        encoder_embed_dim=config["hidden_size"],
        encoder_ffn_embed_dim=config["intermediate_size"],
        encoder_attention_heads=config["num_attention_heads"],
        activation_fn=ACTIVATIONS[config["hidden_act"]],
        pooler_activation_fn="tanh",
        dropout=float(config.get("hidden_dropout_prob", 0.1)),
        attention_dropout=float(config.get("attention_probs_dropout_prob", 0.1)),
        activation_dropout=0.0,
        pooler_dropout=0.0,
        max_positions=max_positions,
        tokens_per_sample=max_positions,
        untie_weights_roberta=untied,
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-12)),
    )


def _train_options(args: Namespace) -> tuple[str, ...]:
    sizes = "encoder_layers encoder_embed_dim encoder_ffn_embed_dim encoder_attention_heads"
    names = [*sizes.split(), "activation_fn", "max_positions"]
    return (
        *options_of(args, names),
        *(["--untie-weights-roberta"] if args.untie_weights_roberta else []),
    )


def _write(
    output: Path, state: Tensors, args: Namespace, vocabulary: Vocabulary, cased: bool
) -> tuple[Path, ...]:
    folder = output.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"dict.txt": vocabulary.dict_text(), **vocabulary.files}
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    if "encoder.json" in texts:
        # without these fairseq would take its own GPT-2 files, whose ids are others than this dictionary's
        args.bpe, options = "gpt2", {}
        named = {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"}
    else:
        args.bpe, options = "qn_wordpiece", {"wordpiece_cased": cased}
        named = {"wordpiece_vocab": "vocab.txt"}
    vars(args).update(options, **{option: str(folder / name) for option, name in named.items()})
    inside = {option: f"asset:{name}" for option, name in named.items()}
    # so that `compress` finds the BPE wherever the checkpoint is moved to
    text = {"bpe": {"_name": args.bpe, **options, **inside}, "files": dict(vocabulary.files)}
    with replacing(output) as file:
        torch.save({**checkpoint_of(args, state), "qn_text": text}, file)
    return tuple(folder / name for name in texts)
