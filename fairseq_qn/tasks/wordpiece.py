"""BERT's WordPiece as a fairseq BPE: `--bpe qn_wordpiece --wordpiece-vocab FILE [--wordpiece-cased]`."""

# no `from __future__ import annotations`: fairseq reads the fields' types as classes

from dataclasses import dataclass, field
from pathlib import Path

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass
from omegaconf import MISSING

from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.interop.hf_vocab import read_wordpieces

# how fairseq's dictionary names what vocab.txt calls so
TO_FAIRSEQ = {"[UNK]": "<unk>", "[MASK]": "<mask>"}
FROM_FAIRSEQ = {ours: theirs for theirs, ours in TO_FAIRSEQ.items()}


@dataclass
class WordPieceConfig(FairseqDataclass):
    wordpiece_vocab: str = field(
        default=MISSING, metadata={"help": "path to a BERT vocab.txt, one token a line"}
    )
    wordpiece_cased: bool = field(
        default=False, metadata={"help": "keep case and accents (default: lower-case)"}
    )


@register_bpe("qn_wordpiece", dataclass=WordPieceConfig)
class WordPieceBPE:
    """BERT's tokeniser: clean, lower-case, split at spaces and punctuation, then the longest matching
    pieces.

    Text is only text: "[SEP]" or "[MASK]" in it are brackets and letters. Hugging Face's tokeniser takes
    them for its special tokens unless it is told `split_special_tokens=True`, and a sentence could then end
    or mask itself.

    Raises: UnsupportedError (the `tokenizers` library is missing), FormatError (no such vocabulary, or none
    at all).
    """

    def __init__(self, cfg: WordPieceConfig):
        try:
            from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
        except ImportError as e:
            raise UnsupportedError(
                "--bpe qn_wordpiece needs the tokenizers library; pip install tokenizers"
            ) from e
        path = Path(cfg.wordpiece_vocab)
        if not path.is_file():
            raise FormatError(f"--wordpiece-vocab: expected a BERT vocab.txt at {path}, found none")
        vocab = read_wordpieces(path.read_text(encoding="utf-8"))
        if "[UNK]" not in vocab:
            raise FormatError(
                f"{path}: expected the special token [UNK], found none; is it a BERT vocab.txt?"
            )
        self.tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        self.tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cfg.wordpiece_cased)
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.tokenizer.decoder = decoders.WordPiece()

    def encode(self, x: str) -> str:
        """Text -> pieces of the fairseq dictionary, joined by spaces."""
        return " ".join(TO_FAIRSEQ.get(piece, piece) for piece in self.tokenizer.encode(x).tokens)

    def decode(self, x: str) -> str:
        """Pieces joined by spaces -> text, without case, accents and spaces around punctuation."""
        return self.tokenizer.decoder.decode([FROM_FAIRSEQ.get(piece, piece) for piece in x.split()])

    def is_beginning_of_word(self, x: str) -> bool:
        """Whether this piece starts a word, as whole-word masking asks."""
        return not x.startswith("##")
