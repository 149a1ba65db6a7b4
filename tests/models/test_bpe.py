"""What may travel inside a file as its BPE: the known ones, with their own options, and nothing but files
from inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fairseq")

from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.models.bpe import Guarded, carry_bpe, checked_text, unpacked


@pytest.fixture
def pieces(tmp_path: Path) -> Path:
    (tmp_path / "x.model").write_bytes(b"pieces")
    return tmp_path / "x.model"


def test_options_are_checked_when_they_are_given(pieces: Path) -> None:
    # a command line hands out text
    options = {"sentencepiece_alpha": "0.5", "sentencepiece_enable_sampling": True}
    source, assets = carry_bpe("sentencepiece", [pieces], options)
    taken = {**options, "sentencepiece_alpha": 0.5}
    assert source["bpe"] == {"_name": "sentencepiece", "sentencepiece_model": "asset:x.model", **taken}
    assert checked_text(source, assets)["bpe"] == {**source["bpe"], "sentencepiece_model": "x.model"}
    for wrong, said in (
        ({"sentencepiece_model": "/etc/passwd"}, "takes"),
        ({"sentencepiece_alpha": "x"}, "a number from"),
    ):
        with pytest.raises(UnsupportedError, match=said):
            carry_bpe("sentencepiece", [pieces], wrong)


def test_files_lie_under_names_of_ours_and_go(pieces: Path) -> None:
    """Whatever the file calls them: `${x}` would be an interpolation in a path."""
    parts = {"bpe": {"_name": "sentencepiece", "sentencepiece_model": "${x}.model"}, "tokenizer": None}
    with unpacked(parts, {"${x}.model": b"pieces"}) as found:
        path = Path(found["bpe"]["sentencepiece_model"])
        assert path.read_bytes() == b"pieces" and path.name == "sentencepiece_model"
    assert not path.parent.exists() and parts["bpe"]["sentencepiece_model"] == "${x}.model"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("subword_nmt", text) for text in ("a", "a b c", "#version: x\na b", "a b\n\nc d")),
        *(
            ("fastbpe", text)
            for text in ("a b", "a b x", "a b 1\na b 1", "ab c 1\na bc 1", "a b 9999999999")
        ),
    ],
)
def test_codes_that_make_a_library_end_the_process(name: str, text: str) -> None:
    parts = {"bpe": {"_name": name, "bpe_codes": "c"}, "tokenizer": None}
    with pytest.raises(FormatError, match="bpe_codes"), unpacked(parts, {"c": text.encode()}):
        pytest.fail("unpacked")
    good = {"subword_nmt": b"#version: 0.2\na b\nab c</w>\n", "fastbpe": b"a b 5\nab c</w> 3\n"}[name]
    with unpacked(parts, {"c": good}) as found:
        assert Path(found["bpe"]["bpe_codes"]).read_bytes() == good


def test_a_bpe_that_does_not_hang_together_says_so() -> None:
    class Torn:
        symbol = "@@"

        def encode(self, x: str) -> str:
            return {}[x]

        def decode(self, x: Any) -> str:
            return x.split("y", 1)[1]

    bpe = Guarded(Torn(), "m.qn.safetensors")
    assert bpe.symbol == "@@" and bpe.decode("xyz") == "z"
    for ask in (bpe.encode, bpe.decode):
        with pytest.raises(FormatError, match="m.qn.safetensors: bpe: cannot .*code 'ab'"):
            ask("ab")
    with pytest.raises(AttributeError):
        bpe.decode(None)  # the caller's mistake stays as it is
