"""Vocabularies: each fairseq symbol gets the row of its token, whatever order and junk the file has."""

import json
from pathlib import Path

import pytest
import torch
from hf_folders import byte_bpe_files, wordpiece_lines, write_bert
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.errors import FormatError
from fairseq_qn.interop import import_hf
from fairseq_qn.interop.hf_vocab import (
    WORDPIECE_SPECIALS,
    gpt2_vocabulary,
    read_vocabulary,
    wordpiece_vocabulary,
)

NAMES = dict(zip(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], WORDPIECE_SPECIALS, strict=True))
# tokens as the wild has them, and some that fairseq's dictionary would choke on
TOKENS = st.one_of(
    st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\n\r"), max_size=4),
    st.sampled_from(
        [
            "",
            " ",
            "<s>",
            "</s>",
            "<unk>",
            "<mask>",
            "#fairseq:overwrite",
            "a b",
            "\u3000",
            "x 1",
            "\x85",
            "##s",
        ]
    ),
)


def fairseq_dictionary(text: str, folder: Path):
    """As the tasks load it, after fairseq-preprocess has saved it again."""
    from fairseq.data import Dictionary

    folder.mkdir(exist_ok=True)
    (folder / "dict.txt").write_text(text, encoding="utf-8", newline="\n")
    Dictionary.load(str(folder / "dict.txt")).save(str(folder / "again.txt"))
    dictionary = Dictionary.load(str(folder / "again.txt"))
    dictionary.add_symbol("<mask>")
    return dictionary


@given(st.lists(TOKENS, max_size=30), st.randoms())
def test_wordpiece_rows_and_symbols(tmp_path_factory, tokens, random):
    pytest.importorskip("fairseq")
    lines = [*tokens, *WORDPIECE_SPECIALS]
    random.shuffle(lines)
    vocabulary = wordpiece_vocabulary("".join(line + "\n" for line in lines), Path("vocab.txt"))
    dictionary = fairseq_dictionary(vocabulary.dict_text(), tmp_path_factory.getbasetemp() / "vocab")
    assert len(dictionary) == len(vocabulary.rows) == len(set(vocabulary.rows))
    last = {line: i for i, line in enumerate(lines)}  # Hugging Face: of equal lines the last one counts
    for symbol, row in zip(dictionary.symbols, vocabulary.rows, strict=True):
        assert row == last[NAMES.get(symbol, symbol)]
        assert dictionary.index(symbol) == dictionary.symbols.index(symbol)
    # only what no tokeniser emits is dropped, and every line is accounted for
    assert len(vocabulary.dropped) + len(vocabulary.rows) == len(lines)
    for token in vocabulary.dropped:
        assert token.split() != [token] or token in NAMES or lines.count(token) > 1


@pytest.mark.parametrize("pad", [1, 7])
def test_gpt2_rows_and_symbols(pad, tmp_path):
    pytest.importorskip("fairseq")
    byte_bpe_files(tmp_path, pad)
    ids = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    vocabulary = read_vocabulary(tmp_path, "roberta")
    dictionary = fairseq_dictionary(vocabulary.dict_text(), tmp_path / "out")
    assert sorted(vocabulary.rows) == sorted(ids.values()) and vocabulary.pad == pad
    for symbol, row in zip(dictionary.symbols, vocabulary.rows, strict=True):
        assert row == (ids[symbol] if symbol in NAMES else int(symbol))


def test_merges_are_read_whole_by_fairseq(tmp_path):
    """fairseq skips the first line of vocab.bpe and what follows the last newline: nothing may be lost to
    that.
    """
    ids = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab", "abab", "<mask>"])}
    for merges in ("a b\nab ab", "#version: 0.2\na b\nab ab\n"):
        text = gpt2_vocabulary(json.dumps(ids), merges, Path("vocab.json")).files["vocab.bpe"]
        assert text.split("\n")[1:-1] == ["a b", "ab ab"]


def test_tokenizer_json_stands_for_the_vocabulary_files(tmp_path):
    """All that transformers 5 writes is tokenizer.json: the checkpoint is the same."""
    tokenizers = pytest.importorskip("tokenizers")
    lines = wordpiece_lines()
    write_bert(tmp_path / "hf", lines)
    first = import_hf(tmp_path / "hf", tmp_path / "a" / "model.pt")
    model = tokenizers.models.WordPiece({t: i for i, t in enumerate(lines)}, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "vocab.txt").unlink()
    second = import_hf(tmp_path / "hf", tmp_path / "b" / "model.pt")
    for name in ("dict.txt", "vocab.txt"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    states = [torch.load(r.checkpoint, weights_only=False)["model"] for r in (first, second)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_tokenizer_json_of_a_byte_level_bpe(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    byte_bpe_files(tmp_path, 1)
    expected = read_vocabulary(tmp_path, "roberta")
    bpe = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    tokenizers.Tokenizer(bpe).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "merges.txt").unlink()
    found = read_vocabulary(tmp_path, "roberta")
    assert (found.rows, found.symbols, found.files["vocab.bpe"]) == (
        expected.rows,
        expected.symbols,
        expected.files["vocab.bpe"],
    )
    with pytest.raises(FormatError, match="WordPiece"):
        read_vocabulary(tmp_path, "bert")
