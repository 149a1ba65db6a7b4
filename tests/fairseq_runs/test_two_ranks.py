"""Two data-parallel processes on the CPU (gloo): the same codes and weights on both, masks of their own,
right figures.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fairseq_run import (
    EACH,
    MLM,
    PLUGIN,
    arguments,
    build,
    differing,
    listening,
    recipe,
    train,
    write_recipe,
)

STAGED = {"--quant-stage-updates": "2,3,5", "--max-update": 7}
ON_ALL = {"--distributed-world-size": 2, "--load-checkpoint-on-all-dp-ranks": None}
QUIET = {"--dropout": 0, "--attention-dropout": 0}

# fairseq-train, several times over in one process; afterwards each rank keeps its model and what it drew and
# logged
RANK = """
import json, logging, sys, torch
torch.set_num_threads(1)
import fairseq_qn
from fairseq_cli import train
lines, drawn, trainers = [], [], []
class Keep(logging.Handler):
    def emit(self, record):
        if record.name == "train_inner":
            lines.append(json.loads(record.getMessage()))
class Watched(train.Trainer):
    def __init__(self, *args):
        super().__init__(*args)
        trainers.append(self)
        fc1 = self.model.encoder.sentence_encoder.layers[0].fc1
        read = lambda m, _: drawn.append(m.weight.double().sum().item()) if m.training else None
        fc1.register_forward_pre_hook(read)
train.Trainer = Watched
logging.getLogger().addHandler(Keep())  # fairseq renames one logger while it logs
folder, rank, *words = sys.argv[1:]
for name, options in json.loads(words[0]).items():
    lines.clear(), drawn.clear()
    sys.argv = ["fairseq-train", *options, "--distributed-rank", rank]
    train.cli_main()
    model = trainers[-1].get_model()
    found = {"model": model.state_dict(), "lines": list(lines), "drawn": list(drawn)}
    torch.save(found, f"{folder}/{name}.{rank}.pt")
"""


@dataclass
class Ranks:
    folder: Path

    def end(self, name: str, rank: int) -> dict:
        """What one rank kept of one training."""
        return torch.load(self.folder / f"{name}.{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    content = recipe({"kind": "exact", "p": 0.2})
    content["rules"][0]["activations"] = {"ranges": "static", "momentum": 0.5}
    noisy = {"--quant-recipe": write_recipe(folder / "noisy.yaml", content)}
    quiet = {"--quant-recipe": write_recipe(folder / "quiet.yaml", recipe({"kind": "none"}))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    content = recipe({"kind": "exact", "p": 0.2}, share=[{"layers": ".*layers", "chunk": 2}])
    shared = {"--quant-recipe": write_recipe(folder / "shared.yaml", content)}
    shared |= {"--encoder-layers": 4, "--encoder-layerdrop": 0.5}
    common = [
        data.lm,
        MLM,
        STAGED,
        {"--cpu": None, "--ddp-backend": "legacy_ddp", "--distributed-backend": "gloo"},
    ]
    common += [{"--distributed-world-size": 2, "--distributed-no-spawn": None, "--user-dir": PLUGIN}]
    common += [{"--distributed-init-method": f"tcp://127.0.0.1:{port}"}]
    middle = {"--restore-file": folder / "straight" / "checkpoint_1_3.pt"}
    runs = {
        "straight": [common, noisy, EACH, {"--save-dir": folder / "straight"}],
        "quiet": [common, quiet, QUIET, {"--save-dir": folder / "quiet"}],
        "shared": [common, shared, {"--save-dir": folder / "shared"}],
        "resumed": [
            common,
            noisy,
            middle,
            {"--save-dir": folder / "all", "--load-checkpoint-on-all-dp-ranks": None},
        ],
    }
    words = json.dumps({name: arguments(parts) for name, parts in runs.items()})
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), words], env=env, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=280)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], b"\n".join(
        e[-2000:] for e in errors
    ).decode()
    return Ranks(folder)


@pytest.mark.parametrize("name", ["straight", "quiet", "shared"])
def test_same_codes_and_weights(name: str, ranks: Ranks) -> None:
    first, second = (ranks.end(name, rank)["model"] for rank in range(2))
    # each rank has seen inputs of its own since the last update began; resumed, both go on from the first's
    moved = [where for where in differing(first, second) if "activation_range" in where]
    assert differing(first, second) == moved and len(moved) == (4 if name == "straight" else 0)
    assert all(int(value) == 2 for key, value in first.items() if key.endswith("phase")), (
        "all stages are frozen"
    )
    assert all(int(value.max()) > 0 for key, value in first.items() if key.endswith("codes"))


def test_shared_layers_that_are_dropped_at_times(ranks: Ranks) -> None:
    """A layer that no rank calls in an update, and weights that two of those called have."""
    state = ranks.end("shared", 1)["model"]
    stem = "encoder.sentence_encoder.layers"
    for part in ("fc1.weight", "self_attn.q_proj.weight", "fc2.bias", "final_layer_norm.weight"):
        first, second, third = (state[f"{stem}.{n}.{part}"] for n in range(3))
        assert first.equal(second) and not first.equal(third), part
    assert {key.split(".")[3] for key in state if key.endswith("fc1.codes")} == {"0", "2"}


def test_each_rank_draws_its_own_masks(ranks: Ranks) -> None:
    """Equal weights, read through unequal masks, until the layer is frozen."""
    first, second = (ranks.end("straight", rank)["drawn"] for rank in range(2))
    assert len(first) == len(second) == 7
    assert [a == b for a, b in zip(first, second)] == [False] * 2 + [True] * 5
    assert ranks.end("straight", 0)["lines"] and not ranks.end("straight", 1)["lines"], "the first rank logs"


def test_resumed_on_all_ranks(ranks: Ranks) -> None:
    for rank in range(2):
        assert differing(ranks.end("straight", rank)["model"], ranks.end("resumed", rank)["model"]) == []
    logged = [[line["loss"] for line in ranks.end(which, 0)["lines"]] for which in ("straight", "resumed")]
    assert logged[0][3:] == logged[1]


def test_the_option_for_it_is_recommended(data) -> None:
    """Without it fairseq has the first rank send the checkpoint on, as a pickle that torch >= 2.6
    refuses.
    """
    for more, warned in (({}, False), ({"--distributed-world-size": 2}, True), (ON_ALL, False)):
        lines: list[tuple[str, str]] = []
        with listening(lines):
            build(data.lm, MLM, more)
        assert (
            any("--load-checkpoint-on-all-dp-ranks" in text for name, text in lines if "quantised" in name)
            == warned
        )


def test_figures_as_of_one_process(ranks: Ranks, data, tmp_path: Path) -> None:
    """One process that gathers two batches an update sees the same sentences: losses and figures agree."""
    options = {
        "--update-freq": 2,
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe({"kind": "none"})),
    }
    alone = train(tmp_path, data.lm, MLM, STAGED, QUIET, options)
    together = ranks.end("quiet", 0)["lines"]
    assert len(together) == len(alone.logged()) == 7
    for ours, theirs in zip(together, alone.logged()):
        figures = {key for key in theirs if key.startswith("qn_")} | {"loss", "wpb", "bsz", "lr"}
        assert figures == {key for key in ours if key.startswith("qn_")} | {"loss", "wpb", "bsz", "lr"}
        assert {key: float(ours[key]) for key in figures} == pytest.approx(
            {key: theirs[key] for key in figures}, abs=2e-3
        )
    assert float(together[-1]["qn_frozen_share"]) == 1
