"""Linear layers of other libraries over our codes: the same decoded weight, in their own layout and by their
own kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def aqlm_linear(codes: Tensor, codebook: Tensor, bias: Tensor | None) -> nn.Module:
    """aqlm's 1x8 layer, groups of d; its CPU kernel (numba). A block size other than 8 works the same
    way.
    """
    from aqlm import QuantizedLinear

    (out, groups), (k, d) = codes.shape, codebook.shape
    layer = QuantizedLinear(groups * d, out, d, 1, 1, 8, bias=bias is not None)
    codebooks = torch.zeros(1, 256, 1, d)
    codebooks[0, :k, 0] = codebook
    layer.codebooks.data, layer.scales.data = codebooks, torch.ones(out, 1, 1, 1)
    layer.codes.data = codes.view(torch.int8).unsqueeze(-1).clone()
    if bias is not None:
        layer.bias.data = bias.clone()
    return layer


def fairseq_linear(codes: Tensor, codebook: Tensor, bias: Tensor | None) -> nn.Module:
    """fairseq's PQLinear, which decodes the weight at each call. Its assignments run over column blocks
    first, as int64.
    """
    from fairseq.modules.quantization.pq.modules import PQLinear

    (out, groups), d = codes.shape, codebook.shape[1]
    return PQLinear(codebook.clone(), codes.long().t().flatten(), bias, groups * d, out)


def dynamic_int8(model: nn.Module) -> nn.Module:
    """torch's dynamic quantisation of all Linears; the LM head's product with the table stays dense."""
    return calling(
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)
    )


def calling(model: nn.Module) -> nn.Module:
    """`model`, whose attention calls its projections instead of reading their weights past them."""
    for layer in model.encoder.sentence_encoder.layers:
        layer.self_attn._set_skip_embed_dim_check()
    return model


def replaced(model: nn.Module, packed: nn.Module, make: Callable[..., nn.Module]) -> nn.Module:
    """`model` with each Linear that `packed` holds as codes, attention's too, and the LM head's product made
    by `make`.
    """
    for name, module in packed.named_modules():
        if hasattr(module, "codes") and isinstance(module, nn.Linear):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, make(module.codes, module.codebook, module.bias))
    table, head = packed.encoder.sentence_encoder.embed_tokens, model.encoder.lm_head
    head.weight = None
    project = make(table.codes, table.codebook, head.bias.detach())

    def forward(features: Tensor, masked_tokens: Tensor | None = None, **_: object) -> Tensor:
        return project(head.layer_norm(head.activation_fn(head.dense(features))))

    head.forward = forward
    return calling(model)
