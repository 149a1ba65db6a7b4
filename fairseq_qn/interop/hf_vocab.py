"""Vocabularies: which row of a Hugging Face embedding becomes which row of a fairseq dictionary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fairseq_qn.errors import FormatError, MismatchError

# fairseq's dictionary starts with these four; its masked-LM and classification tasks append <mask> last
FIRST = ("<s>", "<pad>", "</s>", "<unk>")
MASK = "<mask>"
PADDING_IDX = 1
WORDPIECE_SPECIALS = ("[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]")  # in the order of FIRST + MASK


@dataclass(frozen=True)
class Vocabulary:
    """`rows[i]` is the Hugging Face id of fairseq's id i; `symbols` are the lines of dict.txt, ids 4 ..
    len(rows) - 2.

    `dropped` are entries that no tokeniser can emit (duplicates, blanks, fairseq's own specials); `pad` is
    the Hugging Face id of the padding token; `files` maps the names to write beside the checkpoint to their
    text.
    """

    rows: list[int]
    symbols: list[str]
    dropped: list[str]
    pad: int
    files: dict[str, str]

    def dict_text(self) -> str:
        """dict.txt as fairseq reads it, one `symbol count` a line. No counts are known: each is 1."""
        return "".join(f"{symbol} 1\n" for symbol in self.symbols)


def read_wordpieces(text: str) -> dict[str, int]:
    """Token -> line number of a vocab.txt. As in Hugging Face, the last of two equal lines wins."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return {line: i for i, line in enumerate(lines)}


def read_vocabulary(folder: Path, model_type: str) -> Vocabulary:
    """The vocabulary of a Hugging Face folder: from vocab.txt, or vocab.json and merges.txt, or else
    tokenizer.json.

    Raises: FormatError (none of these, unreadable, or a special token is missing).
    """
    names = ("vocab.txt",) if model_type == "bert" else ("vocab.json", "merges.txt")
    if all((folder / name).is_file() for name in names):
        texts = [_read(folder / name) for name in names]
        where = folder / names[0]
    elif (folder / "tokenizer.json").is_file():  # all that transformers 5 writes
        where = folder / "tokenizer.json"
        texts = _from_tokenizer_json(read_json(where), where, "WordPiece" if model_type == "bert" else "BPE")
    else:
        raise FormatError(f"{folder}: expected {' and '.join(names)}, or tokenizer.json, found neither")
    return wordpiece_vocabulary(texts[0], where) if model_type == "bert" else gpt2_vocabulary(*texts, where)


def wordpiece_vocabulary(text: str, where: Path) -> Vocabulary:
    """The fairseq dictionary of a WordPiece vocab.txt: its tokens in order, less the five specials.

    Raises: FormatError (a special token is missing).
    """
    ids = read_wordpieces(text)
    specials = [_special(ids, token, where) for token in WORDPIECE_SPECIALS]
    reserved = {*FIRST, MASK, *WORDPIECE_SPECIALS}
    # fairseq splits lines at white space and keeps <s> etc. for itself. WordPiece never emits such tokens,
    # because it splits at white space and punctuation first, so their rows are dead. Duplicates: fairseq's
    # `#fairseq:overwrite` would not survive fairseq-preprocess, which saves the dictionary again without it.
    usable = [token for token in ids if token.split() == [token] and token not in reserved]
    usable.sort(key=ids.__getitem__)
    kept = {*usable, *WORDPIECE_SPECIALS}
    lines = text.split("\n")[: max(ids.values()) + 1]
    dropped = [token for i, token in enumerate(lines) if token not in kept or ids[token] != i]
    rows = [*specials[:4], *(ids[token] for token in usable), specials[4]]
    return Vocabulary(rows, usable, dropped, specials[1], {"vocab.txt": text})


def gpt2_vocabulary(vocab: str, merges: str, where: Path) -> Vocabulary:
    """The fairseq dictionary of a byte-level BPE, given the texts of vocab.json and merges.txt.

    Its symbols are the ids of vocab.json, written as text, so that fairseq's
    `--bpe gpt2 --gpt2-encoder-json encoder.json --gpt2-vocab-bpe vocab.bpe` emits them.

    Raises: FormatError (no such JSON, or a special token is missing).
    """
    ids = _json(vocab, where)
    if not all(type(i) is int for i in ids.values()):
        raise FormatError(
            f"{where}: expected a JSON object of token -> id, found other values; take the folder's own"
        )
    specials = [_special(ids, token, where) for token in (*FIRST, MASK)]
    plain = sorted(set(ids.values()) - set(specials))
    if not merges.startswith("#version"):  # fairseq skips the first line, and wants a last newline
        merges = "#version: 0.2\n" + merges
    files = {"encoder.json": vocab, "vocab.bpe": merges.rstrip("\n") + "\n"}
    return Vocabulary([*specials[:4], *plain, specials[4]], [str(i) for i in plain], [], specials[1], files)


def check_rows(vocabulary: Vocabulary, config: dict, folder: Path) -> None:
    """Raise MismatchError where config.json has too few rows, or another padding token."""
    needed, n_rows = max(vocabulary.rows) + 1, config["vocab_size"]
    if needed > n_rows:
        raise MismatchError(
            f"{folder}: the vocabulary expects an embedding of at least {needed} rows, found vocab_size "
            f"{n_rows} in config.json; the vocabulary is of another model"
        )
    if config.get("pad_token_id", vocabulary.pad) != vocabulary.pad:
        raise MismatchError(
            f"{folder}: the vocabulary expects pad_token_id {vocabulary.pad}, found "
            f"{config['pad_token_id']} in config.json; make them agree"
        )


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises: FormatError (no such file, no JSON, or no object)."""
    if not path.is_file():
        raise FormatError(f"{path}: expected a Hugging Face folder with this file, found none")
    return _json(_read(path), path)


def _json(text: str, where: Path) -> dict:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise FormatError(f"{where}: expected a JSON object, found text that is no JSON ({e})") from e
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected a JSON object, found a {type(value).__name__}")
    return value


def _from_tokenizer_json(data: dict, where: Path, kind: str) -> list[str]:
    """The texts of vocab.txt, or of vocab.json and merges.txt, out of a parsed tokenizer.json."""
    model = data.get("model")
    if not isinstance(model, dict) or model.get("type") != kind or not isinstance(model.get("vocab"), dict):
        raise FormatError(f"{where}: expected a tokeniser of type {kind} with its vocabulary, found another")
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in data.get("added_tokens", [])}}
    if kind == "WordPiece":
        names = {i: token for token, i in ids.items()}
        return ["".join(names.get(i, "") + "\n" for i in range(max(names) + 1))]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    return [json.dumps(ids), "#version: 0.2\n" + "".join(merge + "\n" for merge in merges)]


def _special(ids: dict[str, int], token: str, path: Path) -> int:
    if token not in ids:
        raise FormatError(
            f"{path}: expected the special token {token}, found none; add it to the vocabulary"
        )
    return ids[token]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise FormatError(
            f"{path}: expected UTF-8 text, found byte {e.object[e.start]:#04x} at {e.start}"
        ) from e
