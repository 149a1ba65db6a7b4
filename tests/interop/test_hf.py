"""import_hf against transformers: the same hidden states, through fairseq's own roberta, on real
sentences.
"""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hf_folders import SENTENCES, byte_bpe_files, wordpiece_lines, write_bert
from torch import nn

from fairseq_qn.interop import import_hf

TOLERANCE = 1e-4  # of hidden states of order 1, fp32
# fairseq's own roberta has LayerNorm eps 1e-5 where MiniLM was trained with 1e-12. Measured: 1.7e-3 on these
# sentences
STOCK_TOLERANCE = 5e-3


def load_stock(checkpoint: Path, **bpe: str):
    from fairseq.models.roberta import RobertaModel

    return RobertaModel.from_pretrained(
        str(checkpoint.parent), checkpoint_file=checkpoint.name, **bpe
    ).eval()


def honour_eps(hub: nn.Module, eps: float) -> None:
    """What qn_roberta does with args.layer_norm_eps."""
    for module in hub.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps


def wordpiece(folder: Path) -> dict[str, str]:
    import fairseq_qn.models
    import fairseq_qn.tasks  # noqa: F401  (registers the BPE)

    return {"bpe": "qn_wordpiece", "wordpiece_vocab": str(folder / "vocab.txt")}


@torch.no_grad()
def worst_difference(hub, model, tokenizer) -> float:
    """Largest difference of hidden states, sentence by sentence, and of all sentences in one padded
    batch.
    """
    from fairseq.data.data_utils import collate_tokens

    ids = [hub.encode(s) for s in SENTENCES]
    expected = [model(**tokenizer(s, return_tensors="pt")).last_hidden_state[0] for s in SENTENCES]
    assert [len(i) for i in ids] == [len(e) for e in expected]
    batch = hub.extract_features(collate_tokens(ids, pad_idx=1))
    singly = [hub.extract_features(i)[0] for i in ids]
    return max(
        (a - e).abs().max().item()
        for e, *found in zip(expected, singly, batch, strict=True)
        for a in (found[0], found[1][: len(e)])
    )


def test_minilm_hidden_states(minilm, transformers, fairseq_loads, tmp_path, record_property):
    report = import_hf(minilm, tmp_path / "model.pt")
    assert report.n_parameters == 22_744_506 and report.layer_norm_eps == 1e-12
    assert report.lm_head == "identity" and report.unused == ("pooler.dense.bias", "pooler.dense.weight")
    hub = load_stock(report.checkpoint, **wordpiece(tmp_path))
    model, tokenizer = (
        transformers.BertModel.from_pretrained(minilm).eval(),
        transformers.BertTokenizer.from_pretrained(minilm),
    )
    stock = worst_difference(hub, model, tokenizer)
    hub = load_stock(report.checkpoint, arch="qn_roberta", **wordpiece(tmp_path))
    assert type(hub.model).__name__ == "QNRobertaModel"
    honoured = worst_difference(hub, model, tokenizer)
    print(
        f"MiniLM, largest difference of hidden states: qn_roberta {honoured:.1e}, fairseq's own roberta "
        f"{stock:.1e}"
    )
    record_property("difference_qn_roberta", honoured)
    record_property("difference_stock", stock)
    assert honoured < TOLERANCE
    assert TOLERANCE < stock < STOCK_TOLERANCE


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu"])
def test_bert_hidden_states_and_logits(act, transformers, fairseq_loads, tmp_path):
    lines = wordpiece_lines()
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(lines), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=150, hidden_act=act, pad_token_id=lines.index("[PAD]"), layer_norm_eps=1e-3,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForMaskedLM(config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = import_hf(tmp_path / "hf", tmp_path / "model.pt")
    assert report.lm_head == "mapped" and report.unused == () and report.layer_norm_eps == 1e-3
    hub = load_stock(report.checkpoint, **wordpiece(tmp_path))
    honour_eps(hub, report.layer_norm_eps)
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    assert worst_difference(hub, model.bert, tokenizer) < TOLERANCE
    symbols = hub.task.source_dictionary.symbols
    names = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}
    column = torch.tensor([lines.index(names.get(s, s)) for s in symbols])
    for sentence in SENTENCES:
        with torch.no_grad():
            expected = model(**tokenizer(sentence, return_tensors="pt")).logits[0][:, column]
            found = hub.model(hub.encode(sentence).unsqueeze(0))[0][0]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("pad", [1, 9])
