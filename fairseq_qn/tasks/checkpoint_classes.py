"""Let torch's safe loading restore fairseq's checkpoints: the classes that they hold, no others."""

from __future__ import annotations

from argparse import Namespace

import numpy as np
import torch


def allow() -> None:
    """The options, a Namespace; meters and scores, numpy scalars. None runs code."""
    add = getattr(torch.serialization, "add_safe_globals", None)
    if add is None:  # torch < 2.4 has no such list; load_checkpoint says so
        return
    # numpy's own constructor of scalars, wherever this numpy keeps it
    scalar = np.float64(0).__reduce__()[0]
    add(
        [
            Namespace,
            scalar,
            np.dtype,
            *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.bool_)),
        ]
    )
