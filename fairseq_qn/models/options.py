"""Which options of a model and its task a small file or a checkpoint may set: one table, for the writer and
the reader.

What is not in it never reaches fairseq, which evaluates some options as Python, opens others as files, and
lets OmegaConf put environment variables into any. An option that a table lacks is left out in silence: old
files hold every option of fairseq's, and most are of training. One that would make another model, and cannot
be rebuilt, is in the table as `Only`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fairseq_qn.artifact.header import short
from fairseq_qn.errors import FormatError, QNError
from fairseq_qn.models.option_types import (
    Cutoffs,
    Flag,
    Folder,
    Named,
    Number,
    Numerals,
    OneOf,
    Only,
    OptionType,
    RecipeText,
    Whole,
)

Refusal = Callable[[str], QNError]  # the message -> what is raised
DICTIONARIES = ("source_dictionary", "target_dictionary", "label_dictionary")
MAX_LAYERS = 256  # fairseq takes 3 ms and 50 kB to build one
MAX_SIZE = 1 << 16
MAX_HEADS = 256  # classification heads

_FLAG, _CHANCE, _SIZE, _POSITIONS = Flag(), Number(0, 1), Whole(1, MAX_SIZE), Whole(2, 1 << 20)
_ACTIVATION = OneOf(("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear"))
_EVERY = {
    "activation_fn": _ACTIVATION, "dropout": _CHANCE, "attention_dropout": _CHANCE,
    "activation_dropout": _CHANCE,
    "layernorm_embedding": _FLAG, "no_scale_embedding": _FLAG, "no_token_positional_embeddings": _FLAG,
}  # fmt: skip


def _stack(side: str) -> dict[str, OptionType]:
    return {
        f"{side}_layers": Whole(0, MAX_LAYERS), f"{side}_embed_dim": _SIZE, f"{side}_ffn_embed_dim": _SIZE,
        f"{side}_attention_heads": Whole(1, 256), f"{side}_layerdrop": _CHANCE,
        f"{side}_normalize_before": _FLAG,
        f"{side}_learned_pos": _FLAG, f"{side}_xformers_att_config": Only(None),
    }  # fmt: skip


_DECODER = {
    **_stack("decoder"), "decoder_input_dim": _SIZE, "decoder_output_dim": _SIZE,
    "no_decoder_final_norm": _FLAG,
    "share_decoder_input_output_embed": _FLAG, "max_target_positions": _POSITIONS,
    "adaptive_softmax_cutoff": Cutoffs(), "adaptive_softmax_dropout": _CHANCE,
    "adaptive_softmax_factor": Number(1, 64),
    "tie_adaptive_weights": _FLAG, "tie_adaptive_proj": _FLAG, "base_layers": Only(0),
}  # fmt: skip

MODELS: dict[str, dict[str, OptionType]] = {
    "qn_roberta": {
        **_EVERY, **_stack("encoder"), "max_positions": _POSITIONS, "pooler_activation_fn": _ACTIVATION,
        "pooler_dropout": _CHANCE, "untie_weights_roberta": _FLAG,
        "spectral_norm_classification_head": _FLAG,
        "layer_norm_eps": Number(0, 1),
    },
    "qn_transformer": {
        **_EVERY, **_stack("encoder"), **_DECODER, "max_source_positions": _POSITIONS,
        "share_all_embeddings": _FLAG,
        "merge_src_tgt_embed": _FLAG, "no_cross_attention": _FLAG, "cross_self_attention": _FLAG,
    },
    "qn_transformer_lm": {
        **_EVERY, **_DECODER, "tokens_per_sample": _POSITIONS, "add_bos_token": _FLAG,
        "character_embeddings": Only(False),
        "adaptive_input": _FLAG, "adaptive_input_factor": Number(1, 64), "adaptive_input_cutoff": Cutoffs(),
        "scale_fc": _FLAG, "scale_attn": _FLAG, "scale_heads": _FLAG, "scale_resids": _FLAG,
    },
}  # fmt: skip

TASKS: dict[str, dict[str, OptionType]] = {
    "qn_masked_lm": {"tokens_per_sample": _POSITIONS},
    "qn_sentence_prediction": {
        "num_classes": Whole(1, 1 << 20), "regression_target": _FLAG, "classification_head_name": Named(),
        "max_positions": _POSITIONS, "init_token": Whole(0, 1 << 30), "separator_token": Whole(0, 1 << 30),
    },
    "qn_language_modeling": {
        "tokens_per_sample": _POSITIONS, "max_target_positions": _POSITIONS, "add_bos_token": _FLAG,
        "output_dictionary_size": Whole(-1, 1 << 30),
    },
    "qn_translation": {
        "max_source_positions": _POSITIONS, "max_target_positions": _POSITIONS, "left_pad_source": _FLAG,
        "left_pad_target": _FLAG,
    },
}  # fmt: skip
NEEDED = {  # dictionaries
    "qn_masked_lm": ("source_dictionary",), "qn_language_modeling": ("source_dictionary",),
    "qn_sentence_prediction": ("source_dictionary", "label_dictionary"),
    "qn_translation": ("source_dictionary", "target_dictionary"),
}  # fmt: skip

# what a checkpoint may say beyond that: how it goes on training, and where its dictionaries are
CHECKPOINT_MODEL: dict[str, OptionType] = {
    "quant_noise_pq": _CHANCE, "quant_noise_pq_block_size": Whole(1, 4096), "quant_noise_scalar": _CHANCE,
    "encoder_layers_to_keep": Numerals(), "decoder_layers_to_keep": Numerals(), "quant_recipe": RecipeText(),
}  # fmt: skip
CHECKPOINT_TASK: dict[str, OptionType] = {
    "data": Folder(), "source_lang": Named(), "target_lang": Named(),
    "seed": Whole(-(1 << 63), (1 << 63) - 1),
    "quant_recipe": RecipeText(), "quant_stage_updates": Numerals(), "quant_stage_epochs": Numerals(),
    "quant_iterations": Whole(0, 1 << 20),
}  # fmt: skip

# option of each BPE that a file may carry -> the ending of its own file; then the options that are not files
BPE_FILES = {
    "sentencepiece": {"sentencepiece_model": ".model"},
    "gpt2": {"gpt2_encoder_json": ".json", "gpt2_vocab_bpe": (".bpe", ".txt")},
    "qn_wordpiece": {"wordpiece_vocab": ".txt"},
    "fastbpe": {"bpe_codes": ""},
    "subword_nmt": {"bpe_codes": ""},
}
BPES: dict[str, dict[str, OptionType]] = {
    "sentencepiece": {"sentencepiece_enable_sampling": _FLAG, "sentencepiece_alpha": _CHANCE},
    "gpt2": {},
    "qn_wordpiece": {"wordpiece_cased": _FLAG},
    "fastbpe": {},
    "subword_nmt": {"bpe_separator": OneOf(("@@", "@", "##", "\uffed", "\u2581"))},
}
_LANGUAGE = OneOf(
    tuple(
        "as bn ca cs de el en es et fi fr ga gu hi hu is it kn lt lv ml mni mr nl or pa pl pt ro ru sk sl "
        "sv ta tdt te yue zh".split()
    )
)
TOKENIZERS: dict[str, dict[str, OptionType]] = {
    "space": {},
    "nltk": {},
    "moses": {
        "source_lang": _LANGUAGE,
        "target_lang": _LANGUAGE,
        "moses_no_dash_splits": _FLAG,
        "moses_no_escape": _FLAG,
    },
}

# fairseq reads these from other groups of its configuration, which a small file does not hold
FALLBACKS = {
    "seed": 1, "tokens_per_sample": 1024, "max_target_positions": None, "add_bos_token": False, "tpu": False,
    "regression_target": False, "classification_head_name": "sentence_classification_head",
}  # fmt: skip


def take(
    table: Mapping[str, OptionType], values: Any, where: str, error: Refusal = FormatError
) -> dict[str, Any]:
    """The options that the table knows, checked; None is fairseq's default. Raises `error`, by name."""
    if not isinstance(values, Mapping):
        raise error(f"{where}: expected options by name, found {short(values)}")
    found = {}
    for name, allowed in table.items():
        value = values.get(name)
        if value is None:
            continue
        try:
            found[name] = allowed.read(value)
        except ValueError:
            raise error(f"{where}.{name}: expected {allowed}, found {short(value)}") from None
    return found


