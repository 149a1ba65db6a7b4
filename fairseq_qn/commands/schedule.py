"""How long to train, and how fast, for so many sentences: arithmetic, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

BATCH = 32  # sentences; what RoBERTa (Liu et al. 2019) and iPQ's published runs on GLUE use, or 16
BATCH_TOKENS = 8192  # of an update at most, padding too: 32 sentences of 256 tokens

# Learning rate of Adam by the encoder's width, since wider models bear less. 256: the quickstart's, of a
# model that has seen little; 384: minilm_mnli's (MiniLM on 8,999 pairs); 768 and 1024: RoBERTa-base and
# RoBERTa-large on GLUE (Liu et al. 2019: 1e-5 to 3e-5), and iPQ's published 2e-5 for its centroids.
RATES = ((256, 5e-4), (512, 1e-4), (768, 2e-5), (1 << 30, 1e-5))

# Fine-tuning takes at least 1,100 updates (minilm_mnli: 4 epochs of 282), in 3 epochs (BERT, Devlin et al.
# 2019: 2 to 4) to 20 (Mosbach et al. 2021: small sets become stable by then).
UPDATES, FEWEST_EPOCHS, MOST_EPOCHS = 1100, 3, 20

# A stage lasts an epoch, as in minilm_mnli, but not less than its 282 updates, and not more than the 2,036
# of iPQ's published run on RTE: what is frozen has settled by then ("And the bit goes down": 2,500).
SHORTEST_STAGE, LONGEST_STAGE = 280, 2036

WARM_UP = 0.06  # of all updates: RoBERTa on GLUE; minilm_mnli and the quickstart: 0.05 and 0.06
END = 0.1  # of the learning rate is left when the last stage ends: what is frozen last has to move as well
SAVE = 100  # updates between checkpoints at least, as whole epochs; long epochs save every 500


@dataclass(frozen=True)
class Schedule:
    """Updates and learning rates of two runs: dense fine-tuning, then noise and stages from there.

    epoch: updates of one. stages: updates after which each is frozen. save: (epochs, updates) between
    checkpoints, updates 0: only at the end of epochs.
    """

    epoch: int
    rate: float
    dense: int
    dense_warm_up: int
    stages: tuple[int, ...]
    staged: int
    staged_warm_up: int
    end_rate: float
    save: tuple[int, int]


def schedule(
    sentences: int,
    tokens: int,
    width: int,
    n_stages: int,
    epochs: int | None = None,
    rate: float | None = None,
) -> Schedule:
    """The schedule for so many training sentences and tokens of an encoder of this width.

    epochs: of dense fine-tuning; stages become as much longer or shorter. The staged run is one stage's
    length of noise, a stage each, and one length more for the last, which has lost most.

    >>> schedule(8999, 300_000, 384, 3)  # minilm_mnli's: 4 epochs, then stages at epochs 2, 3 and 4 of 5
    Schedule(epoch=282, rate=0.0001, dense=1128, ..., stages=(282, 564, 846), staged=1410, ...)
    """
    epoch = max(ceil(sentences / BATCH), ceil(tokens / BATCH_TOKENS))
    usual = min(MOST_EPOCHS, max(FEWEST_EPOCHS, ceil(UPDATES / epoch)))
    dense = epoch * (epochs or usual)
    stage = min(LONGEST_STAGE, max(SHORTEST_STAGE, epoch))
    stage = max(1, round(stage * (epochs or usual) / usual))
    staged = stage * (n_stages + 2)
    rate = rate or next(value for widest, value in RATES if width <= widest)
    return Schedule(
        epoch=epoch,
        rate=rate,
        dense=dense,
        dense_warm_up=ceil(WARM_UP * dense),
        stages=tuple(stage * (i + 1) for i in range(n_stages)),
        staged=staged,
        staged_warm_up=ceil(WARM_UP * staged),
        end_rate=END * rate,
        save=(ceil(SAVE / epoch), 5 * SAVE if epoch > 5 * SAVE else 0),
    )
