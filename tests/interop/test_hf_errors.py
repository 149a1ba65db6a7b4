"""import_hf refuses what it cannot express, by name, and leaves nothing half-written."""

import json
from pathlib import Path

import pytest
import torch
from hf_folders import bert_config, bert_tensors, wordpiece_lines, write_bert
from safetensors.torch import save_file

from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError
from fairseq_qn.interop import import_hf

LINES = wordpiece_lines()


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "distilbert"},
        {"model_type": "xlm-roberta"},
        {"model_type": None},
        {"position_embedding_type": "relative_key"},
        {"hidden_act": "silu"},
        {"is_decoder": True},
        {"add_cross_attention": True},
    ],
)
def test_other_models_are_refused(change, tmp_path):
    write_bert(tmp_path / "hf", LINES, **change)
    refused(tmp_path, UnsupportedError, next(iter(change)))


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": None}, {"num_hidden_layers": 0}, {"vocab_size": "many"}, {"num_attention_heads": 3}],
)
def test_configs_that_make_no_sense(change, tmp_path):
    write_bert(tmp_path / "hf", LINES, tensors=bert_tensors(bert_config(len(LINES))), **change)
    refused(tmp_path, FormatError, next(iter(change)))


@pytest.mark.parametrize(
    "name", sorted(set(bert_tensors(bert_config(9))) - {"pooler.dense.weight", "pooler.dense.bias"})
)
def test_every_missing_tensor_is_named(name, tmp_path):
    tensors = bert_tensors(bert_config(len(LINES)))
    del tensors[name]
    write_bert(tmp_path / "hf", LINES, tensors)
    refused(tmp_path, MismatchError, name)


@pytest.mark.parametrize(
    "name", sorted(set(bert_tensors(bert_config(9))) - {"pooler.dense.weight", "pooler.dense.bias"})
)
def test_every_wrong_shape_is_named(name, tmp_path):
    tensors = bert_tensors(bert_config(len(LINES)))
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=-1)
    write_bert(tmp_path / "hf", LINES, tensors)
    refused(tmp_path, MismatchError, name)


@pytest.mark.parametrize(
    "name", ["encoder.layer.2.output.dense.bias", "encoder.layer.0.attention.self.distance_embedding.weight"]
)
def test_tensors_beyond_the_architecture_are_refused(name, tmp_path):
    write_bert(tmp_path / "hf", LINES, {**bert_tensors(bert_config(len(LINES))), name: torch.zeros(3)})
    refused(tmp_path, MismatchError, name)


def test_pickles_are_refused(tmp_path):
    write_bert(tmp_path / "hf", LINES)
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    refused(tmp_path, UnsupportedError, "pickle")
    (tmp_path / "hf" / "pytorch_model.bin").unlink()
    refused(tmp_path, FormatError, "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights(keep, tmp_path):
    write_bert(tmp_path / "hf", LINES)
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(tmp_path, FormatError, "model.safetensors")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00"])
def test_damaged_config(text, tmp_path):
    write_bert(tmp_path / "hf", LINES)
    (tmp_path / "hf" / "config.json").write_text(text)
    refused(tmp_path, FormatError, "config.json")


@pytest.mark.parametrize("token", ["[CLS]", "[SEP]", "[UNK]", "[MASK]"])
def test_missing_special_token(token, tmp_path):
    write_bert(tmp_path / "hf", [line for line in LINES if line != token])
    refused(tmp_path, FormatError, token)


def test_vocabulary_of_another_model(tmp_path):
    write_bert(tmp_path / "hf", LINES)
    path = tmp_path / "hf" / "vocab.txt"
    path.write_text("\n".join([*LINES, "more"]) + "\n")
    refused(tmp_path, MismatchError, "vocab_size")
    path.unlink()
    refused(tmp_path, FormatError, "vocab.txt")
    path.write_bytes(b"\xff\n")
    refused(tmp_path, FormatError, "UTF-8")


def test_padding_token_of_another_model(tmp_path):
    write_bert(tmp_path / "hf", LINES)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token_id": config["pad_token_id"] + 1}))
    refused(tmp_path, MismatchError, "pad_token_id")


def test_an_old_checkpoint_survives_a_failure(tmp_path):
    write_bert(tmp_path / "hf", LINES)
    path = import_hf(tmp_path / "hf", tmp_path / "model.pt").checkpoint
    before = path.read_bytes()
    save_file({}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(MismatchError):
        import_hf(tmp_path / "hf", path)
    assert path.read_bytes() == before
    assert not list(tmp_path.glob("*tmp"))


def test_half_precision_names_of_tensorflow_and_prefixes(tmp_path):
    """Older folders: fp16, `bert.` before each name, LayerNorm.gamma and .beta. All become the same fp32
    checkpoint.
    """
    tensors = {k: v.half() for k, v in bert_tensors(bert_config(len(LINES))).items()}
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    states = []
    for i, rename in enumerate(
        (lambda k: k, lambda k: "bert." + k.replace(*next((r for r in old.items() if r[0] in k), ("", ""))))
    ):
        write_bert(tmp_path / str(i), LINES, {rename(k): v for k, v in tensors.items()})
        path = import_hf(tmp_path / str(i), tmp_path / f"{i}.pt").checkpoint
        states.append(torch.load(path, weights_only=False)["model"])
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(states[0][k], states[1][k]) and states[0][k].dtype == torch.float32 for k in states[0]
    )


def refused(folder: Path, error: type[Exception], word: str) -> None:
    """One line that names the culprit, and no file."""
    with pytest.raises(error) as info:
        import_hf(folder / "hf", folder / "out" / "model.pt")
    assert word in str(info.value) and "\n" not in str(info.value)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_no_input_is_written_over(name, tmp_path):
    folder = tmp_path / "hf"
    write_bert(folder, LINES)
    before = (folder / name).read_bytes()
    with pytest.raises(UnsupportedError, match="is the input .* itself"):
        import_hf(folder, folder / name)
    assert (folder / name).read_bytes() == before