def one_of(choices: Iterable[str], value: Any, where: str, error: Refusal = FormatError) -> str:
    """The value, which has to be one of the choices."""
    choices = tuple(choices)
    if type(value) is not str or value not in choices:
        raise error(f"{where}: expected one of {', '.join(choices)}, found {short(value)}")
    return value


def check_layers(model: Mapping[str, Any], stored: Iterable[str], where: str) -> dict[str, Any]:
    """Raise FormatError for more layers than there are tensors of: each costs time and memory before it is
    compared.

    stored: names of the tensors, and of modules that were left out on purpose. Returns the options, with no
    layers in a stack that was left out.
    """
    stored = list(stored)
    numbers = {m[1] for m in (re.search(r"\.layers\.(\d+)(?:\.|$)", name) for name in stored) if m}
    result = dict(model)
    for option in {"encoder_layers", "decoder_layers"} & model.keys():
        stacks = [f"{option.removesuffix('_layers')}.{stem}layers." for stem in ("", "sentence_encoder.")]
        if any(stack.startswith(f"{name}.") for stack in stacks for name in stored):
            result[option] = 0
        elif model[option] > len(numbers):
            raise FormatError(
                f"{where}.{option}: expected up to {len(numbers)}, as tensors say, found {model[option]}"
            )
    return result
