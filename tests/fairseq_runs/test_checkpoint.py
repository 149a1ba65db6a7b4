"""Checkpoints become models with the weights they hold, tied as they were, and with nothing left undrawn."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq import tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY
from omegaconf import OmegaConf
from torch import nn

from fairseq_qn.models.checkpoint import _build, load_checkpoint

RECIPE = {
    "version": 1,
    "rules": [{"layers": r".*\.fc[12]", "scheme": "product", "block_size": 8, "n_centroids": 4}],
}


def write(folder: Path, half: bool, zipped: bool) -> dict[str, torch.Tensor]:
    """FOLDER/model.pt of a small stock RoBERTa; returns its weights."""
    (folder / "dict.txt").write_text("a 3\nb 2\nc 1\n")
    args = Namespace(
        task="masked_lm", arch="roberta_base", data=str(folder), encoder_layers=1, encoder_embed_dim=16,
        encoder_ffn_embed_dim=32, encoder_attention_heads=2, max_positions=16, tokens_per_sample=16, seed=1,
        sample_break_mode="none", mask_prob=0.15, leave_unmasked_prob=0.1, random_token_prob=0.1,
        mask_whole_words=False,
        freq_weighted_replacement=False, mask_multiple_length=1, mask_stdev=0.0, shorten_method="none",
        shorten_data_split_list="", criterion="masked_lm",
    )  # fmt: skip
    ARCH_CONFIG_REGISTRY["roberta_base"](args)
    model = tasks.setup_task(args).build_model(args)
    config = OmegaConf.to_container(convert_namespace_to_omegaconf(args), resolve=True, enum_to_str=True)
    history = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 7}
    state = {
        "args": None,
        "cfg": config,
        "model": (model.half() if half else model).state_dict(),
        "extra_state": {},
        "optimizer_history": [history],
        "last_optimizer_state": {"state": {0: torch.rand(1000)}},
    }
    torch.save(state, folder / "model.pt", _use_new_zipfile_serialization=zipped)
    return state["model"]


@pytest.mark.parametrize(("half", "zipped"), [(False, True), (True, True), (False, False)])
def test_the_model_holds_the_checkpoints_weights_in_fp32_and_its_ties(
    tmp_path: Path, half: bool, zipped: bool
) -> None:
    stored = write(tmp_path, half, zipped)
    for recipe in (None, RECIPE):
        model, _, _ = load_checkpoint(tmp_path / "model.pt", recipe=recipe)
        own = model.state_dict()
        assert stored.keys() <= own.keys()
        for name, tensor in stored.items():
            assert torch.equal(own[name], tensor.to(own[name].dtype)), name
        assert {p.dtype for p in model.parameters()} == {torch.float32} and all(
            p.requires_grad for p in model.parameters()
        )
        table = model.encoder.sentence_encoder.embed_tokens.get_parameter("weight")
        assert model.encoder.lm_head.get_parameter("weight") is table
        assert torch.isfinite(model(torch.tensor([[0, 4, 5, 2]]))[0]).all() and not model.training


class Grows(nn.Module):
    """A model that, like fairseq's classifiers, gives a checkpoint without its head the weights that it was
    built with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def set_num_updates(self, n: int) -> None:
        self.updates = n

    def qn_kept(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def upgrade_state_dict(self, state: dict[str, Any]) -> None:
        for name, tensor in self.head.state_dict().items():
            state.setdefault(f"head.{name}", tensor)


def test_what_a_checkpoint_does_not_hold_is_drawn() -> None:
    task = SimpleNamespace(build_model=lambda config: Grows())
    state = {"model": nn.Linear(4, 4).state_dict(prefix="body."), "optimizer_history": [{"num_updates": 3}]}
    assert _build(state, None, task, draw=False) is None
    drawn = [_build(state, None, task, draw=True) for _ in range(2)]
    assert (
        not torch.equal(drawn[0].head.weight, drawn[1].head.weight)
        and drawn[0].head.weight.abs().max() <= 0.5
    )
    assert torch.equal(drawn[0].body.weight, state["model"]["body.weight"]) and drawn[0].updates == 3
    whole = {**state, "model": {**state["model"], **nn.Linear(4, 4).state_dict(prefix="head.")}}
    assert torch.equal(_build(whole, None, task, draw=False).head.weight, whole["model"]["head.weight"])
