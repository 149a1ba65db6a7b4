"""--bpe qn_wordpiece gives the pieces that Hugging Face's BertTokenizer gives."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("fairseq")
pytest.importorskip("tokenizers")

from fairseq.data import encoders

from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.tasks.wordpiece import WordPieceBPE, WordPieceConfig

LINES = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] the quick un ##aff ##able able Zürich zurich 中 ! ? ' . , - "
    + " ".join(f"{c} ##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789éA")
).split()


@pytest.fixture(scope="module")
def vocab(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_known_pieces(vocab):
    uncased = WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(vocab)))
    assert uncased.encode("The unaffable, ÜNABLE café!") == "the un ##aff ##able , un ##able c ##a ##f ##e !"
    assert uncased.encode("☃ 中中") == "<unk> 中 中"
    assert uncased.encode("") == ""
    assert uncased.decode("the un ##aff ##able , quick !") == "the unaffable, quick!"
    assert uncased.decode("<mask> the <unk>") == "[MASK] the [UNK]"
    assert not uncased.is_beginning_of_word("##able") and uncased.is_beginning_of_word("able")
    cased = WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(vocab), wordpiece_cased=True))
    assert cased.encode("Zürich zürich A É") == "Zürich <unk> A <unk>"


@pytest.fixture(scope="module")
def bert_tokenizer():
    before = sys.modules.get("torchaudio", sys)
    # transformers imports it where installed; beside a CPU torch that can raise
    sys.modules["torchaudio"] = None
    try:
        pytest.importorskip("transformers", reason="parity needs transformers")
        from transformers import BertTokenizer
    finally:
        sys.modules.pop("torchaudio") if before is sys else sys.modules.update(torchaudio=before)
    return BertTokenizer


@pytest.mark.parametrize("cased", [False, True])
def test_parity_with_bert_tokenizer(cased, vocab, bert_tokenizer):
    """Its split_special_tokens takes the text [SEP] for letters, as we do."""
    theirs = bert_tokenizer(str(vocab), do_lower_case=not cased, split_special_tokens=True)
    ours = WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(vocab), wordpiece_cased=cased))

    @settings(max_examples=300)
    @given(
        st.one_of(
            st.text(max_size=40),
            st.lists(st.sampled_from([*LINES, "[", "sep]", "<unk>", "unable", " ", "É", "\u0301"])).map(
                "".join
            ),
        )
    )
    def same(text):
        pieces = [{"[UNK]": "<unk>"}.get(piece, piece) for piece in theirs.tokenize(text)]
        assert ours.encode(text).split(" ") == (pieces or [""])

    same()


def test_a_text_injects_no_special_token(vocab, bert_tokenizer):
    """Hugging Face's takes [SEP] for the token that ends a sentence, unless told not to."""
    text = "the [SEP]<mask> </s>"
    assert bert_tokenizer(str(vocab)).tokenize(text)[:2] == ["the", "[SEP]"]
    pieces = WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(vocab))).encode(text)
    # brackets are not in it
    assert pieces == "the <unk> s ##e ##p <unk> <unk> m ##a ##s ##k <unk> <unk> <unk> s <unk>"


def test_built_by_name(vocab):
    from argparse import Namespace

    bpe = encoders.build_bpe(Namespace(bpe="qn_wordpiece", wordpiece_vocab=str(vocab)))
    assert bpe.encode("quick") == "quick"


def test_errors(vocab, tmp_path, monkeypatch):
    with pytest.raises(FormatError, match="vocab.txt"):
        WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(tmp_path / "vocab.txt")))
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(FormatError, match="UNK"):
        WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(tmp_path / "other.txt")))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UnsupportedError, match="pip install tokenizers"):
        WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(vocab)))
