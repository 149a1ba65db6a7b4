"""From a Hugging Face folder to a small file that answers: import, recipe, freeze, save, load."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hf_folders import wordpiece_lines, write_bert

from fairseq_qn import cli, hub

RECIPE = {
    "version": 1,
    "rules": [
        {"layers": r".*\.fc[12]", "scheme": "product", "block_size": 4, "n_centroids": 16, "stage": "ffn"},
        {
            "layers": r".*embed_tokens",
            "scheme": "product",
            "block_size": 4,
            "n_centroids": 16,
            "stage": "emb",
        },
    ],
}


def test_an_imported_folder_compresses_and_answers(tmp_path: Path, capsys) -> None:
    folder, small = tmp_path / "hf", tmp_path / "model.qn.safetensors"
    folder.mkdir()
    write_bert(folder, wordpiece_lines())
    assert cli.main(["import-hf", str(folder), "-o", str(tmp_path / "fs" / "model.pt"), "--json"]) == 0
    capsys.readouterr()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    command = [
        "compress",
        str(tmp_path / "fs" / "model.pt"),
        "--recipe",
        str(recipe),
        "-o",
        str(small),
        "--parts",
        "float32",
    ]
    command += [
        "--data",
        str(tmp_path / "fs"),
        "--bpe",
        "qn_wordpiece",
        "--bpe-files",
        str(tmp_path / "fs" / "vocab.txt"),
    ]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["size"]["total"] == small.stat().st_size and len(report["frozen_here"]) > 2

    answering = hub.QNRobertaModel.from_pretrained(str(small))
    eps = {m.eps for m in answering.model.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {1e-12}
    tokens = answering.encode("a b")
    with torch.no_grad():
        features = answering.extract_features(tokens)
    assert torch.isfinite(features).all() and features.shape[1] == len(tokens)
