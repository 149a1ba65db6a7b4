"""export_hf against transformers: what was imported comes out as it was, a small file as it answers."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hf_folders import SENTENCES, byte_bpe_files, wordpiece_lines, write_bert
from test_compress_import import RECIPE
from test_hf import randomise
from torch import Tensor, nn

from fairseq_qn import cli, hub
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.interop import import_hf
from fairseq_qn.interop.hf_export import export_hf

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "initializer_range": 0.5,
}  # fmt: skip


def bert(transformers: Namespace, folder: Path) -> nn.Module:
    lines = wordpiece_lines()
    torch.manual_seed(0)
    ids = {"vocab_size": len(lines), "pad_token_id": lines.index("[PAD]"), "max_position_embeddings": 150}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, **ids, layer_norm_eps=1e-3)).eval()
    randomise(model)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model


def roberta(transformers: Namespace, folder: Path, name: str, **more: object) -> nn.Module:
    folder.mkdir()
    byte_bpe_files(folder, 9)
    n = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    torch.manual_seed(0)
    config = {**SMALL, "vocab_size": n, "max_position_embeddings": 300, "type_vocab_size": 1}
    model = getattr(transformers, name)(
        transformers.RobertaConfig(**config, pad_token_id=9, layer_norm_eps=1e-5, **more)
    ).eval()
    randomise(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids)[0]


def there_and_back(folder: Path, tmp_path: Path) -> Path:
    checkpoint = import_hf(folder, tmp_path / "fs" / "model.pt").checkpoint
    command = ["export-hf", str(checkpoint), "-o", str(tmp_path / "out"), "--config", str(folder)]
    assert cli.main([*command, "--data", str(tmp_path / "fs")]) == 0
    return tmp_path / "out"


IDS = torch.tensor([[3, 41, 17, 60, 33, 8, 2]])


def test_an_imported_bert_comes_out_as_it_was(
    transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    model = bert(transformers, tmp_path / "hf")
    out = there_and_back(tmp_path / "hf", tmp_path)
    back = transformers.BertForMaskedLM.from_pretrained(out).eval()
    torch.testing.assert_close(logits(back, IDS), logits(model, IDS), atol=1e-4, rtol=1e-5)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertForMaskedLM"]


@pytest.mark.parametrize("tied", [True, False])
def test_an_imported_roberta_comes_out_as_it_was(
    tied: bool, transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    model = roberta(transformers, tmp_path / "hf", "RobertaForMaskedLM", tie_word_embeddings=tied)
    back = transformers.RobertaForMaskedLM.from_pretrained(there_and_back(tmp_path / "hf", tmp_path)).eval()
    torch.testing.assert_close(logits(back, IDS), logits(model, IDS), atol=1e-4, rtol=1e-5)


def test_a_classifier_comes_out_as_it_was(
    transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    model = roberta(transformers, tmp_path / "hf", "RobertaForSequenceClassification", num_labels=5)
    out = there_and_back(tmp_path / "hf", tmp_path)
    back = transformers.RobertaForSequenceClassification.from_pretrained(out).eval()
    torch.testing.assert_close(logits(back, IDS), logits(model, IDS), atol=1e-4, rtol=1e-5)


def test_a_head_of_fairseqs_is_berts_pooler_and_classifier(
    transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    bert(transformers, tmp_path / "hf")
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "fs" / "model.pt").checkpoint
    model, _, task = hub.load_checkpoint(checkpoint, str(tmp_path / "fs"))
    for name in ("other", "topic"):  # the first is taken
        model.register_classification_head(name, 3)
    source, assets = model.qn_describe()
    report = export_hf(model.eval().state_dict(), source, assets, tmp_path / "out", tmp_path / "hf")
    assert report.architecture == "BertForSequenceClassification"
    assert report.left_out == ("encoder.lm_head", "classification_heads.topic")
    back = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    symbols = task.source_dictionary
    lines = wordpiece_lines()
    words = ["the", "report", "is", "read", "."]
    ours = torch.tensor([[symbols.bos(), *map(symbols.index, words), symbols.eos()]])
    theirs = torch.tensor([[lines.index(w) for w in ("[CLS]", *words, "[SEP]")]])
    with torch.no_grad():
        expected, _ = model(ours, features_only=True, classification_head_name="other")
    torch.testing.assert_close(logits(back, theirs), expected, atol=1e-4, rtol=1e-5)


def test_a_small_file_comes_out_as_it_answers(
    transformers: Namespace, fairseq_loads: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vocabulary travels inside: no folder is needed."""
    write_bert(tmp_path / "hf", wordpiece_lines(), max_position_embeddings=150)
    fs, small, recipe = tmp_path / "fs", tmp_path / "small.qn.safetensors", tmp_path / "recipe.yaml"
    import_hf(tmp_path / "hf", fs / "model.pt")
    recipe.write_text(json.dumps(RECIPE))
    command = [
        "compress",
        str(fs / "model.pt"),
        "--recipe",
        str(recipe),
        "-o",
        str(small),
        "--data",
        str(fs),
    ]
    command += ["--bpe", "qn_wordpiece", "--bpe-files", str(fs / "vocab.txt"), "--parts", "float32"]
    assert cli.main(command) == 0 and cli.main(["export-hf", str(small), "-o", str(tmp_path / "out")]) == 0
    assert "BertModel" in capsys.readouterr().out
    answering = hub.load_interface(small)
    model = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "out")
    for sentence in SENTENCES:
        with torch.no_grad():
            expected = answering.extract_features(answering.encode(sentence))
            found = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_minilm_comes_out_as_it_was(
    minilm: Path, transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    model = transformers.BertModel.from_pretrained(minilm).eval()
    back = transformers.BertModel.from_pretrained(there_and_back(minilm, tmp_path)).eval()
    tokenizer = transformers.BertTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer(SENTENCES[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        pair = model(**tokens).last_hidden_state, back(**tokens).last_hidden_state
    torch.testing.assert_close(*(t[tokens["attention_mask"].bool()] for t in pair), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_exported_is_said(
    transformers: Namespace, fairseq_loads: None, tmp_path: Path
) -> None:
    bert(transformers, tmp_path / "hf")
    checkpoint = import_hf(tmp_path / "hf", tmp_path / "fs" / "model.pt").checkpoint
    model, _, _ = hub.load_checkpoint(checkpoint, str(tmp_path / "fs"))
    source, assets = model.qn_describe()
    state, out = model.state_dict(), tmp_path / "out"
    source.pop("bpe", None)
    with pytest.raises(UnsupportedError, match="found none; give the imported folder with --config"):
        export_hf(state, source, assets, out)
    with pytest.raises(UnsupportedError, match="choose another output"):
        export_hf(state, source, assets, tmp_path / "hf", tmp_path / "hf")
    prenorm = {**source, "model": {**source["model"], "encoder_normalize_before": True}}
    with pytest.raises(UnsupportedError, match="encoder_normalize_before False"):
        export_hf(state, prenorm, assets, out, tmp_path / "hf")
    with pytest.raises(UnsupportedError, match="no place for it"):
        export_hf({**state, "extra.weight": torch.zeros(1)}, source, assets, out, tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join([*wordpiece_lines(), "strange"]) + "\n")
    with pytest.raises(MismatchError, match="'strange'"):
        export_hf(state, source, assets, out, tmp_path / "hf")
    assert not out.exists()
