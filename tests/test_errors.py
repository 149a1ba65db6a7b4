"""Messages are one printable line of at most 300 characters, whatever went into them."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn import errors
from fairseq_qn.errors import MAX_MESSAGE, FormatError, QNError

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, QNError)]


@given(st.text(st.characters(), max_size=900), st.sampled_from(CLASSES))
def test_any_text_becomes_one_line(text: str, cls: type[QNError]) -> None:
    message = str(cls(text))
    assert len(message) <= MAX_MESSAGE and message.isprintable() and len(message.splitlines()) <= 1
    if len(text) <= MAX_MESSAGE and text.isprintable():
        assert message == text
    again = pickle.loads(pickle.dumps(cls(text)))
    assert type(again) is cls and str(again) == message


@pytest.mark.parametrize("length", [10, 150, 2_000, 10**7])
def test_a_cut_message_keeps_what_where_and_what_to_do(length: int) -> None:
    path, name = "/folder/" + "d" * length, "layer\n{}" * (length // 8)
    message = str(
        FormatError(f"{path}: tensor {name!r}: expected K 8, found 16; use the recipe of the checkpoint")
    )
    assert message.startswith("/folder/ddd") and len(message) <= MAX_MESSAGE
    assert message.endswith("expected K 8, found 16; use the recipe of the checkpoint")
