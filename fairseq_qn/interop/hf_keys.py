"""Aligned key map: Hugging Face BERT / RoBERTa on the left, fairseq `roberta` in the middle, shape on the
right.

Names are written without the leading `bert.` or `roberta.`, and `{i}` runs over the layers. Letters of a
shape: d hidden_size, f intermediate_size, v vocabulary, p positions, t token types, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass

ENC = "encoder.sentence_encoder."
LM = "encoder.lm_head."
HEAD = "classification_heads.sentence_classification_head."

# (Hugging Face, fairseq, shape of .weight, shape of .bias)
EMBEDDINGS = [
    ("embeddings.LayerNorm", ENC + "layernorm_embedding", "d", "d")
    # word, position and token-type tables are no plain copies: see hf.py
]
LAYER = [
    ("encoder.layer.{i}.attention.self.query", ENC + "layers.{i}.self_attn.q_proj", "dd", "d"),
    ("encoder.layer.{i}.attention.self.key", ENC + "layers.{i}.self_attn.k_proj", "dd", "d"),
    ("encoder.layer.{i}.attention.self.value", ENC + "layers.{i}.self_attn.v_proj", "dd", "d"),
    ("encoder.layer.{i}.attention.output.dense", ENC + "layers.{i}.self_attn.out_proj", "dd", "d"),
    ("encoder.layer.{i}.attention.output.LayerNorm", ENC + "layers.{i}.self_attn_layer_norm", "d", "d"),
    ("encoder.layer.{i}.intermediate.dense", ENC + "layers.{i}.fc1", "fd", "f"),
    ("encoder.layer.{i}.output.dense", ENC + "layers.{i}.fc2", "df", "d"),
    ("encoder.layer.{i}.output.LayerNorm", ENC + "layers.{i}.final_layer_norm", "d", "d"),
]
LM_HEAD = {
    "bert": [
        ("cls.predictions.transform.dense", LM + "dense", "dd", "d"),
        ("cls.predictions.transform.LayerNorm", LM + "layer_norm", "d", "d"),
    ],
    "roberta": [
        ("lm_head.dense", LM + "dense", "dd", "d"),
        ("lm_head.layer_norm", LM + "layer_norm", "d", "d"),
    ],
}
# per model type: names of the LM head's bias and of its projection, where that is stored and not just tied
LM_BIAS = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}
LM_WEIGHT = {"bert": "cls.predictions.decoder.weight", "roberta": "lm_head.decoder.weight"}
LM_DECODER_BIAS = {"bert": "cls.predictions.decoder.bias", "roberta": "lm_head.decoder.bias"}
# RoBERTa's classifier is fairseq's, layer for layer; BERT's second segment has another token type, so it is
# not mapped
CLASSIFIER = [
    ("classifier.dense", HEAD + "dense", "dd", "d"),
    ("classifier.out_proj", HEAD + "out_proj", "cd", "c"),
]

WORDS = "embeddings.word_embeddings.weight"
POSITIONS = "embeddings.position_embeddings.weight"
TYPES = "embeddings.token_type_embeddings.weight"
# without a place in fairseq's RoBERTa, and not needed by it; anything else left over below these prefixes is
# an error
IGNORED = ("embeddings.position_ids", "embeddings.token_type_ids")
BODY = ("embeddings.", "encoder.")


@dataclass(frozen=True)
class Entry:
    """One tensor: its Hugging Face name, its fairseq name, and its shape in the letters above."""

    source: str
    target: str
    shape: str


def entries(rows: list[tuple[str, str, str, str]], n_layers: int = 1) -> list[Entry]:
    """Expand rows of the tables above into one Entry per tensor, for layers 0 .. n_layers - 1."""
    found = []
    for i in range(n_layers):
        for source, target, weight, bias in rows:
            source_i, target_i = source.format(i=i), target.format(i=i)
            found.append(Entry(source_i + ".weight", target_i + ".weight", weight))
            found.append(Entry(source_i + ".bias", target_i + ".bias", bias))
    return found
