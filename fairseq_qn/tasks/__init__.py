"""fairseq's tasks with quantisation noise and stages."""

from fairseq_qn.tasks import fairseq_tasks, wordpiece  # noqa: F401