@pytest.mark.parametrize("tied", [True, False])
def test_roberta_hidden_states_and_logits(pad, tied, transformers, fairseq_loads, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "hf"
    folder.mkdir()
    byte_bpe_files(folder, pad)
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=len(ids), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=300, type_vocab_size=1, pad_token_id=pad, layer_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config).eval()
    randomise(model)
    model.save_pretrained(folder)
    report = import_hf(folder, tmp_path / "model.pt")
    assert report.lm_head == "mapped" and report.unused == ()
    hub = load_stock(report.checkpoint)  # eps is fairseq's own, and its --bpe gpt2 comes from the checkpoint
    tokenizer = tokenizers.ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    names = hub.task.source_dictionary.symbols
    column = torch.tensor([ids[s] if s in ids and not s.isdigit() else int(s) for s in names])
    for sentence in SENTENCES:
        expected_ids = [ids["<s>"], *tokenizer.encode(sentence).ids, ids["</s>"]]
        tokens = hub.encode(sentence)
        assert column[tokens].tolist() == expected_ids
        assert hub.decode(tokens) == sentence
        with torch.no_grad():
            expected = model(torch.tensor([expected_ids]), output_hidden_states=True)
            logits, _ = hub.model(tokens.unsqueeze(0))
        torch.testing.assert_close(
            hub.extract_features(tokens), expected.hidden_states[-1], atol=TOLERANCE, rtol=0
        )
        wanted = expected.logits[0][:, column]  # that of <pad> too, whose row the head reads
        torch.testing.assert_close(logits[0], wanted, atol=1e-3, rtol=1e-4)


def test_roberta_classifier_becomes_the_head(transformers, fairseq_loads, tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    byte_bpe_files(folder, 1)
    n = len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    config = transformers.RobertaConfig(
        vocab_size=n, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        num_labels=5,
        max_position_embeddings=300, pad_token_id=1, layer_norm_eps=1e-5, initializer_range=0.5,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    report = import_hf(folder, tmp_path / "model.pt")
    hub = load_stock(report.checkpoint)
    tokens = hub.encode(SENTENCES[0])
    ids = [
        0,
        *(int(s) for s in hub.bpe.encode(SENTENCES[0]).split()),
        json.loads((folder / "vocab.json").read_text())["</s>"],
    ]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits
        found = hub.predict("sentence_classification_head", tokens, return_logits=True)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def randomise(model: nn.Module) -> None:
    """Biases and LayerNorms start as zeros and ones, which would hide a swapped name."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p) * 0.3)
            if "position_embeddings" in name or "token_type_embeddings" in name:
                p.copy_(torch.randn_like(p))
            if "word_embeddings" in name:  # the padding row too, which starts as zeros, and tied heads train
                p.add_(torch.randn_like(p) * 0.3)


def test_only_namespace_has_to_be_allowed(tmp_path):
    """torch >= 2.6 restores the checkpoint with weights_only: nothing in it but argparse.Namespace needs
    permission.
    """
    write_bert(tmp_path / "hf", wordpiece_lines())
    path = import_hf(tmp_path / "hf", tmp_path / "model.pt").checkpoint
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()  # other tests allow more
    try:
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == ["argparse.Namespace"]
        with torch.serialization.safe_globals([Namespace]):  # forbids it again at its end
            state = torch.load(path, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)
    assert state["args"].arch == "roberta"
    words = state["model"]["encoder.sentence_encoder.embed_tokens.weight"]
    assert (words[1] == 0).all() and state["model"]["encoder.lm_head.weight"].data_ptr() == words.data_ptr()


def test_no_fairseq_import(tmp_path):
    write_bert(tmp_path / "hf", wordpiece_lines())
    code = (
        "import sys; sys.modules['fairseq'] = None; from fairseq_qn.interop import import_hf; "
        f"import_hf({str(tmp_path / 'hf')!r}, {str(tmp_path / 'model.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_fairseq_train_restores_it(fairseq_loads, tmp_path):
    """The stock command fine-tunes from the checkpoint: --restore-file, the report's options, two
    updates.
    """
    write_bert(tmp_path / "hf", wordpiece_lines(), max_position_embeddings=64)
    report = import_hf(tmp_path / "hf", tmp_path / "model.pt")
    text = tmp_path / "train.txt"
    text.write_text("the report is read in march .\n" * 16, encoding="utf-8")
    data, save = str(tmp_path / "bin"), str(tmp_path / "ck")
    allow = "import argparse, torch; torch.serialization.add_safe_globals([argparse.Namespace]); "
    preprocess = [
        "--only-source",
        "--srcdict",
        str(tmp_path / "dict.txt"),
        "--trainpref",
        str(text),
        "--destdir",
        data,
    ]
    train = [
        data, "--cpu", "--task", "masked_lm", "--criterion", "masked_lm", "--arch", "roberta",
        *report.train_options,
        "--restore-file", str(report.checkpoint), "--reset-optimizer", "--reset-dataloader",
        "--reset-meters",
        "--reset-lr-scheduler", "--tokens-per-sample", "32", "--batch-size", "4", "--optimizer", "adam",
        "--lr", "1e-3",
        "--max-update", "2", "--disable-validation", "--save-dir", save, "--num-workers", "0",
        "--log-format", "json",
    ]  # fmt: skip
    for module, arguments in (("preprocess", preprocess), ("train", train)):
        code = f"{allow}from fairseq_cli.{module} import cli_main; cli_main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "Loaded checkpoint" in done.stderr + done.stdout
    before, after = (
        torch.load(path, weights_only=False)["model"]
        for path in (report.checkpoint, Path(save) / "checkpoint_last.pt")
    )
    assert before.keys() == after.keys()
    name = "encoder.sentence_encoder.layers.1.fc2.weight"
    assert 0 < (before[name] - after[name]).abs().max() < 0.1  # it started from the import, and moved
