"""fairseq's tasks with quantisation noise and stages."""

from fairseq_qn.tasks import checkpoint_copies, fairseq_tasks, numpy2, wordpiece  # noqa: F401

checkpoint_copies.allow()
numpy2.allow()
