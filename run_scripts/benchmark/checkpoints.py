"""RoBERTa checkpoints of any size, as fairseq writes them, with random weights: checkpoints.py FOLDER
[--layers 12].
"""

from __future__ import annotations

import argparse
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

WORDS = 50260  # with fairseq's 4 symbols of its own and <mask>: the 50,265 of roberta.base


def write_dictionary(folder: Path, words: int = WORDS, seed: int = 0) -> None:
    """A dictionary like roberta.base's: GPT-2's token numbers in no order, with counts that fall as Zipf's
    law says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = list(range(words))
    random.Random(seed).shuffle(numbers)
    lines = [f"{number} {int(850_314_647 / (rank + 1)) + 1}" for rank, number in enumerate(numbers)]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def settings(
    layers: int, width: int, heads: int, folder: Path, arch: str = "roberta_base", **more: Any
) -> Namespace:
    """What fairseq's command line would hold for a RoBERTa of this size."""
    from fairseq.models import ARCH_CONFIG_REGISTRY

    args = Namespace(
        task="masked_lm", arch=arch, data=str(folder), encoder_layers=layers, encoder_embed_dim=width,
        encoder_ffn_embed_dim=4 * width, encoder_attention_heads=heads, max_positions=512,
        tokens_per_sample=512, seed=1,
        sample_break_mode="none", mask_prob=0.15, leave_unmasked_prob=0.1, random_token_prob=0.1,
        mask_whole_words=False,
        freq_weighted_replacement=False, mask_multiple_length=1, mask_stdev=0.0, shorten_method="none",
        shorten_data_split_list="", criterion="masked_lm", **more,
    )  # fmt: skip
    ARCH_CONFIG_REGISTRY[arch](args)
    return args


def build(args: Namespace) -> tuple[Any, Any]:
    """(task, model) of fairseq's, in training mode."""
    import torch
    from fairseq import tasks

    torch.manual_seed(args.seed)
    task = tasks.setup_task(args)
    return task, task.build_model(args)


def write_checkpoint(folder: Path, layers: int = 12, width: int = 768, heads: int = 12, words: int = WORDS,
                     positions: int = 512) -> Path:  # fmt: skip
    """FOLDER/dict.txt and FOLDER/model.pt, which fairseq loads; kept if it is there already."""
    import torch
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from omegaconf import OmegaConf

    path = folder / "model.pt"
    if path.exists():
        return path
    write_dictionary(folder, words)
    args = settings(layers, width, heads, folder)
    args.max_positions = args.tokens_per_sample = positions
    _, model = build(args)
    config = OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True, enum_to_str=True)
    history = {
        "criterion_name": "MaskedLmLoss",
        "optimizer_name": "FairseqAdam",
        "lr_scheduler_state": {},
        "num_updates": 0,
    }
    state = {
        "args": None,
        "cfg": config,
        "model": model.state_dict(),
        "optimizer_history": [history],
        "extra_state": {},
        "last_optimizer_state": None,
    }
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    options = parser.parse_args()
    print(write_checkpoint(options.folder, options.layers, options.width, options.heads))
