"""fairseq's tasks with quantisation noise and stages."""

import fairseq  # noqa: F401  (before any of ours: it makes plugin.py import them all)

from fairseq_qn.tasks import checkpoint_copies, fairseq_tasks, numpy2, wordpiece  # noqa: F401

checkpoint_copies.allow()
numpy2.allow()
