"""fairseq's language models under numpy 2, which has no np.compat.long."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from fairseq.data import language_pair_dataset, token_block_dataset


class _Numpy(ModuleType):
    """numpy with its former `compat`, for the modules that ask for it; numpy itself stays as it is."""

    compat = SimpleNamespace(long=np.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def allow() -> None:
    """Give fairseq the name back, where numpy lacks it."""
    if not hasattr(np, "compat"):
        for module in (language_pair_dataset, token_block_dataset):
            module.np = _Numpy("numpy")
