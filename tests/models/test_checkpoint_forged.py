"""Checkpoints that weights_only lets through, with options that fairseq would evaluate, open or resolve; and
many at a time.
"""

from __future__ import annotations

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from described import CODE, KINDS, MARK, NAMES, build, watched
from forging import one_line
from omegaconf import OmegaConf

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.errors import FormatError, QNError, UnsupportedError
from fairseq_qn.models.options import CHECKPOINT_MODEL, CHECKPOINT_TASK, MODELS, TASKS

TASK = {
    "qn_roberta": "sentence_prediction",
    "qn_transformer": "translation",
    "qn_transformer_lm": "language_modeling",
}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A checkpoint of each kind, as fairseq writes it, whose dictionaries are on the disk."""
    folder = tmp_path_factory.mktemp("data")
    made = {}
    for kind in KINDS:
        model = build(kind)
        source, dictionaries = model.__dict__["_qn_source"]
        for name in ("dict.txt", "dict.a.txt", "dict.b.txt", "input0/dict.txt"):
            (folder / name).parent.mkdir(exist_ok=True)
            dictionaries["source_dictionary"].save(str(folder / name))
        (folder / "label").mkdir(exist_ok=True)
        (folder / "label" / "dict.txt").write_text("good 1\nbad 1\n")
        task = {**source["task"], "data": str(folder), "seed": 1, "source_lang": "a", "target_lang": "b"}
        options = {**source["model"], "tokens_per_sample": 32}
        config = {
            "model": options if kind == "qn_transformer_lm" else Namespace(**options, arch=kind),
            "task": task,
        }
        made[kind] = {
            "args": None,
            "cfg": config,
            "model": model.state_dict(),
            "optimizer_history": [{"num_updates": 3}],
        }
    return made


def write(path: Path, state: dict[str, Any], **parts: dict[str, Any]) -> Path:
    """The checkpoint with options added to `model` or `task`."""
    config = {}
    for part, options in state["cfg"].items():
        flat = vars(options) if isinstance(options, Namespace) else options
        merged = {**flat, **parts.get(part, {})}
        config[part] = Namespace(**merged) if isinstance(options, Namespace) else merged
    torch.save({**state, "cfg": config}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
def test_its_weights_and_its_options_come_along(kind: str, flat: bool, states: dict, tmp_path: Path) -> None:
    """From the nested configuration of today, and from the one Namespace of all options of before."""
    state = states[kind]
    if flat:
        options = {**vars(Namespace(**_flat(state["cfg"]["model"]))), **state["cfg"]["task"], "arch": kind}
        options |= {"task": options.pop("_name")}
        torch.save({**state, "args": Namespace(**options), "cfg": None}, tmp_path / "c.pt")
    else:
        write(tmp_path / "c.pt", state)
    model, config, task = hub.load_checkpoint(tmp_path / "c.pt")
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in state["model"].items())
    assert hub.load_checkpoint(write(tmp_path / "c.pt", state, task={"seed": None}))[1].common.seed == 1
    assert type(task).__name__.startswith("QN") and config.task.data == state["cfg"]["task"]["data"]
    assert model.__dict__["_qn_source"][0]["model"] == build(kind).__dict__["_qn_source"][0]["model"]


def _flat(options: Any) -> dict[str, Any]:
    return vars(options) if isinstance(options, Namespace) else options


@pytest.mark.parametrize("kind", KINDS)
def test_no_option_takes_code(
    kind: str, states: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = {
        "model": {**MODELS[kind], **CHECKPOINT_MODEL},
        "task": {**TASKS[f"qn_{TASK[kind]}"], **CHECKPOINT_TASK},
    }
    for part, table in known.items():
        for number, name in enumerate(table):
            if name == "data":
                continue
            value = CODE[number % 3] if name == "seed" else CODE[number % len(CODE)]
            path = write(tmp_path / "c.pt", states[kind], **{part: {name: value}})
            with (
                watched(monkeypatch, MARK),
                pytest.raises(FormatError, match=rf"c\.pt: {part}\.{name}: expected "),
            ):
                hub.load_checkpoint(path)
    more = {
        name: CODE[0]
        for name in {*NAMES} - known["model"].keys() - known["task"].keys() - {"_name", "arch", "task"}
    }
    path = write(tmp_path / "c.pt", states[kind], model=more, task=more)
    with watched(monkeypatch, MARK):
        hub.load_checkpoint(path)
    assert not (tmp_path / MARK).exists()


REFUSED = {
    "another model": (
        {"model": {"_name": "wav2vec2", "arch": "wav2vec2", "conv_feature_layers": CODE[0]}},
        "wav2vec2",
    ),
    "a name of lists": ({"model": {"_name": [1], "arch": None}}, "[1]"),
    "another task": ({"task": {"_name": "translation_moe"}}, "translation_moe"),
    "characters": (
        {"model": {"_name": "qn_transformer_lm", "character_embeddings": True}},
        "character_embeddings",
    ),
    "data from the net": ({"task": {"data": f"http://127.0.0.1:9/{MARK}"}}, "task.data"),
    "data by interpolation": ({"task": {"data": f"${{oc.env:{MARK}}}"}}, "task.data"),
    "a recipe from disk": ({"model": {"quant_recipe": f"/{MARK}"}}, "model.quant_recipe"),
    "a recipe that reads": (
        {"task": {"quant_recipe": '{"keep": ["\\u0024{oc.env:' + MARK + '}"]}'}},
        "task.quant_recipe",
    ),
    "many layers": ({"model": {"encoder_layers": 200}}, "encoder_layers: expected up to 2"),
    "many layers to keep": (
        {"model": {"encoder_layers_to_keep": ",".join("0" * 300)}},
        "encoder_layers: expected up to 2",
    ),
    "heads that do not divide": ({"model": {"encoder_attention_heads": 3}}, "c.pt"),
    "another width": ({"model": {"encoder_embed_dim": 16}}, "do not fit its options"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str, states: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, named = REFUSED[what]
    path = write(tmp_path / "c.pt", states["qn_roberta"], **changes)
    with watched(monkeypatch, MARK), pytest.raises(QNError) as error:
        hub.load_checkpoint(path)
    message = one_line(error.value)
    assert named in message and "a secret" not in message


BROKEN = [
    *({"model": weights} for weights in (5, {1: torch.zeros(2)}, {"a": 1})),
    *({"cfg": config} for config in (None, [1], {"model": 3})),
    *({"optimizer_history": history} for history in (3, ["a"])),
]


@pytest.mark.parametrize("broken", BROKEN, ids=str)
def test_no_checkpoint_of_fairseqs(broken: dict, states: dict, tmp_path: Path) -> None:
    torch.save({**states["qn_roberta"], **broken}, tmp_path / "c.pt")
    with pytest.raises(FormatError, match=r"c\.pt"):
        hub.load_checkpoint(tmp_path / "c.pt")


def test_a_model_that_no_file_can_hold_trains_and_is_refused_when_saved(tmp_path: Path) -> None:
    model = build("qn_transformer_lm", character_embeddings=True, share_decoder_input_output_embed=False)
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": r".*\.fc[12]", "scheme": "integer", "bits": 8}]}
    )
    fairseq_qn.freeze(model)
    assert "predicted_mb" not in fairseq_qn.figures(model)
    with pytest.raises(
        UnsupportedError, match=r"save: the small file cannot describe source\.model\.character_embeddings: "
    ):
        fairseq_qn.save(model, tmp_path / "x.qn.safetensors")
    fairseq_qn.save(model, tmp_path / "x.qn.safetensors", source={"builder": None})
    with pytest.raises(UnsupportedError, match="pass a fresh dense one"):
        fairseq_qn.load(tmp_path / "x.qn.safetensors")


def test_many_at_a_time(states: dict, tmp_path: Path) -> None:
    """60 in 8 threads, of three kinds; nothing of the process is swapped for it."""
    before = torch.load
    paths = [write(tmp_path / f"{kind}.pt", states[kind]) for kind in KINDS]
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(lambda n: hub.load_checkpoint(paths[n % 3])[0], range(60)))
    assert len(models) == 60 and torch.load is before
    for number, model in enumerate(models):
        stored = states[KINDS[number % 3]]["model"]
        assert all(tensor.equal(model.state_dict()[name]) for name, tensor in stored.items())


def test_compress_says_so_in_one_line(states: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "c.pt", states["qn_transformer_lm"], model={"adaptive_softmax_cutoff": CODE[0]})
    assert main(["compress", str(path), "-o", str(tmp_path / "x.qn.safetensors")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "model.adaptive_softmax_cutoff: expected" in error
    assert OmegaConf.is_config(hub.load_checkpoint(write(path, states["qn_transformer_lm"]))[1])
