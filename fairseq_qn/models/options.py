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

from fairseq_qn.errors import FormatError, QNError, short
from fairseq_qn.models.option_types import (
    FLAG,
    FOLDER,
    NAMED,
    NUMERALS,
    Cutoffs,
    Number,
    OptionType,
    RecipeText,
    one_word,
    only,
    whole,
)  # fmt: skip

Refusal = Callable[[str], QNError]  # the message -> what is raised
DICTIONARIES = ("source_dictionary", "target_dictionary", "label_dictionary")
MAX_LAYERS = 256  # fairseq takes 3 ms and 50 kB to build one
MAX_SIZE = 1 << 16
MAX_HEADS = 256  # classification heads

_CHANCE, _SIZE, _POSITIONS, _INDEX = Number(0, 1), whole(1, MAX_SIZE), whole(2, 1 << 20), whole(0, 1 << 30)
_ACTIVATION = one_word(("relu", "gelu", "gelu_fast", "gelu_accurate", "tanh", "linear"))


def _each(names: str, kind: OptionType) -> dict[str, OptionType]:
    return dict.fromkeys(names.split(), kind)


_EVERY = {
    "activation_fn": _ACTIVATION, **_each("dropout attention_dropout activation_dropout", _CHANCE),
    **_each("layernorm_embedding no_scale_embedding no_token_positional_embeddings", FLAG),
}  # fmt: skip


def _stack(side: str) -> dict[str, OptionType]:
    kinds = {
        "layers": whole(0, MAX_LAYERS), "attention_heads": whole(1, 256), "layerdrop": _CHANCE,
        **_each("embed_dim ffn_embed_dim", _SIZE), **_each("normalize_before learned_pos", FLAG),
        "xformers_att_config": only(None),
    }  # fmt: skip
    return {f"{side}_{name}": kind for name, kind in kinds.items()}


_DECODER = {
    **_stack("decoder"), **_each("decoder_input_dim decoder_output_dim", _SIZE),
    **_each("no_decoder_final_norm share_decoder_input_output_embed", FLAG),
    "max_target_positions": _POSITIONS, "base_layers": only(0),
    **_each("tie_adaptive_weights tie_adaptive_proj", FLAG), "adaptive_softmax_cutoff": Cutoffs(),
    "adaptive_softmax_dropout": _CHANCE, "adaptive_softmax_factor": Number(1, 64),
}  # fmt: skip

MODELS: dict[str, dict[str, OptionType]] = {
    "qn_roberta": {
        **_EVERY, **_stack("encoder"), "max_positions": _POSITIONS, "pooler_activation_fn": _ACTIVATION,
        "pooler_dropout": _CHANCE, **_each("untie_weights_roberta spectral_norm_classification_head", FLAG),
        "layer_norm_eps": Number(0, 1),
    },
    "qn_transformer": {
        **_EVERY, **_stack("encoder"), **_DECODER, "max_source_positions": _POSITIONS,
        **_each("share_all_embeddings merge_src_tgt_embed no_cross_attention cross_self_attention", FLAG),
    },
    "qn_transformer_lm": {
        **_EVERY, **_DECODER, "tokens_per_sample": _POSITIONS, "character_embeddings": only(False),
        **_each("add_bos_token adaptive_input scale_fc scale_attn scale_heads scale_resids", FLAG),
        "adaptive_input_factor": Number(1, 64), "adaptive_input_cutoff": Cutoffs(),
    },
    "qn_efficientnet": {
        **_each("width depth", Number(0.01, 4)), **_each("dropout stochastic_depth norm_momentum", _CHANCE),
    },
}  # fmt: skip

TASKS: dict[str, dict[str, OptionType]] = {
    "qn_masked_lm": {"tokens_per_sample": _POSITIONS},
    "qn_sentence_prediction": {
        "num_classes": whole(1, 1 << 20), "regression_target": FLAG, "classification_head_name": NAMED,
        "max_positions": _POSITIONS, **_each("init_token separator_token", _INDEX),
    },
    "qn_language_modeling": {
        **_each("tokens_per_sample max_target_positions", _POSITIONS), "add_bos_token": FLAG,
        "output_dictionary_size": whole(-1, 1 << 30),
    },
    "qn_translation": {
        **_each("max_source_positions max_target_positions", _POSITIONS),
        **_each("left_pad_source left_pad_target", FLAG),
    },
    "qn_image_classification": {
        "num_classes": whole(1, 1 << 20), "image_size": whole(1, 1 << 12), "image_channels": whole(1, 4),
    },
}  # fmt: skip
NEEDED = {  # dictionaries
    "qn_masked_lm": ("source_dictionary",), "qn_language_modeling": ("source_dictionary",),
    "qn_sentence_prediction": ("source_dictionary", "label_dictionary"),
    "qn_translation": ("source_dictionary", "target_dictionary"), "qn_image_classification": (),
}  # fmt: skip

# what a checkpoint may say beyond that: how it goes on training, and where its dictionaries are
CHECKPOINT_MODEL: dict[str, OptionType] = {
    **_each("quant_noise_pq quant_noise_scalar", _CHANCE), "quant_noise_pq_block_size": whole(1, 4096),
    **_each("encoder_layers_to_keep decoder_layers_to_keep", NUMERALS), "quant_recipe": RecipeText(),
}  # fmt: skip
CHECKPOINT_TASK: dict[str, OptionType] = {
    "data": FOLDER, **_each("source_lang target_lang", NAMED), "seed": whole(-(1 << 63), (1 << 63) - 1),
    **_each("quant_stage_updates quant_stage_epochs", NUMERALS), "quant_recipe": RecipeText(),
    "quant_iterations": whole(0, 1 << 20),
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
    "sentencepiece": {"sentencepiece_enable_sampling": FLAG, "sentencepiece_alpha": _CHANCE},
    "gpt2": {},
    "qn_wordpiece": {"wordpiece_cased": FLAG},
    "fastbpe": {},
    "subword_nmt": {"bpe_separator": one_word(("@@", "@", "##", "\uffed", "\u2581"))},
}
_LANGUAGE = one_word(
    tuple(
        "as bn ca cs de el en es et fi fr ga gu hi hu is it kn lt lv ml mni mr nl or pa pl pt ro ru sk sl "
        "sv ta tdt te yue zh".split()
    )
)
TOKENIZERS: dict[str, dict[str, OptionType]] = {
    "space": {},
    "nltk": {},
    "moses": {
        **_each("source_lang target_lang", _LANGUAGE),
        **_each("moses_no_dash_splits moses_no_escape", FLAG),
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
