"""fairseq's tasks with quantisation noise and stages."""

import fairseq  # noqa: F401  (before any of ours: it makes plugin.py import them all)

from fairseq_qn.tasks import fairseq_tasks, image_classification, patches, wordpiece  # noqa: F401

patches.apply()
