"""From a Hugging Face folder to a small file that answers: import, recipe, freeze, save, load."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from fairseq import options
from hf_folders import wordpiece_lines, write_bert

from fairseq_qn import cli, hub
from fairseq_qn.errors import FormatError
from fairseq_qn.models.bpe import carried_text

PLUGIN = Path(cli.__file__).parent
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


def test_an_imported_folder_compresses_and_answers(tmp_path: Path, monkeypatch, capsys) -> None:
    folder, small = tmp_path / "hf", tmp_path / "model.qn.safetensors"
    folder.mkdir()
    write_bert(folder, wordpiece_lines())
    assert cli.main(["import-hf", str(folder), "-o", str(tmp_path / "fs" / "model.pt"), "--json"]) == 0
    capsys.readouterr()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE))
    monkeypatch.chdir(tmp_path)  # where no dictionary lies
    moved = (tmp_path / "fs").rename(tmp_path / "moved") / "model.pt"
    command = ["compress", str(moved), "--recipe", str(recipe), "-o", str(small), "--parts", "float32"]
    assert cli.main([*command, "--json"]) == 0
    out, error = capsys.readouterr()
    report = json.loads(out)
    assert not error and "encoder.lm_head" not in report["dropped"]
    assert report["size"]["total"] == small.stat().st_size and len(report["frozen_here"]) > 2

    answering = hub.QNRobertaModel.from_pretrained(str(small))
    eps = {m.eps for m in answering.model.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {1e-12}
    tokens = answering.encode("a b")
    with torch.no_grad():
        features = answering.extract_features(tokens)
    assert torch.isfinite(features).all() and features.shape[1] == len(tokens)


@pytest.mark.parametrize(
    "text",
    [
        5,
        {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:vocab.txt"}},
        {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "/etc/passwd"}, "files": {"vocab.txt": "a"}},
        {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:b.txt"}, "files": {"vocab.txt": "a"}},
        {"bpe": {"_name": "run_me", "wordpiece_vocab": "asset:vocab.txt"}, "files": {"vocab.txt": "a"}},
        {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:a/b"}, "files": {"a/b": "a"}},
        {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:a"}, "files": {"a": 7}},
    ],
)
def test_a_forged_text_in_a_checkpoint(text: object) -> None:
    with pytest.raises(FormatError, match="^m.pt: |^source"):
        carried_text({"qn_text": text}, "m.pt")


def test_only_the_files_that_the_bpe_names_are_taken_along() -> None:
    bpe = {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:vocab.txt", "unknown": 5}
    source, assets = carried_text({"qn_text": {"bpe": bpe, "files": {"vocab.txt": "a", "other": "b"}}}, "m")
    assert source == {"bpe": {"_name": "qn_wordpiece", "wordpiece_vocab": "asset:vocab.txt"}}
    assert assets == {"vocab.txt": b"a"} and carried_text({}, "m") == ({}, {})


def test_the_command_that_is_printed_is_one_of_fairseqs(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "hf"
    folder.mkdir()
    write_bert(folder, wordpiece_lines())
    checkpoint = tmp_path / "a b" / "model.pt"
    assert cli.main(["import-hf", str(folder), "-o", str(checkpoint)]) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    program, *words = shlex.split(printed.replace("$(fairseq-qn user-dir)", str(PLUGIN)))
    words = ["3" if word == "N" else word for word in words]
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=words)
    assert (program, args.data, args.arch, args.task) == (
        "fairseq-train", "DATA", "qn_roberta", "qn_sentence_prediction"
    )  # fmt: skip
    assert (args.num_classes, args.init_token, args.separator_token, args.lr) == (3, 0, 2, [5e-5])
    assert args.finetune_from_model == str(checkpoint) and args.layer_norm_eps == 1e-12
    assert args.max_epoch and args.encoder_embed_dim == 16
