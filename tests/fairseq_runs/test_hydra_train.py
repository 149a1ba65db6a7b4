"""The ready configurations train for real with the stock fairseq-hydra-train, from pre-training to the small
file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq_run import ROOT, command, recipe, write_recipe

import fairseq_qn
from fairseq_qn.cli import main

TINY = [
    "common.cpu=true",
    "common.log_interval=1",
    "dataset.num_workers=0",
    "dataset.batch_size=8",
    "model._name=qn_roberta",
    "+model.encoder_layers=2",
    "+model.encoder_embed_dim=32",
    "+model.encoder_ffn_embed_dim=64",
    "+model.encoder_attention_heads=2",
    "model.max_positions=64",
    "lr_scheduler.warmup_updates=1",
]


@pytest.fixture(scope="module")
def made(data, tmp_path_factory) -> Path:
    """A folder in which pretrain, finetune and compress ran one after the other."""
    folder = tmp_path_factory.mktemp("hydra")
    write_recipe(folder / "mine.yaml", recipe())

    def run(*words: str) -> None:
        done = command("fairseq-hydra-train", *words, *TINY, cwd=folder)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    # by the search path of the installed plugin, with the group's choice said once more; the others by their
    # folder
    run(
        "--config-name",
        "pretrain",
        "task=qn_masked_lm",
        f"task.data={data.lm}",
        "task.quant_recipe=mine.yaml",
        "task.tokens_per_sample=32",
        "optimization.max_update=4",
        "optimization.update_freq=[2]",
    )
    configs = ["--config-dir", str(ROOT / "configs"), "--config-name"]
    run(
        *configs,
        "finetune",
        "checkpoint.finetune_from_model=checkpoints/pretrain/checkpoint_last.pt",
        f"task.data={data.classes}",
        "task.max_positions=64",
        "optimization.max_update=3",
    )
    run(
        *configs,
        "compress",
        "checkpoint.finetune_from_model=checkpoints/finetune/checkpoint_last.pt",
        f"task.data={data.classes}",
        "task.max_positions=64",
        "task.quant_recipe=mine.yaml",
        "task.quant_stage_updates='1,2,4'",
        "optimization.max_update=6",
    )
    return folder


def state_of(made: Path, name: str) -> dict:
    return torch.load(made / "checkpoints" / name / "checkpoint_last.pt", weights_only=True)


@pytest.mark.parametrize(
    ("name", "updates", "frozen"), [("pretrain", 4, 0), ("finetune", 3, None), ("compress", 6, 2)]
)
def test_trained(name: str, updates: int, frozen: int | None, made: Path) -> None:
    state = state_of(made, name)
    assert state["optimizer_history"][-1]["num_updates"] == updates
    phases = {int(value) for key, value in state["model"].items() if key.endswith("phase")}
    assert phases == (set() if frozen is None else {frozen})


def test_overrides_arrive(made: Path) -> None:
    cfg = state_of(made, "compress")["cfg"]
    assert cfg["task"]["quant_stage_updates"] == "1,2,4" and '"block_size"' not in str(cfg["model"]["_name"])
    assert cfg["criterion"]["teacher_checkpoint"] == "checkpoints/finetune/checkpoint_last.pt"
    assert (
        cfg["criterion"]["wrapped_criterion"] == "sentence_prediction"
        and cfg["criterion"]["distill_weight"] == 0.5
    )


def test_weights_came_along(made: Path) -> None:
    """Each run began where the one before ended: a few updates at a small rate move little."""
    key = "encoder.sentence_encoder.layers.0.fc1.weight"
    pretrained, tuned, compressed = (
        state_of(made, name)["model"][key] for name in ("pretrain", "finetune", "compress")
    )
    for before, after in ((pretrained, tuned), (tuned, compressed)):
        assert 0 < float((after - before).norm()) < 0.05 * float(before.norm())


def test_the_small_file_of_a_hydra_checkpoint(made: Path, tmp_path: Path) -> None:
    small = tmp_path / "x.qn.safetensors"
    path = made / "checkpoints" / "compress" / "checkpoint_last.pt"
    assert main(["compress", str(path), "-o", str(small), "--parts", "float32", "--keep-head"]) == 0
    assert main(["export-fairseq", str(path), "-o", str(tmp_path / "stock.pt")]) == 0
    model = fairseq_qn.load(small)
    stored = {
        key: value for key, value in state_of(made, "compress")["model"].items() if key.endswith("bias")
    }
    assert all(value.equal(model.state_dict()[key]) for key, value in stored.items())
    assert model.encoder.sentence_encoder.layers[0].fc1.weight.shape == (64, 32)


def test_sweep(made: Path, data) -> None:
    """Two widths of one scheme, a training each, from the folder in which the command runs."""
    words = [
        "-m", "--config-name", "compress", f"task.data={data.classes}", "task.max_positions=64",
        "checkpoint.finetune_from_model=checkpoints/finetune/checkpoint_last.pt",
        "checkpoint.save_dir=sweep/${hydra:job.num}", "task.quant_recipe=int8", "task.quant_bits=2,8",
        "task.quant_p=0.5", "task.quant_stage_updates='1'", "optimization.max_update=2",
    ]  # fmt: skip
    done = command("fairseq-hydra-train", *words, *TINY, cwd=made)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for job, bits in ((0, 2), (1, 8)):
        folder = made / "sweep" / str(job)
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        assert {int(value) for key, value in state["model"].items() if key.endswith("phase")} == {2}
        noise = json.loads(state["cfg"]["task"]["quant_recipe"])["noise"]
        assert noise["p"] == [[0, 0.5]]
        small = folder / "small.qn.safetensors"
        assert main(["compress", str(folder / "checkpoint_last.pt"), "-o", str(small)]) == 0
        entries = fairseq_qn.inspect(small)["layers"].values()
        assert {entry["bits"] for entry in entries} == {bits}
