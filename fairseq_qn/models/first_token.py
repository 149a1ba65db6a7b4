"""RoBERTa's features of the first token alone, which is all that a classification head reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F


def first_token(encoder: Any, tokens: Tensor) -> Tensor:
    """Ids [batch, length] -> features [batch, 1, size] of each row's first token, in evaluation.

    encoder: fairseq's TransformerEncoder. Of its last layer only keys and values need the other tokens:
    the rest of it, most of its products, is computed for one token a row.
    """
    pads = tokens.eq(encoder.padding_idx)
    mask = pads if pads.any() else None
    x = encoder.forward_embedding(tokens)[0].masked_fill(pads.unsqueeze(-1), 0)
    x = x.transpose(0, 1)  # [length, batch, size]
    layers = list(encoder.layers)
    for layer in layers[:-1]:
        x = layer(x, encoder_padding_mask=mask)
    x = _first_of(layers[-1], x, mask) if layers else x[:1]
    if encoder.layer_norm is not None:
        x = encoder.layer_norm(x)
    return x.transpose(0, 1)


def _first_of(layer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """fairseq's TransformerEncoderLayer for the first token [1, batch, size]."""
    before = layer.normalize_before
    heard = _attended(layer.self_attn, layer.self_attn_layer_norm(x) if before else x, mask)
    x = x[:1] + heard
    x = x if before else layer.self_attn_layer_norm(x)
    read = layer.final_layer_norm(x) if before else x
    x = x + layer.fc2(layer.activation_fn(layer.fc1(read)))
    return x if before else layer.final_layer_norm(x)


def _attended(attention: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """fairseq's self-attention of the first token [1, batch, size]; its own takes keys from the query where
    weights are packed.
    """
    heads = lambda t: t.unflatten(-1, (attention.num_heads, -1)).permute(1, 2, 0, 3)  # noqa: E731
    q, k, v = heads(attention.q_proj(x[:1])), heads(attention.k_proj(x)), heads(attention.v_proj(x))
    seen = None if mask is None else ~mask[:, None, None]
    heard = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # [batch, heads, 1, size of a head]
    return attention.out_proj(heard.permute(2, 0, 1, 3).flatten(2))
