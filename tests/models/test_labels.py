"""Classes go by the labels that their own head was trained with, and by numbers where the file does not know
them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from described import RECIPE, build, byte_bpe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.errors import UnsupportedError


@pytest.fixture
def interface(tmp_path: Path) -> Callable[..., Any]:
    """The interface of a file whose label dictionary is good, bad, a filler and <mask>; heads are added
    first.
    """

    def make(heads: dict[str, int]) -> Any:
        model = build("qn_roberta")
        if "mood" not in heads:
            del model.classification_heads["mood"]
        for name, classes in heads.items():
            model.register_classification_head(name, classes)
        fairseq_qn.apply(model, RECIPE)
        fairseq_qn.freeze(model)
        source, assets = byte_bpe(tmp_path / "bpe")
        fairseq_qn.save(model, tmp_path / "m.qn.safetensors", source=source, assets=assets)
        return hub.load_interface(tmp_path / "m.qn.safetensors")

    return make


def test_fairseqs_fillers_name_no_class(interface: Callable[..., Any]) -> None:
    """fairseq pads dictionaries with madeupword0000, and its task adds <mask>: 2 labels are 4 symbols."""
    found = interface({"mood": 2})
    assert found.labels == ["good", "bad"] and {label for label, _ in found.classify("ka lo")} == {
        "good",
        "bad",
    }
    for classes in (3, 4, 5):
        found = interface({"mood": classes})
        assert found.labels == [str(n) for n in range(classes)] and len(found.classify("ka lo")) == classes


def test_labels_of_another_head(interface: Callable[..., Any]) -> None:
    found = interface({"mood": 2, "topic": 2, "many": 3})
    assert found.labels_of("mood") == ["good", "bad"]
    assert {label for label, _ in found.classify("ka lo", head="topic")} == {"0", "1"}
    assert {label for label, _ in found.classify("ka lo", head="many")} == {"0", "1", "2"}
    assert interface({"renamed": 2}).labels == ["good", "bad"], (
        "the only head is the one that the labels are of"
    )
    with pytest.raises(UnsupportedError, match="one of the heads"):
        found.labels_of("nope")


def test_too_long_a_sentence_is_said_to_be(interface: Callable[..., Any]) -> None:
    found = interface({"mood": 2})
    for answer in (found.classify, lambda text: found.fill_mask(f"{text} <mask>")):
        with pytest.raises(
            UnsupportedError, match=r"expected up to 32 tokens, found .*; shorten the sentence"
        ):
            answer("ka lo " * 40)
