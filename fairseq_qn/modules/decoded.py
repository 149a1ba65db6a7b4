"""The weights that a network reads, under the names of an ordinary model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.activations import range_keys
from fairseq_qn.modules.packed import Packed
from fairseq_qn.modules.view import FROZEN, views_of


@torch.no_grad()
def decoded_state_dict(model: nn.Module) -> dict[str, Any]:
    """A state dict that loads strictly into a plain dense instance, which then answers as this model does.

    `model.state_dict()` holds the dense Parameters that training goes on with, and the codes. Here a frozen
    layer has the weight that is read in its place, what is not frozen its Parameter, and tied names one and
    the same tensor.
    Raises UnsupportedError for a packed model, which has no other weights: load its file with mode="dense".
    """
    if any(isinstance(module, Packed) for module in model.modules()):
        raise UnsupportedError('decoded_state_dict: the model is packed; load its file with mode="dense"')
    views = list(views_of(model))
    read: dict[int, Any] = {id(v.weight): v.quantized() for v in views if v.phase == FROZEN}
    own = {id(v.home._buffers.get(name, v.home._parameters.get(name))) for v in views for name in v.names}
    ranges, state = range_keys(model), model.state_dict(keep_vars=True)
    kept = {key: value for key, value in state.items() if id(value) not in own and key not in ranges}
    for value in kept.values():
        read.setdefault(id(value), value.detach() if isinstance(value, Tensor) else value)
    return {key: read[id(value)] for key, value in kept.items()}
